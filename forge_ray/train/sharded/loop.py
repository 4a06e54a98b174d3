"""The loop of a sharded group: from the newest state that is anywhere, step by step, until done, resized or broken.

Owns what happens between steps: copies in peers' memory, checkpoints in pieces, what the guardian decides. A group that
breaks raises `GroupLost`; then its processes end and others take their places, with the same folders in memory. Who is
in the next group is not decided here.

What only one worker can see (the clock, a message, a thread that has ended) reaches all of them as a vote that is
summed with the gradients, so that they do the same things after the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from forge_ray.artifact import Artifact
from forge_ray.data.loader import SlotLoader
from forge_ray.errors import ArtifactError, ForgeError, StorageError
from forge_ray.telemetry import say
from forge_ray.train.elastic.group import Group, GroupLost
from forge_ray.train.guardian import Guardian, Verdict, checkpoint_before
from forge_ray.train.loop import StepRecord
from forge_ray.train.optimizer import rate_frac
from forge_ray.train.saving.checkpoint import STATE, Checkpoints
from forge_ray.train.saving.pieces import Pieces
from forge_ray.train.saving.saver import commit_pieces, save_piece
from forge_ray.train.sharded import buddy
from forge_ray.train.sharded.buddy import Buddy, in_background
from forge_ray.train.sharded.worker import ShardedWorker, form
from forge_ray.train.spec import RunSpec

COPY_FRAC = 0.01  # of the time goes into copies in memory, at most
_BUSY, _WRITING, _WISHES, _COPY_DUE, _SAVE_DUE, _NUM_VOTES = range(6)


class Watch(Protocol):
    """What a group tells the process that it runs in, and asks it."""

    def wishes(self) -> bool:
        """Whether this worker has been told of another group to form at the next boundary."""

    def progress(self, phase: str) -> None:
        """What this worker does from now on."""

    def on_formed(self, step: int, tier: str) -> None:
        """The group stands, and goes on after `step` finished steps with a state from `memory`, `store` or `seed`."""

    def on_step(self, record: StepRecord) -> None:
        """A step is committed, on every worker."""

    def on_verdict(self, verdict: Verdict) -> None:
        """The guardian does not let a step pass, on every worker."""

    def on_saved(self, step: int, stall_s: float, write_s: float, size_bytes: int) -> None:
        """A checkpoint stands in the store. On rank 0 only."""

    def on_not_saved(self, step: int, error: ForgeError | None) -> None:
        """A checkpoint does not; the store did not take this worker's part, or that of others. Training goes on."""


@dataclass(frozen=True)
class Place:
    """A member's place in a group.

    Args:
        store: A torch store that only this group uses.
        generation: Of the group; grows.
        memory: A folder in memory of this place; whoever takes the place next has the same.
    """

    store: Any
    rank: int
    size: int
    generation: int
    device: torch.device
    memory: Path
    timeout_s: float


def run(spec: RunSpec, place: Place, watch: Watch, extra: dict[str, Any], *, copy_frac: float = COPY_FRAC) -> bool:
    """Trains as a member of one group.

    Args:
        extra: What checkpoints say beside the state, such as the class of the host.

    Returns:
        Whether the run is done. If not, all members wished for another group, and their memory holds this very step.

    Raises:
        GroupLost: A member is gone. This process should end: threads and connections of the group may be stuck.
        RuntimeError: This process cannot compute a step. It should end too, and with it the group.
        TrainError: The guardian stops the run.
    """
    loader = SlotLoader.of(spec.config, spec.workspace.get(spec.shards_ref))
    try:
        group = form(place.store, place.rank, place.size, place.device, place.timeout_s)
        done = _Run(spec, place, watch, extra, loader, group, copy_frac).fit()
        dist.destroy_process_group()
        return done
    except RuntimeError as error:  # what torch raises, from wherever in a step it finds out
        if not tells_of_loss(error):
            raise
        raise GroupLost(str(error).split("\n")[0]) from error
    finally:
        loader.reader.close()


# Of gloo, NCCL and torch's stores. gloo's errors are plain RuntimeErrors, most of them with the path of its source.
_OF_LOSS = ("gloo", "nccl", "pair closure", "connect", "socket", "broken pipe", "timeout", "timed out", "peer", "store")


def tells_of_loss(error: RuntimeError) -> bool:
    """Whether an error says that a member is gone, and not that this process computes something wrong or too large.

    A worker that ends with its group is forked again for as long as it takes; one that dies of its own error is
    counted, and the run ends with that error when they die again and again without a step. The words are broad: in
    doubt it is a loss. A loss in other words costs a counted death, which the next step forgets.
    """
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, (NotImplementedError, RecursionError, torch.OutOfMemoryError)):
        return False
    text = str(error).lower()
    return any(words in text for words in _OF_LOSS)


