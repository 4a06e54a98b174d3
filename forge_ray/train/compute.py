"""The compute process of a seat: builds a worker, trains with whomever the coordinator names, and keeps the record.

Forked by the seat's keeper, so it starts with everything imported. Rank 0 of a group writes the run's events and
checkpoints, whoever that is at the time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import threading
import time
from collections import deque
from typing import Any

import torch

from forge_ray.data.loader import SlotLoader
from forge_ray.errors import ArtifactError, ForgeError
from forge_ray.events import Events
from forge_ray.model.transformer import Transformer
from forge_ray.telemetry import say
from forge_ray.train import guardian, loop
from forge_ray.train.checkpoint import Saved
from forge_ray.train.group import GroupLost, store_server
from forge_ray.train.guardian import Guardian, Verdict
from forge_ray.train.lines import Lines, Message
from forge_ray.train.loop import StepRecord, Worker
from forge_ray.train.optimizer import Optimizer
from forge_ray.train.saving import Saver
from forge_ray.train.spec import RunSpec
from forge_ray.train.team import Control, Odd, Stopped, Team

_FLUSH_S = 2.0
_KEPT_S = 10.0
ODD_EXIT = 70


def preload() -> None:
    """Imports what a compute process would import later, so that a fork has it. Starts no thread."""
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch.distributed  # noqa: F401


def main(task: Message, connection: socket.socket) -> None:
    """Trains until the run is done, this worker is told to stop, or it cannot be trusted."""
    spec = RunSpec.from_json(task["spec"])
    torch.set_num_threads(spec.config.cpus_per_worker)
    device = torch.device("cuda", 0) if spec.config.gpus_per_worker else torch.device("cpu")
    store, at = store_server(task["address"])
    control = Control(Lines(connection), at, host_class(spec, device))
    try:
        _train(spec, task, control, device)
    except ForgeError as error:
        control.status("failed", 0, -1, error=error.as_dict())
    except Odd as error:
        print(f"this worker's state cannot be trusted: {error}", flush=True)
        os._exit(ODD_EXIT)
    except Stopped:
        pass
    del store  # others meet there as long as this process lives


def _train(spec: RunSpec, task: Message, control: Control, device: torch.device) -> None:
    worker = build(spec, device)
    record = Record(spec, worker, control)
    team = Team(control, task["address"], device, record.resume, record.on_formed, record.distrust)
    record.team = team
    try:
        loop.fit(worker, team, record.on_step, record.on_verdict)
        _finish(worker, team, record)
        control.status("done", team.generation, worker.step, members=[])
    except Stopped:
        record.stop()
        raise
    finally:
        worker.loader.reader.close()


def _finish(worker: Worker, team: Team, record: Record) -> None:
    """All wait until the last checkpoint stands; if who writes it dies, the next one does."""
    while True:
        try:
            team.settle(worker)
            if team.rank == 0:
                record.finish()
            team.progress("waiting")
            team.group.gather_json("saved")
            return
        except GroupLost as error:
            team.lost(error)


def build(spec: RunSpec, device: torch.device) -> Worker:
    """A worker without a state: peers or a checkpoint give it one."""
    config = spec.config
    loader = SlotLoader.of(config, spec.workspace.get(spec.shards_ref))
    index = loader.order.index
    model = Transformer(spec.model, index.vocab_size, config.seq_len).to(device)
    optimizer = Optimizer(model, config.optimizer)
    bf16 = spec.precision == "bf16"
    return Worker(config, model, optimizer, loader, index.end_token, bf16, Guardian(config.guard))


def host_class(spec: RunSpec, device: torch.device) -> str:
    """What the bits of a result depend on besides the configuration: libraries, threads, the kind of processor."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, {processor}, {spec.config.cpus_per_worker} thread(s), {spec.precision}"


