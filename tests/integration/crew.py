"""A crew: a coordinator and seats with real keepers and compute processes, without Ray, to start in seconds.

What Ray's agents do, a thread does here: it attaches to a seat's keeper and tells it where the coordinator is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from forge_ray.events import Events
from forge_ray.train.elastic import seat
from forge_ray.train.elastic.coordinator import Coordinator
from forge_ray.train.elastic.lines import Lines
from forge_ray.train.saving.checkpoint import OPTIMIZER, WEIGHTS, Checkpoints
from forge_ray.train.spec import RunSpec
from tests.waiting import wait_for

LIMIT_S = 120.0
ADDRESS = "127.0.0.1"


class Crew:
    """A run's processes on this machine.

    Args:
        spec: What is trained.
        orphan_s: How long keepers live without an agent.
    """

    def __init__(self, spec: RunSpec, orphan_s: float = 20.0, **limits: Any) -> None:
        self.spec, self.orphan_s = spec, orphan_s
        self._limits = {
            "min_workers": spec.config.min_workers,
            "max_workers": spec.config.max_workers,
            "hang_s": spec.config.hang_s,
            "data_wait_s": spec.config.store_wait_s,
            **limits,
        }
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stack = contextlib.ExitStack()
        self._seats: dict[str, tuple[contextlib.ExitStack, Lines]] = {}
        self._called: set[str] = set()
        self.news: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def __enter__(self) -> Crew:
        self._thread.start()
        self.start_coordinator()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(
                self.ask(self.coordinator.state()),
                *(row for row in self.look() if row["event"] not in ("step", "checkpoint")),
                sep="\n",
            )
            for folder in self.folders():
                print(f"--- {folder.name}\n{seat.tail(folder)}")
        for process in self.processes("forge-seat") + self.processes("forge-compute"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for stack, _ in self._seats.values():
            stack.close()
        self.drop_coordinator()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        shutil.rmtree(seat.folder_of_run(self.spec.run_id), ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------- the parts

    def start_coordinator(self) -> None:
        """A new one; the one before, if there is one, is dropped with its connections."""
        self.coordinator = Coordinator(self.spec.run_id, self.spec.workspace.uri, self._limits)
        self._where = self.ask(self.coordinator.address(ADDRESS))
        self.call(*self._called)

    def drop_coordinator(self) -> None:
        """As if its process were killed: all connections end."""
        self.ask(self._drop(self.coordinator))

    @staticmethod
    async def _drop(coordinator: Coordinator) -> None:
        coordinator._server.close()
        for task in coordinator._tasks:
            task.cancel()
        for writer in list(coordinator._writers.values()):
            writer.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others, timeout=5) if others else None

    def prepare(self, count: int) -> list[str]:
        """So many agents take seats, whose keepers come up and wait: they do not know yet where the coordinator is."""
        task = {"run_id": self.spec.run_id, "spec": self.spec.to_json(), "orphan_s": self.orphan_s, "address": ADDRESS}
        claimed = []
        for _ in range(count):
            stack = contextlib.ExitStack()
            folder, kept = stack.enter_context(seat.claim(self.spec.run_id, task))
            if not kept:
                seat.start_keeper(folder, 1)
            claimed.append((folder, stack))
        for folder, stack in claimed:
            lines = wait_for("a keeper", lambda folder=folder: seat.attach(folder))
            stack.callback(lines.close)
            self._seats[folder.name] = stack, lines
        return [folder.name for folder, _ in claimed]

    def call(self, *names: str) -> None:
        """Tells these seats where the coordinator is: their compute processes come, and want to join."""
        for name in names:
            self._called.add(name)
            self._tell(self._seats[name][1])

    def drop_seat(self, name: str) -> None:
        """The agent of a seat dies; its keeper does not."""
        self._called.discard(name)
        stack, _ = self._seats.pop(name)
        stack.close()

    def notice(self, name: str, why: str = "spot: terminate") -> None:
        """The agent of a seat is told that its node will be taken away."""
        self._seats[name][1].send({"kind": "notice", "why": why})

    def _tell(self, lines: Lines) -> None:
        address, token = self._where
        lines.send({"kind": "attach", "coordinator": address, "token": token})

    # ---------------------------------------------------------------------------------------------------- looking on

    def ask(self, question: Any) -> Any:
        """The answer of the coordinator."""
        return asyncio.run_coroutine_threadsafe(question, self._loop).result(LIMIT_S)

    def look(self) -> list[dict[str, Any]]:
        """All news so far."""
        news, self.error, _ = self.ask(self.coordinator.news())
        self.news += news
        return self.news

    def step(self) -> int:
        """The last committed step that there is news of."""
        return max((row["step"] for row in self.look() if row["event"] == "step"), default=0)

    def members(self) -> list[str]:
        """Seats of the group."""
        state = self.ask(self.coordinator.state())
        return [name for name in state["members"] if state["seats"].get(name) == "in"]

    def wait_step(self, step: int) -> None:
        """Waits until a step is committed."""
        wait_for(f"step {step}, after {self.step()}", lambda: self.step() >= step or self._check())

    def wait_members(self, count: int) -> None:
        """Waits until so many train together."""
        wait_for(f"{count} members", lambda: len(self.members()) == count or self._check())

    def wait_end(self) -> None:
        """Waits until the run is done and all processes are gone."""
        wait_for("the end", lambda: self.ask(self.coordinator.ended()) or self._check())
        wait_for("the processes' end", lambda: not self.processes("forge-compute"))
        self.look()

    def _check(self) -> bool:
        self.look()
        if self.error:
            raise self.error
        return False

    def folders(self) -> list[Path]:
        """The seats' folders."""
        return sorted(seat.folder_of_run(self.spec.run_id).iterdir())

    def processes(self, kind: str, name: str = "") -> list[psutil.Process]:
        """Keepers (`forge-seat`) or compute processes (`forge-compute`), of one seat if its number is given."""
        return processes(kind, self.spec.run_id, name)

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> int:
        """Sends a signal to a seat's compute process; returns its pid."""
        (process,) = self.processes("forge-compute", name)
        os.kill(process.pid, signal_number)
        return process.pid

    def flip(self, name: str) -> None:
        """Flips a bit in the state of a seat's compute process: in a step counter of its optimizer.

        Those of the norms, vectors of one size, lie at equal distances in the flat state, all of the same value: that
        finds them in its memory.
        """
        pid = self.kill(name, signal.SIGSTOP)
        found: list[tuple[int, int]] = []
        try:
            with open(f"/proc/{pid}/maps") as table, open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                for line in table:
                    words = line.split()
                    begin, end = (int(word, 16) for word in words[0].split("-"))
                    if words[1].startswith("rw") and (len(words) == 5 or words[5] == "[heap]"):
                        memory.seek(begin)
                        found += [(step, begin + at) for step, at in self._counters(memory.read(end - begin))]
                newest = max(step for step, _ in found)  # older ones are in memory that was given back
                for place in (place + 2 for step, place in found if step == newest):
                    memory.seek(place)
                    (value,) = memory.read(1)
                    memory.seek(place)
                    memory.write(bytes([value ^ 0x10]))  # not the last bit, which the next steps would round away
        finally:
            os.kill(pid, signal.SIGCONT)

    def _counters(self, content: bytes) -> list[tuple[int, int]]:
        size = self.spec.model.d_model
        period = 16 + 2 * size
        words = np.frombuffer(content, dtype=np.float32, count=len(content) // 4)
        if len(words) <= 4 * period + 1:
            return []
        first = np.nan_to_num(words[: -4 * period - 1])
        like = (first >= 1) & (first <= self.spec.config.steps) & (first % 1 == 0)
        for row in range(5):
            like &= words[row * period :][: len(first)] == first
            like &= words[row * period + 1 :][: len(first)] == 0
        return [(int(words[at]), 4 * int(at)) for at in np.flatnonzero(like)]

    def weights(self) -> str:
        """SHA-256 of the newest checkpoint's weights and optimizer state."""
        newest = Checkpoints(self.spec.workspace, self.spec.run_id).newest()
        digests = [newest.entry(name).sha256 for name in (WEIGHTS, OPTIMIZER)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The published records of a kind."""
        return [row for row in Events.read(self.spec.workspace.storage, self.spec.run_id) if row["event"] == kind]


def processes(kind: str, run_id: str, name: str = "") -> list[psutil.Process]:
    """Keepers (`forge-seat`) or compute processes (`forge-compute`) of a run, of one seat if its number is given."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or []).split()
        if words[:2] == [kind, run_id] and (not name or words[2].rpartition("/")[2] == name):
            found.append(process)
    return found
