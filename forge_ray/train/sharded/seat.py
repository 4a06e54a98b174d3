"""Sharded training in a seat's compute process: one group after the other, each from the newest state in memory.

A group that breaks ends its processes; their keepers fork others, which find their places' copies in memory.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from pathlib import Path

import psutil
import torch

from forge_ray.data.loader import SlotLoader
from forge_ray.errors import ForgeError
from forge_ray.train.elastic.group import GroupLost, store_client
from forge_ray.train.elastic.lines import Message
from forge_ray.train.elastic.team import STORE_S, Control, Stopped
from forge_ray.train.guardian import Verdict
from forge_ray.train.loop import StepRecord
from forge_ray.train.record import Log
from forge_ray.train.sharded import loop as sharded_loop
from forge_ray.train.sharded.loop import Place
from forge_ray.train.spec import RunSpec


def train(spec: RunSpec, task: Message, control: Control, device: torch.device) -> None:
    """Trains until the run is done.

    Raises:
        GroupLost: A member is gone; this process should end, and another take its place.
        Stopped: There is nothing more to do for this worker.
    """
    # torch's default group finds its network by this, or by the host's name, which often means loopback.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(task["address"]))
    log, generation = Log(spec, control), 0
    control.status("ready", generation, -1)
    while True:
        began_s = time.monotonic()
        control.progress("waiting")
        form = control.wait(generation)
        generation = form["generation"]
        if form["rank"] < 0:
            control.status("left", generation, -1)
            raise Stopped
        place = Place(
            store_client(form["store"], generation, STORE_S, partial(control.urgent, generation)),
            form["rank"],
            form["size"],
            generation,
            device,
            Path(task["memory"]),
            spec.config.hang_s + spec.config.store_wait_s,
        )
        watch = _Watch(spec, control, log, form, began_s)
        try:
            done = sharded_loop.run(spec, place, watch, {"host_class": control.host_class})
        except GroupLost:
            log.repeat()
            with contextlib.suppress(ForgeError):
                log.flush()
            raise
        if done:
            if form["rank"] == 0:
                log.add("end", step=spec.config.steps)
                log.flush()
            control.status("done", generation, spec.config.steps, members=[])
            return


class _Watch:
    """What a group tells, passed on to the coordinator and the record."""

    def __init__(self, spec: RunSpec, control: Control, log: Log, form: Message, began_s: float) -> None:
        self._spec, self._control, self._log, self._form, self._began_s = spec, control, log, form, began_s

    def wishes(self) -> bool:
        """Whether another group is to form at the next boundary; or none."""
        return self._control.newest(self._form["generation"]) is not None

    def progress(self, phase: str) -> None:
        """For the coordinator's watch over hangs."""
        if self._control.stopping:
            raise Stopped
        self._control.progress(phase)

    def on_formed(self, step: int, tier: str) -> None:
        """The group stands."""
        form = self._form
        self._control.status("in", form["generation"], step, members=form["members"])
        if form["rank"] == 0:
            about = {key: form[key] for key in ("generation", "cause", "lost", "joined")}
            about |= {"step": step, "world_size": form["size"], "stall_s": time.monotonic() - self._began_s}
            self._log.formed({**about, "tier": tier})

    def on_step(self, record: StepRecord) -> None:
        """A step is committed."""
        self._log.step(record, self._form["rank"])

    def on_verdict(self, verdict: Verdict) -> None:
        """The guardian has something to say of a step."""
        loader = SlotLoader.of(self._spec.config, self._spec.workspace.get(self._spec.shards_ref))
        try:
            self._log.verdict(verdict, loader, self._form["rank"])
        finally:
            loader.reader.close()

    def on_saved(self, step: int, stall_s: float, write_s: float, size_bytes: int) -> None:
        """A checkpoint stands."""
        self._log.saved("store", step, stall_s, write_s, size_bytes)

    def on_not_saved(self, step: int, error: ForgeError | None) -> None:
        """A checkpoint does not."""
        self._log.not_saved("store", step, error or "the store did not take another worker's part")


def _interface(address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return "lo"
