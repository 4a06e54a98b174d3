"""The training loop: one step is forward and backward over the worker's slots, one sum over workers, one update.

Owns the order of things within a step. Knows nothing of Ray, of processes or of who is in the group: a `Team` says
with whom a step is computed, and a step that the group's loss interrupts is taken up again where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from forge_ray.config import PretrainConfig
from forge_ray.data.loader import SlotLoader
from forge_ray.model.transformer import Transformer, document_mask
from forge_ray.train import compiled, fitting
from forge_ray.train.elastic import slots
from forge_ray.train.elastic.group import Group, GroupLost
from forge_ray.train.elastic.slots import Assignment, SlotSums
from forge_ray.train.fitting import Fit
from forge_ray.train.guardian import Guardian, Verdict
from forge_ray.train.loss import objective
from forge_ray.train.optimizer import Optimizer, rate_frac
from forge_ray.train.state import FlatState

LOSS, AGREED, NUM_SCALARS = 0, 1, 2  # scalars that are summed with the gradients


@dataclass(frozen=True)
class StepRecord:
    """One finished step. Loss in nats per token; tokens of the global batch; rate as a share of the peak.

    `wall_s` is the whole step on this worker. Parts of it: `data_s` getting samples, `reduce_s` the sum over workers
    with the wait for the slowest, `stall_s` forming groups, `recomputed_s` slots of workers that were lost.
    """

    step: int
    loss: float
    grad_norm: float
    rate_frac: float
    tokens: int
    wall_s: float
    world_size: int
    data_s: float
    reduce_s: float
    stall_s: float
    recomputed_s: float
    generation: int
    position: int

    def as_dict(self) -> dict[str, float | int]:
        """For an event."""
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass
class Clock:
    """Seconds of the step under way, by what they went to."""

    began_s: float = field(default_factory=time.monotonic)
    data_s: float = 0.0
    reduce_s: float = 0.0
    stall_s: float = 0.0
    recomputed_s: float = 0.0
    lost: bool = False


@dataclass
class Worker:
    """What a worker holds between steps: everything that a checkpoint holds, and what it needs to compute.

    `step` counts finished steps; it is negative while there is no state yet.
    """

    config: PretrainConfig
    model: Transformer
    optimizer: Optimizer
    loader: SlotLoader
    end_token: int
    bf16: bool
    guardian: Guardian
    step: int = -1
    compiled: bool = False
    fit: Fit = None  # type: ignore[assignment]  # the whole slot at once

    def __post_init__(self) -> None:
        self.fit = self.fit or next(fitting.ways(self.config))
        self.model.recompute = self.fit.recompute
        if self.compiled:
            compiled.apply(self.model)
        self.state = FlatState(self.model, self.optimizer)
        self.sums = SlotSums(self.model, NUM_SCALARS, exact=self.config.reduction == "exact")
        self.clock = Clock()

    @property
    def position(self) -> int:
        """Which batch of the training order the step under way reads."""
        return self.guardian.position(self.step)

    def extra(self) -> dict[str, Any]:
        """What belongs to the state beside its tensors."""
        return {"step": self.step, "guardian": self.guardian.state()}

    def take(self, extra: dict[str, Any]) -> None:
        """Takes over `extra` of another worker or a checkpoint, whose tensors are here already."""
        self.step = extra["step"]
        self.guardian.load(extra["guardian"])
        self.sums.clear()


class Team(Protocol):
    """With whom a worker computes."""

    group: Group
    generation: int
    rank: int

    def settle(self, worker: Worker) -> Assignment:
        """Forms the next group if one is due, with the same state on all members; says who computes what now."""

    def wishes(self) -> bool:
        """Whether this worker has been told of a group to form at the next boundary."""

    def agreed(self) -> None:
        """All workers have been told of it."""

    def lost(self, error: GroupLost) -> None:
        """The group is gone."""

    def progress(self, phase: str) -> None:
        """What this worker does from now on."""

    def go_back(self, worker: Worker, verdict: Verdict) -> None:
        """Takes an earlier checkpoint on all workers, and leaves out batches."""


class Alone:
    """The team of a worker that trains by itself and keeps no checkpoints."""

    def __init__(self) -> None:
        self.group, self.generation, self.rank = Group.alone(), 0, 0

    def settle(self, worker: Worker) -> Assignment:
        """All slots are its own."""
        return slots.assign([()], worker.config.slots, exact=worker.sums.exact)

    def wishes(self) -> bool:
        """Nobody wants to join."""
        return False

    def agreed(self) -> None:
        """Nothing was wished for."""

    def lost(self, error: GroupLost) -> None:
        """Cannot happen: there is nobody to lose."""
        raise error

    def progress(self, phase: str) -> None:
        """Nobody looks."""

    def go_back(self, worker: Worker, verdict: Verdict) -> None:
        """There is nothing to go back to.

        Raises:
            TrainError: Always.
        """
        raise verdict.error()


def fit(
    worker: Worker, team: Team, on_step: Callable[[StepRecord], None], on_verdict: Callable[[Verdict], None]
) -> None:
    """Trains up to `config.steps`.

    Args:
        worker: Changed in place.
        team: Says with whom.
        on_step: Called on every worker after each step.
        on_verdict: Called on every worker when the guardian does not let a step pass.

    Raises:
        TrainError: The guardian stops the run.
    """
    worker.clock = Clock()
    while worker.step < worker.config.steps:
        try:
            assignment = team.settle(worker)
            if worker.step >= worker.config.steps:  # peers were ahead
                return
            verdict, record = step(worker, team, assignment)
            if verdict.reason:
                on_verdict(verdict)
            if verdict.action == "apply":
                on_step(record)
            elif verdict.action == "rollback":
                team.go_back(worker, verdict)
            else:
                worker.guardian.commit(verdict)
            worker.clock = Clock()
        except GroupLost as error:
            worker.clock.lost = True
            team.lost(error)


def step(worker: Worker, team: Team, assignment: Assignment) -> tuple[Verdict, StepRecord]:
    """One step: gradients of the missing slots, their sum over workers, the update; it commits on all or on none."""
    config, sums, clock, rank = worker.config, worker.sums, worker.clock, team.rank
    sums.discard(assignment.dropped[rank])
    began_s = time.monotonic()
    for slot in assignment.slots[rank]:
        team.progress("data")
        asked_s = time.monotonic()
        samples = torch.from_numpy(worker.loader.slot(worker.position, slot))
        clock.data_s += time.monotonic() - asked_s
        sums.scalars[LOSS] += backward(worker, samples, lambda: team.progress("computing"))
        sums.scalars[AGREED] += float(team.wishes())
        sums.add(slot)
    computed_s = time.monotonic()
    clock.recomputed_s += (computed_s - began_s) * clock.lost
    team.progress("waiting")
    slots.reduce(sums, team.group, assignment.nodes)
    clock.reduce_s += time.monotonic() - computed_s
    team.progress("updating")
    loss, told = float(sums.scalars[LOSS]), round(float(sums.scalars[AGREED]))
    position = worker.position
    norm = sums.clip(config.grad_clip)
    verdict = worker.guardian.judge(worker.step, loss, norm)
    rate = rate_frac(worker.step, config)
    if verdict.action == "apply":
        try:
            directions = worker.optimizer.directions(team.group)
        except GroupLost:
            sums.restore()
            raise
        worker.optimizer.step(rate, directions)
        worker.step += 1
        worker.guardian.commit(verdict)
    sums.clear()
    if told == config.slots:
        team.agreed()
    tokens = config.slots * config.micro_batch * config.seq_len
    record = StepRecord(
        step=worker.step,
        loss=loss,
        grad_norm=norm,
        rate_frac=rate,
        tokens=tokens,
        wall_s=time.monotonic() - clock.began_s,
        world_size=team.group.size,
        data_s=clock.data_s,
        reduce_s=clock.reduce_s,
        stall_s=clock.stall_s,
        recomputed_s=clock.recomputed_s,
        generation=team.generation,
        position=position,
    )
    return verdict, record


def backward(worker: Worker, tokens: Tensor, progress: Callable[[], None] = lambda: None) -> float:
    """Adds a slot's share of the step's gradient; returns its share of the step's loss.

    Args:
        progress: Called before each part of it.

    Shapes: tokens (B, T + 1).
    """
    device, total = worker.sums.values.device, 0.0
    for part in tokens.split(worker.fit.at_once):
        progress()
        share = len(part) / (len(tokens) * worker.config.slots)
        total += share * float(learn(worker.model, part.to(device), worker.end_token, worker.bf16, share))
    return total


def learn(model: Transformer, tokens: Tensor, end_token: int, bf16: bool, weight: float) -> Tensor:
    """Adds `weight` times the gradient of the sequences' loss; returns that loss, without weight.

    Shapes: tokens (B, T + 1).
    """
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    hidden_BTD = backbone(model, inputs_BT, end_token, bf16)
    trained, loss = objective(model, hidden_BTD, targets_BT, torch.bfloat16 if bf16 else torch.float32)
    (trained * weight).backward()
    return loss


def backbone(model: Transformer, inputs_BT: Tensor, end_token: int, bf16: bool) -> Tensor:
    """The normalised last layer, (B, T, D), with bf16 matrix products over fp32 weights or in plain fp32."""
    with torch.autocast(inputs_BT.device.type, dtype=torch.bfloat16, enabled=bf16):
        return model.hidden(inputs_BT, document_mask(inputs_BT, end_token))