class _Run:
    def __init__(
        self,
        spec: RunSpec,
        place: Place,
        watch: Watch,
        extra: dict[str, Any],
        loader: SlotLoader,
        group: Group,
        copy_frac: float,
    ) -> None:
        self._began_s = time.monotonic()
        self._spec, self._place, self._watch, self._group, self._copy_frac = spec, place, watch, group, copy_frac
        self._config = spec.config
        bf16 = spec.precision == "bf16"
        self._worker = ShardedWorker(
            spec.config, spec.model, loader, bf16=bf16, device=place.device, num_votes=_NUM_VOTES
        )
        index = loader.order.index
        self._extra = {
            **extra,
            "vocab_size": index.vocab_size,
            "end_token": index.end_token,
            "epochs": loader.epochs(spec.config.steps),
            "epochs_by_source": loader.epochs_by_source(spec.config.steps),
        }
        self._guardian = Guardian(spec.config.guard)
        self._checkpoints = Checkpoints(spec.workspace, spec.run_id)
        place.memory.mkdir(parents=True, exist_ok=True)
        self._step, tier = self._resume()
        self._buddy = Buddy(place.memory, spec.run_id, place.generation)
        self._pack_s, self._copied_s, self._saved_s = 0.0, -float("inf"), time.monotonic()
        self._writing: _Writing | None = None
        self._committing: tuple[_Writing, int, Future[Artifact]] | None = None  # on rank 0
        self._saved_step = self._step if tier == "store" else -1
        watch.on_formed(self._step, tier)

    def fit(self) -> bool:
        """Up to `config.steps`, or until everybody wishes for another group."""
        stall_s = time.monotonic() - self._began_s
        while self._step < self._config.steps:
            votes = self._take_step(stall_s)
            stall_s = self._between(votes)
            if votes[_WISHES] == self._place.size:
                self._settle()
                return False
        self._watch.progress("saving")
        if not self._is_saved():
            self._settle()
            self._begin_writing()
            self._end_writing()
            if not self._is_saved():
                raise StorageError(
                    "the last checkpoint cannot be stored",
                    got=f"step {self._step} is in the memory of the workers only",
                    do="see that the store answers and has room, and run the same command again",
                )
        return True

    # ----------------------------------------------------------------------------------------------- where to begin

    def _resume(self) -> tuple[int, str]:
        """Takes the newest state that is whole and verifies; its step, and where it was."""
        found = buddy.newest(self._place.memory, self._spec.run_id, self._group)
        for step in reversed(self._stored_steps()):
            if found and found.step >= step:
                break
            state = self._load(step)
            if state is not None:
                self._take(state)
                return step, "store"
        if found:
            self._worker.load_rows(found)
            self._take(found.extra)
            return found.step, "memory"
        self._worker.initialise()
        return 0, "seed"

    def _go_back(self, verdict: Verdict) -> None:
        """Takes an earlier checkpoint, and leaves out batches."""
        self._end_writing()
        steps = self._stored_steps()
        judged, state = self._guardian.state(), None
        while state is None:
            step = checkpoint_before(verdict, steps)
            state = self._load(step)
            steps.remove(step)
        if self._place.rank == 0:
            self._checkpoints.drop_after(step)
        self._take(state)
        earlier = self._guardian.state()
        self._guardian.load(judged)
        self._guardian.roll_back(verdict, step, earlier)
        self._step = self._saved_step = step
        self._copied_s = -float("inf")  # what memory holds is not to be gone back to

    def _stored_steps(self) -> list[int]:
        return self._group.gather_json(self._checkpoints.steps() if self._place.rank == 0 else None)[0]

    def _load(self, step: int) -> dict[str, Any] | None:
        """Takes over the tensors of a checkpoint and returns the rest; none if any worker cannot."""
        state, wrong = {}, None
        try:
            found = self._checkpoints.get(step)
            self._worker.load_rows(Pieces(found))
            state = found.read_json(STATE)
        except ArtifactError as error:
            wrong = str(error)
        wrongs = [each for each in self._group.gather_json(wrong) if each]
        if wrongs and self._place.rank == 0:
            say(f"  checkpoint {step} is passed over, the next older one is tried: {wrongs[0]}")
        return None if wrongs else state

    def _take(self, state: dict[str, Any]) -> None:
        self._guardian.load(state.get("guardian") or Guardian(self._config.guard).state())

    def _state(self) -> dict[str, Any]:
        return {**self._extra, "step": self._step, "guardian": self._guardian.state()}

    # --------------------------------------------------------------------------------------------------- one step

    def _take_step(self, stall_s: float) -> list[float]:
        """One step, applied or not; returns the votes of all."""
        began_s, worker, config = time.monotonic(), self._worker, self._config
        self._watch.progress("computing")
        position = self._guardian.position(self._step)
        loss, norm, votes = worker.compute(position, self._votes(), self._watch.progress)
        verdict = self._guardian.judge(self._step, loss, norm)
        rate = rate_frac(self._step, config)
        if verdict.action != "apply":
            worker.discard()
            self._watch.on_verdict(verdict)
            if verdict.action == "rollback":
                self._go_back(verdict)
            else:
                self._guardian.commit(verdict)
            return votes
        worker.commit(self._step, norm)
        self._step += 1
        self._guardian.commit(verdict)
        record = StepRecord(
            step=self._step,
            loss=loss,
            grad_norm=norm,
            rate_frac=rate,
            tokens=config.slots * config.micro_batch * config.seq_len,
            wall_s=time.monotonic() - began_s + stall_s,
            world_size=self._place.size,
            data_s=worker.data_s,
            reduce_s=worker.waited_s,
            stall_s=stall_s,
            recomputed_s=0.0,
            generation=self._place.generation,
            position=position,
        )
        self._watch.on_step(record)
        return votes

    def _votes(self) -> Sequence[float]:
        votes, now_s, first = [0.0] * _NUM_VOTES, time.monotonic(), self._place.rank == 0
        writing = self._writing is not None and not self._writing.said.done()
        # A copy that is being written to the store must not be overwritten by the one after the next.
        votes[_BUSY] = self._buddy.busy() or (writing and self._writing.number < self._buddy.number)
        votes[_WRITING] = writing or (self._committing is not None and not self._committing[2].done())
        votes[_WISHES] = self._watch.wishes()
        votes[_COPY_DUE] = first and now_s - self._copied_s >= self._pack_s / self._copy_frac
        votes[_SAVE_DUE] = first and now_s - self._saved_s >= self._config.checkpoint_every_s
        return votes

    # -------------------------------------------------------------------------------------------- between two steps

    def _between(self, votes: list[float]) -> float:
        """What all have voted for; returns the seconds that it took."""
        began_s = time.monotonic()
        save = bool(votes[_SAVE_DUE]) and not votes[_WRITING] and self._writing is None
        if not votes[_WRITING]:
            self._tell_saved()
            if self._writing is not None:
                self._gather()
        if not votes[_BUSY] and (votes[_COPY_DUE] or save):
            self._copy()
            if save:
                self._begin_writing()
        return time.monotonic() - began_s

    def _copy(self) -> None:
        began_s = time.monotonic()
        weights, optimizer = self._worker.state_rows()
        self._buddy.begin(self._step, {**weights, **optimizer}, self._state())
        self._copied_s = time.monotonic()
        self._pack_s = self._copied_s - began_s

    def _settle(self) -> None:
        """Ends what is under way, and brings the state of this step into memory, on all workers."""
        self._end_writing()
        self._buddy.wait()
        self._group.gather_json("settled")
        self._copy()
        self._buddy.wait()
        self._group.gather_json("copied")

    def _end_writing(self) -> None:
        if self._writing is not None:
            self._gather()
        self._tell_saved()

    def _begin_writing(self) -> None:
        """Writes the last copy's rows to the store, in the background."""
        rows, begun_s = self._buddy.own, time.time()
        weights = {name: part for name, part in rows.items() if "/" not in name}
        optimizer = {name: part for name, part in rows.items() if "/" in name}
        place, checkpoints = self._place, self._checkpoints
        said = in_background(lambda: save_piece(checkpoints, place.rank, place.size, weights, optimizer), "forge-save")
        self._saved_s = time.monotonic()
        self._writing = _Writing(self._step, self._buddy.number, self._state(), begun_s, self._pack_s, said)

    def _gather(self) -> None:
        """When all pieces are written, rank 0 makes them a checkpoint, in the background."""
        writing, said, self._writing = self._writing, None, None
        try:
            said = writing.said.result()
        except ForgeError as error:
            self._watch.on_not_saved(writing.step, error)
        pieces = self._group.gather_json(said)
        if self._place.rank:
            return
        if None in pieces:
            if said:
                self._watch.on_not_saved(writing.step, None)
            return
        size_bytes = sum(row["entry"]["size_bytes"] for piece in pieces for row in piece)
        keep, checkpoints = self._config.checkpoints_kept, self._checkpoints
        committed = in_background(
            lambda: commit_pieces(checkpoints, writing.step, pieces, writing.state, writing.begun_s, keep), "forge-save"
        )
        self._committing = writing, size_bytes, committed

    def _is_saved(self) -> bool:
        """Whether this step is in the store."""
        return self._group.gather_json(self._saved_step)[0] == self._step

    def _tell_saved(self) -> None:
        """Waits for rank 0's commit, if it has one under way, and tells of it."""
        if self._committing is None:
            return
        (writing, size_bytes, committed), self._committing = self._committing, None
        try:
            committed.result()
        except ForgeError as error:
            self._watch.on_not_saved(writing.step, error)
            return
        self._saved_step = writing.step
        self._watch.on_saved(writing.step, writing.stall_s, time.time() - writing.begun_s, size_bytes)


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written.

    Args:
        number: Of the copy in memory that it is written from.
        said: What this worker's piece is.
    """

    step: int
    number: int
    state: dict[str, Any]
    begun_s: float
    stall_s: float
    said: Future[list[dict[str, Any]]]
