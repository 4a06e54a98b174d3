"""A worker's side of membership: forming the groups that the coordinator names, and making their members alike.

After each change the members tell each other at which step they are and which slots they hold of it. Whoever is behind,
or new, takes the state from the others, each of whom sends a part; the slots that nobody holds are shared out. Where
nobody has a state, one loads the newest checkpoint, or begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from forge_ray.train import guardian
from forge_ray.train.elastic.group import Group, GroupLost, store_client
from forge_ray.train.elastic.lines import Lines, Message
from forge_ray.train.elastic.slots import Assignment, assign
from forge_ray.train.guardian import Verdict
from forge_ray.train.loop import AGREED, Worker

_BEAT_S = 1.0
_PIECE = 1 << 22  # fp32 values that a source sends at a time, to all takers together: 16 MiB
STORE_S = 20.0
_NOTHING = [-1, -1]


class Stopped(Exception):
    """This worker is told to end: the run is over, or its node is to be taken away."""


class Odd(Exception):
    """This worker's state differs from that of the others: it cannot be trusted."""


class Control:
    """The connection to the coordinator, by way of the keeper, with a thread that listens and one that beats.

    Args:
        lines: The worker's end.
        store: `host:port` where others can meet if this worker is rank 0.

    `host_class` is what the bits of its results depend on.
    """

    host_class = ""

    def __init__(self, lines: Lines, store: str) -> None:
        self._lines, self._store = lines, store
        self._changed = threading.Condition()
        self._form: Message | None = None
        self._status: Message | None = None
        self.rejoin = False
        self.stopping = False
        self.on_change: Callable[[], None] = lambda: None
        self._phase, self._since_s, self._slowest_s = "idle", time.monotonic(), 0.0
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name="forge-control", daemon=True).start()

    def newest(self, after: int) -> Message | None:
        """The newest group to form, if it is newer than this generation."""
        form = self._form
        return form if form and form["generation"] > after else None

    def urgent(self, generation: int) -> bool:
        """Whether this generation cannot go on."""
        form = self.newest(generation)
        return bool(form and not form["voluntary"]) or self.rejoin

    def wait(self, after: int) -> Message:
        """Waits for a group to form.

        Raises:
            Stopped: The run is over instead.
        """
        with self._changed:
            while not (form := self.newest(after)):
                if self.stopping:
                    raise Stopped
                self._changed.wait()
            self.rejoin = False
            return form

    def status(self, state: str, generation: int, step: int, **more: Any) -> None:
        """Tells the coordinator what this worker is."""
        self._status = {
            "kind": "status",
            "state": state,
            "generation": generation,
            "step": step,
            "store": self._store,
            "host_class": self.host_class,
            **more,
        }
        self._lines.send(self._status)

    def event(self, record: Message) -> None:
        """Tells the coordinator of something that is also on record."""
        self._lines.send({"kind": "event", "record": record})

    def progress(self, phase: str) -> None:
        """What the worker does from now on."""
        now_s = time.monotonic()
        if self._phase == "computing":
            self._slowest_s = max(self._slowest_s, now_s - self._since_s)
        self._phase, self._since_s = phase, now_s

    def _listen(self) -> None:
        while (messages := self._lines.receive()) is not None:
            for message in messages:
                with self._changed:
                    if message["kind"] == "form":
                        self._form = message
                    elif message["kind"] == "rejoin":
                        self.rejoin = True
                    elif message["kind"] == "stop":
                        self.stopping = True
                    elif message["kind"] == "introduce" and self._status:
                        self._lines.send(self._status)
                    self._changed.notify_all()
            self.on_change()

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(_BEAT_S):
            age_s = time.monotonic() - self._since_s
            beat = {"phase": self._phase, "age_s": age_s, "slot_s": self._slowest_s}
            if not self._lines.send({"kind": "beat", **beat}):
                return