class Record:
    """What is kept of a run: events, and checkpoints by rank 0; and what a worker without a state begins with."""

    def __init__(self, spec: RunSpec, worker: Worker, control: Control) -> None:
        self.team: Team
        self._spec, self._worker, self._control = spec, worker, control
        self._events = Events(spec.workspace.storage, spec.run_id)
        self._saver = Saver(
            spec.workspace,
            spec.run_id,
            spec.config,
            on_saved=self._on_saved,
            on_failed=self._on_failed,
            before_manifest=self._events.flush,  # a kill between the two repeats steps, the other order would lose them
        )
        self._recent: deque[tuple[float, StepRecord]] = deque()
        threading.Thread(target=self._flush, name="forge-events", daemon=True).start()

    def resume(self, worker: Worker, verdict: Verdict | None) -> None:
        """Gives the worker the newest checkpoint's state, or a new run's; or that which a verdict wants."""
        self.team.progress("loading")
        found = self._saver.tiers.newest() if verdict is None else self._before(verdict)
        if found is None:
            worker.model.initialise(self._spec.config.seed)
            worker.state.buffer[worker.state.num_weights :].zero_()
            worker.take({"step": 0, "guardian": Guardian(self._spec.config.guard).state()})
            return
        weights, moments, state = self._saver.tiers.load(found.step, found.tier)
        worker.state.load(weights, moments)
        worker.take({"guardian": Guardian(self._spec.config.guard).state(), **state})
        if verdict is None and state.get("host_class", self._control.host_class) != self._control.host_class:
            say(
                f"  step {worker.step} was computed by {state['host_class']}, this is {self._control.host_class}: the "
                "samples stay the same, the weights' bits may differ from here on"
            )
            self._add("bits", step=worker.step, before=state["host_class"], now=self._control.host_class)

    def distrust(self, step: int) -> None:
        """Takes back the checkpoints after a step: a worker whose memory failed had a part in them."""
        with contextlib.suppress(ForgeError):
            self._saver.finish()
        self._add("distrust", after=step)
        self._saver.tiers.drop_after(step)

    def on_formed(self, worker: Worker, about: Message) -> None:
        """A group stands, on every worker."""
        if self.team.rank == 0:
            self._add("form", **about)
            if about["lost"]:  # what the one before had not published
                for _, record in self._recent:
                    self._events.add("step", **record.as_dict(), again=True)

    def on_step(self, record: StepRecord) -> None:
        """A step is committed, on every worker."""
        now_s = time.monotonic()
        self._recent.append((now_s, record))
        while now_s - self._recent[0][0] > _KEPT_S:
            self._recent.popleft()
        if self.team.rank == 0:
            self._add("step", **record.as_dict())
            if self._saver.due():
                self._saver.snapshot(self._worker.step, self._worker.state, self._extra())

    def on_verdict(self, verdict: Verdict) -> None:
        """The guardian does not let a step pass, on every worker."""
        if self.team.rank == 0:
            samples = guardian.samples_of(self._worker.loader, verdict.position)
            self._add("guard", **verdict.as_dict(), samples=samples.documents, num_samples=samples.count)

    def finish(self) -> None:
        """Stores the last checkpoint and all events.

        Raises:
            StorageError: The last checkpoint cannot be stored.
        """
        self._events.flush()
        self.team.progress("saving")
        self._save()
        self._add("end", step=self._worker.step)
        self._events.flush()

    def stop(self) -> None:
        """Keeps what there is when this worker ends before the run does."""
        if self.team.rank == 0 and self._worker.step > 0:
            try:
                self._save()
                self._events.flush()
            except ForgeError as error:
                say(f"  the last steps are not saved: {error}")

    def _save(self) -> None:
        self._saver.snapshot(self._worker.step, self._worker.state, self._extra(), last=True)
        self._saver.finish()

    def _before(self, verdict: Verdict) -> Saved:
        """The checkpoint that a rollback goes to; later ones are taken back."""
        with contextlib.suppress(ForgeError):
            self._saver.finish()
        candidates = self._saver.tiers.candidates()
        while True:
            step = guardian.checkpoint_before(verdict, [step for step, _ in candidates])
            tier = next(tier for at, tier in candidates if at == step)
            try:
                found = Saved(step, tier, self._saver.tiers.tiers[tier].verified(step))
            except ArtifactError as error:
                say(f"  checkpoint {step} ({tier}) is passed over: {error}")
                candidates.remove((step, tier))
                continue
            self._saver.tiers.drop_after(step)
            return found

    def _extra(self) -> dict[str, Any]:
        worker, config = self._worker, self._spec.config
        return {
            **worker.extra(),
            "vocab_size": worker.model.vocab_size,
            "end_token": worker.end_token,
            "epochs": worker.loader.epochs(config.steps),
            "epochs_by_source": worker.loader.epochs_by_source(config.steps),
            "host_class": self._control.host_class,
        }

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.add(kind, **fields)
        self._control.event({"event": kind, "time_s": round(time.time(), 3), **fields})

    def _on_saved(self, tier: str, step: int, stall_s: float, write_s: float, size_bytes: int) -> None:
        self._add("checkpoint", step=step, tier=tier, stall_s=stall_s, write_s=write_s, bytes=size_bytes)

    def _on_failed(self, tier: str, step: int, error: Exception) -> None:
        self._add("checkpoint_failed", step=step, tier=tier, why=str(error))

    def _flush(self) -> None:
        pause = threading.Event()
        while not pause.wait(_FLUSH_S):
            try:
                self._events.flush()
            except ForgeError as error:
                say(f"  events are kept for now: {error.what}")
