"""What is kept of a run while it trains: its events, and its checkpoints.

Rank 0 of a group writes both, whoever that is at the time.
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections import deque
from typing import Any

import torch

from forge_ray.data.loader import SlotLoader
from forge_ray.errors import ArtifactError, ForgeError
from forge_ray.events import Events
from forge_ray.telemetry import say
from forge_ray.train import guardian
from forge_ray.train.elastic.lines import Message
from forge_ray.train.elastic.team import Control, Team
from forge_ray.train.guardian import Guardian, Verdict
from forge_ray.train.loop import StepRecord, Worker
from forge_ray.train.saving.checkpoint import OPTIMIZER, STABLE, STATE, WEIGHTS, Saved, load_tensors
from forge_ray.train.saving.saver import Saver
from forge_ray.train.spec import RunSpec

_FLUSH_S = 2.0
_KEPT_S = 10.0


class Log:
    """The events of a run, published every two seconds and told to the coordinator at once.

    All workers see every step, so whoever is rank 0 next can publish what the one before did not come to.
    """

    def __init__(self, spec: RunSpec, control: Control) -> None:
        self._control = control
        self._events = Events(spec.workspace.storage, spec.run_id)
        self._recent: deque[tuple[float, StepRecord]] = deque()
        threading.Thread(target=self._flush, name="forge-events", daemon=True).start()

    def add(self, kind: str, **fields: Any) -> None:
        """Keeps an event."""
        self._events.add(kind, **fields)
        self._control.event({"event": kind, "time_s": round(time.time(), 3), **fields})

    def formed(self, about: Message) -> None:
        """A group stands, and this worker is its rank 0."""
        self.add("form", **about)
        if about["lost"]:
            self.repeat()

    def repeat(self) -> None:
        """Keeps the last steps once more: what a rank 0 that is lost had not published."""
        for time_s, record in self._recent:
            self._events.add("step", **record.as_dict(), again=True, time_s=round(time_s, 3))

    def step(self, record: StepRecord, rank: int) -> None:
        """A step is committed."""
        now_s = time.time()
        self._recent.append((now_s, record))
        while now_s - self._recent[0][0] > _KEPT_S:
            self._recent.popleft()
        if rank == 0:
            self.add("step", **record.as_dict())

    def verdict(self, verdict: Verdict, loader: SlotLoader, rank: int) -> None:
        """The guardian has something to say of a step."""
        if rank == 0:
            samples = guardian.samples_of(loader, verdict.position)
            self.add("guard", **verdict.as_dict(), samples=samples.documents, num_samples=samples.count)

    def saved(self, tier: str, step: int, stall_s: float, write_s: float, size_bytes: int) -> None:
        """A checkpoint stands."""
        cost = {"stall_s": stall_s, "write_s": write_s, "bytes": size_bytes}
        self.add("checkpoint", step=step, tier=tier, **cost, peak_bytes=_peak_bytes())

    def not_saved(self, tier: str, step: int, error: object) -> None:
        """A checkpoint does not."""
        self.add("checkpoint_failed", step=step, tier=tier, why=str(error))

    def flush(self) -> None:
        """Publishes what there is.

        Raises:
            StorageError: The store does not take it; nothing is lost.
        """
        self._events.flush()

    def _flush(self) -> None:
        pause = threading.Event()
        while not pause.wait(_FLUSH_S):
            try:
                self._events.flush()
            except ForgeError as error:
                say(f"  events are kept for now: {error.what}")


class Record:
    """What is kept of a run whose state is replicated, and what a worker without a state begins with."""

    def __init__(self, spec: RunSpec, worker: Worker, control: Control) -> None:
        self.team: Team
        self._spec, self._worker, self._control = spec, worker, control
        self._log = Log(spec, control)
        self._saver = Saver(
            spec.workspace,
            spec.run_id,
            spec.config,
            on_saved=self._log.saved,
            on_failed=self._log.not_saved,
            before_manifest=self._log.flush,  # a kill between the two repeats steps, the other order would lose them
        )

    def resume(self, worker: Worker, verdict: Verdict | None) -> None:
        """Gives the worker the newest checkpoint's state, or a new run's; or that which a verdict wants."""
        self.team.progress("loading")
        found = self._saver.tiers.newest() if verdict is None else self._before(verdict)
        if found is None and self._spec.config.extends:
            self._extend(worker)
            return
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
            self._log.add("bits", step=worker.step, before=state["host_class"], now=self._control.host_class)

    def _extend(self, worker: Worker) -> None:
        """Gives the worker the state of the run that this one goes on from."""
        artifact = self._spec.workspace.get(self._spec.config.extends)
        worker.state.load(load_tensors(artifact, STABLE + WEIGHTS), load_tensors(artifact, STABLE + OPTIMIZER))
        worker.take({"guardian": Guardian(self._spec.config.guard).state(), **artifact.read_json(STABLE + STATE)})

    def stored(self) -> int:
        """The step of the newest checkpoint that this worker can read; -1 if there is none."""
        return max((step for step, _ in self._saver.tiers.candidates()), default=-1)

    def distrust(self, step: int) -> None:
        """Takes back the checkpoints after a step, on every worker: what they hold is not to be gone back to."""
        with contextlib.suppress(ForgeError):
            self._saver.finish()
        with contextlib.suppress(ForgeError):  # others do the same; who comes second finds nothing
            self._saver.tiers.drop_after(step)

    def on_formed(self, worker: Worker, about: Message) -> None:
        """A group stands, on every worker."""
        if self.team.rank == 0:
            self._log.formed(about)

    def on_step(self, record: StepRecord) -> None:
        """A step is committed, on every worker."""
        self._log.step(record, self.team.rank)
        if self.team.rank == 0 and (self._saver.due() or record.step == self._spec.config.stable_steps):
            trusted_step = self.team.trusted_step
            self._saver.snapshot(self._worker.step, self._worker.state, self._extra(), trusted_step=trusted_step)

    def on_verdict(self, verdict: Verdict) -> None:
        """The guardian has something to say of a step, on every worker."""
        self._log.verdict(verdict, self._worker.loader, self.team.rank)

    def finish(self) -> None:
        """Stores the last checkpoint and all events.

        Raises:
            StorageError: The last checkpoint cannot be stored.
        """
        self._log.flush()
        self.team.progress("saving")
        self._save()
        self._log.add("end", step=self._worker.step)
        self._log.flush()

    def stop(self) -> None:
        """Keeps what there is when this worker ends before the run does."""
        # Without a group, rank 0 may be gone, and nobody else keeps what the others have.
        if self._worker.step > 0 and (self.team.rank == 0 or not self.team.stands):
            try:
                if self.team.rank != 0 and self.stored() >= self._worker.step:
                    return
                self._save()
                self._log.flush()
            except ForgeError as error:
                say(f"  the last steps are not saved: {error}")

    def _save(self) -> None:
        trusted_step = self.team.trusted_step
        self._saver.snapshot(self._worker.step, self._worker.state, self._extra(), trusted_step=trusted_step, last=True)
        self._saver.finish()

    def _before(self, verdict: Verdict) -> Saved:
        """The checkpoint that a rollback goes to."""
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


def _peak_bytes() -> int:
    """The most memory that this process has held: of its GPU, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