class Team:
    """The groups that a worker is in, one after the other.

    Args:
        control: Names them.
        address: Of this machine, for the other members.
        device: Where the state lives.
        resume: Gives a worker the newest checkpoint's state, or a new run's; or that which a verdict wants.
        on_formed: Called when a group stands, with what there is to tell of it.
        distrust: Takes back all checkpoints after a step, in the store and on this worker's disk.
        stored: The step of the newest checkpoint that this worker can read, on its own disk or in the store.
    """

    def __init__(
        self,
        control: Control,
        address: str,
        device: torch.device,
        resume: Callable[[Worker, Verdict | None], None],
        on_formed: Callable[[Worker, Message], None],
        distrust: Callable[[int], None],
        stored: Callable[[], int],
    ) -> None:
        self.group, self.generation, self.rank = Group.alone(device), 0, 0
        self._control, self._address, self._device = control, address, device
        self._resume, self._on_formed, self._distrust, self._stored = resume, on_formed, distrust, stored
        self._trusted_step = 0
        self._formed = self._due = False
        self._members: list[str] = []
        self._step = -1
        self._lost_s: float | None = None
        self._assignment: Assignment | None = None
        control.on_change = lambda: self.group.wake()

    def settle(self, worker: Worker) -> Assignment:
        """Forms the next group if one is due, with the same state on all members; says who computes what now.

        Raises:
            GroupLost: A member is gone.
            Stopped: There is nothing more to do for this worker.
        """
        if self._control.stopping:
            raise Stopped
        if self._formed and not self._due and not self._control.urgent(self.generation):
            fresh = not worker.sums.held()
            if fresh and self._is_digest_due(worker):
                self.compare(worker)
            if not fresh or self._assignment is None:
                raise RuntimeError("a step was left half done without a change of the group")
            return self._assignment
        return self._form(worker)

    def wishes(self) -> bool:
        """Whether this worker has been told of a group to form at the next boundary."""
        return self._control.newest(self.generation) is not None

    def agreed(self) -> None:
        """All workers have been told of it."""
        self._due = True

    def lost(self, error: GroupLost) -> None:
        """The group is gone: what is held of the step under way stays."""
        self._lost_s = self._lost_s or time.monotonic()
        self.group.leave()
        self._control.status("lost", self.generation, self._step, members=self._members, why=str(error))
        self._formed = False

    def progress(self, phase: str) -> None:
        """What this worker does from now on."""
        self._control.progress(phase)

    @property
    def stands(self) -> bool:
        """Whether there is a group, as far as this worker has heard."""
        return self._formed

    @property
    def trusted_step(self) -> int:
        """Up to here the state was compared with that of others, or there was nobody to compare it with."""
        return self._trusted_step

    def go_back(self, worker: Worker, verdict: Verdict) -> None:
        """Takes an earlier checkpoint on all workers, and leaves out batches."""
        judged = worker.guardian.state()
        if self.rank == 0:
            self._resume(worker, verdict)
        self.progress("waiting")
        self._make_alike(worker, sources=[0])
        self._trusted_step = min(self._trusted_step, worker.step)
        earlier = worker.guardian.state()
        worker.guardian.load(judged)
        worker.guardian.roll_back(verdict, worker.step, earlier)
        self._distrust(worker.step)

    def compare(self, worker: Worker, sources: Sequence[int] = ()) -> None:
        """Compares the members' states bit by bit, by digest.

        If one differs, what it computed since the last comparison is in everybody's weights: it ends, and the others go
        back to a checkpoint from before that.

        Args:
            sources: Those from whom the others have just taken their state. Where they agree, what is stored is as
                good as before: a taker that differs has computed nothing of it.

        Raises:
            Odd: This worker's differs from that of most, or there is no telling which is right.
            GroupLost: Another's does.
        """
        if self.group.size == 1:
            self._trusted_step = worker.step
            return
        mine = guardian.digest(worker.state.buffer)
        self.progress("waiting")
        digests = self.group.gather_json(mine)
        odd = guardian.odd_ones(digests)
        if not odd:
            self._trusted_step = worker.step
            return
        if len({digests[rank] for rank in sources}) != 1:
            self._distrust(self._trusted_step)
        if self.rank in odd:
            raise Odd(f"step {worker.step}: digest {digests[self.rank]:x} among {[f'{d:x}' for d in digests]}")
        worker.step = -1
        worker.sums.clear()
        raise GroupLost("the state of a member was not that of the others")

    def _is_digest_due(self, worker: Worker) -> bool:
        return worker.step > 0 and worker.step % worker.config.digest_every_steps == 0

    def _form(self, worker: Worker) -> Assignment:
        began_s = time.monotonic()
        if self._control.rejoin or (not self._formed and self._lost_s is None):
            self.group.leave()
            self._control.status("ready", self.generation, worker.step)
        self.progress("waiting")
        form = self._control.wait(self.generation)
        voluntary = self._formed
        self._formed = self._due = False
        self.group.leave()
        if form["rank"] < 0:
            self._control.status("left", form["generation"], worker.step)
            raise Stopped
        self.generation, self.rank = form["generation"], form["rank"]
        self._members, self._step = form["members"], worker.step

        def interrupted() -> bool:
            return self._control.urgent(form["generation"])

        store = store_client(form["store"], self.generation, STORE_S, interrupted)
        self.group = Group.form(store, self.rank, form["size"], self._device, self._address, interrupted)
        formed_s = time.monotonic()
        views = self._agree(worker)
        worker.sums.forget_scalar(AGREED)  # votes for a group that is not formed any more
        self._formed, self._step = True, worker.step
        self._control.status("in", self.generation, worker.step, members=self._members)
        now_s = time.monotonic()
        since_s = began_s if voluntary or self._lost_s is None else self._lost_s
        worker.clock.stall_s += now_s - since_s
        self._lost_s = None
        self._assignment = assign(views, worker.config.slots, exact=worker.sums.exact)
        missing = sum(map(len, self._assignment.slots))
        about = {key: form[key] for key in ("generation", "cause", "lost", "joined")}
        about |= {"step": worker.step, "world_size": form["size"], "stall_s": now_s - since_s}
        about |= {"transfer_s": now_s - formed_s, "missing_slots": missing}
        self._on_formed(worker, about)
        assignment, self._assignment = self._assignment, self._fresh(worker)
        return assignment

    def _fresh(self, worker: Worker) -> Assignment:
        return assign([()] * self.group.size, worker.config.slots, exact=worker.sums.exact)

    def _agree(self, worker: Worker) -> list[list[tuple[int, int]]]:
        """The same state on all members; what each holds of the step that follows."""
        progress = self.group.gather_json(_progress(worker))
        resuming = max(progress) == _NOTHING
        if resuming:
            stored = self.group.gather_json(self._stored())
            if self.rank == stored.index(max(stored)):
                self._resume(worker, None)
            self.progress("waiting")
            progress = self.group.gather_json(_progress(worker))
        newest = max(progress)
        if min(progress) < newest:
            sources = [rank for rank, own in enumerate(progress) if own == newest]
            self._make_alike(worker, sources)
            self.compare(worker, sources)
        if resuming:
            self._trusted_step = worker.step  # every byte of it was verified
        held = self.group.gather_json(worker.sums.held())
        return [[tuple(node) for node in nodes] for nodes in held]

    def _make_alike(self, worker: Worker, sources: list[int]) -> None:
        """Gives everybody the state that the sources have; each of them sends an equal part to each who has not.

        Cost: A source sends its part once to each taker. Memory: a taker holds the state twice, a source 16 MiB more.
        """
        group, buffer = self.group, worker.state.buffer
        extra = group.gather_json(worker.extra() if self.rank == sources[0] else None)[sources[0]]
        takers = [rank for rank in range(group.size) if rank not in sources]
        if not takers:
            return
        share = -(-buffer.numel() // len(sources))
        begins = {rank: turn * share for turn, rank in enumerate(sources)}
        taking = self.rank in takers
        # Not into the buffer itself: the group may be lost half way, and what is here is better than half of it.
        fresh = torch.empty_like(buffer) if taking else buffer
        step = max(1, _PIECE // len(takers))
        for at in range(0, share, step):
            length = min(step, share - at)
            parts = {rank: fresh[begin + at : begin + at + length] for rank, begin in begins.items()}
            mine = parts.get(self.rank, buffer[:0])
            counts = [len(parts[rank]) if taking and rank in parts else 0 for rank in range(group.size)]
            out = buffer.new_empty(sum(counts))  # a call that a lost group leaves behind may still write into it
            group.all_to_all(
                out,
                mine.repeat(len(takers)) if len(takers) > 1 else mine,
                counts,
                [len(mine) if rank in takers else 0 for rank in range(group.size)],
            )
            if taking:
                for part, got in zip(parts.values(), out.split([len(part) for part in parts.values()])):
                    part.copy_(got)
        if taking:
            buffer.copy_(fresh)
            worker.take(extra)


def _progress(worker: Worker) -> list[int]:
    """How far a worker is: the batch it reads next, which alone tells that after a rollback, and its step."""
    return _NOTHING if worker.step < 0 else [worker.position, worker.step]
