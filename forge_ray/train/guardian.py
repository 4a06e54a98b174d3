"""The guardian: what a step's loss and gradient norm say of the run, and which batches training leaves out.

Owns the verdict on each step, the record of skipped batches and so the data position of every step, and the digests by
which replicas are compared. Does not own the rollback itself (the loop loads the checkpoint) nor who is replaced.

After the reduction of a step all workers hold the same loss and norm, bit for bit. A verdict is a pure function of
them and of the guardian's state, in sums, products and comparisons, which IEEE 754 fixes everywhere (a logarithm's last
bit depends on the C library): so all workers decide alike without a word between them.

A spike is a value far above the median of the last applied steps, in units of their median absolute deviation, and by a
least distance. Values that were skipped do not enter the median, nor does the median follow a spike: half of the
history would have to be spikes. A run goes up this ladder, each rung by its own limit:

1. The batch is skipped, and the same step is tried on the next one. The weights did not change; that single batch was
   the trouble, or the weights are.
2. The run goes back to an earlier checkpoint, and leaves out what it read since and some more: a spike comes of
   certain batches on certain weights, so others pass the place (PaLM).
3. The run stops with a `TrainError`.

If batches look like spikes right after a rollback, on weights with which other losses were ordinary, the data have
changed and not the weights (another source begins, say): the history starts anew and the run goes on.

Not covered: a loss that climbs slowly, within the history's spread; a spike in the first `history_steps` steps; batches
whose mean is ordinary though one slot's is not.

Source: Chowdhery et al., PaLM (arXiv 2204.02311), section 5.1: back about 100 steps, 200 to 500 batches left out.
OLMo-core's SkipStepOptimizer: no update at 6 standard deviations from the mean of 128 steps; here 8, for mean and
deviation contain the spikes and so are wider than the median's. SPAM (arXiv 2501.06842), section 2: gradients of 50
times the mean square are spikes, so 7 times the size.
Cost: a verdict takes 17 microseconds; the state 5 KB of JSON in the ordinary course, 50 KB at most (2026-11, Zen 4).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from forge_ray.config.guard import GuardConfig
from forge_ray.data.loader import SlotLoader
from forge_ray.errors import TrainError

Action = Literal["apply", "skip", "rollback", "stop"]
_LADDER = ("ignore", "skip", "rollback", "stop")
_SIGMA = 1.4826  # median absolute deviations in the standard deviation of a normal distribution
_MOST_WINDOWS = 1000

_BLOCK_WORDS = 1 << 15  # of 8 bytes: 256 KiB stay in a core's cache
_BLOCKS_AT_ONCE = {"cpu": 1, "cuda": 256}
_FACTOR = 0x5851F42D4C957F2D  # of Knuth's MMIX generator; odd, so multiplying by it is a bijection
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Verdict:
    """What is done with a step.

    `step` counts the finished steps before it; `position` is its batch's. `kind` is empty when there is no trouble.
    `back_to`, of a rollback, is the newest step that is early enough.
    """

    action: Action
    step: int
    position: int
    loss: float
    norm: float
    kind: str = ""
    reason: str = ""
    back_to: int | None = None
    new_level: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For a `guard` event; NaN and infinity, which JSON has not, as text."""
        loss, norm = (value if math.isfinite(value) else str(value) for value in (self.loss, self.norm))
        return {
            "step": self.step,
            "position": self.position,
            "verdict": self.action,
            "reason": self.reason,
            "loss": loss,
            "grad_norm": norm,
            "back_to": self.back_to,
        }

    def error(self) -> TrainError:
        """What a verdict to stop ends the run with."""
        return TrainError(
            "training was stopped by its guardian",
            got=f"{self.reason}, at step {self.step}, batch {self.position}",
            wanted=f"a finite loss and gradient norm; pretrain.guard.{self.kind} decides what follows another",
            do="look at the samples in the run's `guard` events; lower pretrain.optimizer.learning_rate, or change "
            "pretrain.guard, and start again",
        )


@dataclass(frozen=True)
class Window:
    """Batches left out: positions `first` to `after` - 1, and what for."""

    first: int
    after: int
    kind: str


class Skips:
    """The record of the batches that training leaves out; what is not on it is consumed, once, in order.

    Step t reads the t-th position, counted from 0, that is in no window. Windows are only ever added at or behind the
    batch of the step under way, so no finished step of the surviving history changes its batch; and what windows and
    finished steps hold together is a prefix of the positions without hole or overlap.

    The position of the step under way grows with every step, skip and rollback: of two workers, or checkpoints of one
    run, that with the greater position is ahead, where a step's number would not tell.

    Cost: a position takes one pass over the windows, at most 1,000: 26 microseconds.
    """

    def __init__(self, windows: Iterable[Window] = ()) -> None:
        self.windows = list(windows)

    def position(self, step: int) -> int:
        """Where the batch of a step stands."""
        position = step
        for window in self.windows:
            if window.first > position:
                break
            position += window.after - window.first
        return position

    def add(self, first: int, after: int, kind: str) -> None:
        """Leaves out `first` to `after` - 1; what was left out before keeps its reason."""
        new = []
        for window in [*self.windows, Window(after, after, kind)]:
            end = min(window.first, after)
            if first < end:
                new.append(Window(first, end, kind))
            first = max(first, window.after)
        self.windows = sorted([*self.windows, *new], key=lambda window: window.first)


class Guardian:
    """Judges every step, and keeps the record of what was left out.

    Args:
        config: Policies and limits.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skips = Skips()
        self._losses: deque[float] = deque(maxlen=config.history_steps)
        self._norms: deque[float] = deque(maxlen=config.history_steps)
        self._skipped: list[int] = []
        self._rollbacks: list[tuple[int, int]] = []

    def position(self, step: int) -> int:
        """Where the batch of a step stands: what `SlotLoader.slot` takes as its step."""
        return self.skips.position(step)

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """Says what is done with a step; changes nothing.

        Args:
            step: Finished steps before this one.
            loss: Of the global batch, in nats per token.
            norm: Of the reduced gradient, before clipping.
        """
        position = self.position(step)
        found = [trouble for trouble in self._troubles(loss, norm) if trouble[1] != "ignore"]
        if not found:
            return Verdict("apply", step, position, loss, norm)
        kind, action, reason = max(found, key=lambda trouble: _LADDER.index(trouble[1]))
        skipped, rollbacks = self._within(step)
        if action == "skip" and len(skipped) >= self.config.max_skips:
            action = "rollback"
            reason += (
                f"; batches were skipped {len(skipped)} times in {self.config.limit_steps} steps" if skipped else ""
            )
        if action == "rollback":
            if kind != "non_finite" and rollbacks and rollbacks[-1][1] == step:
                reason += f"; so it is on the weights of step {step}, which were good: the data have changed"
                return Verdict("apply", step, position, loss, norm, kind, reason, new_level=True)
            if len(rollbacks) >= self.config.max_rollbacks:
                action = "stop"
                told = ", ".join(f"{after} to {before}" for after, before in rollbacks)
                reason += f"; rolled back {len(rollbacks)} times already (from step {told})" if rollbacks else ""
        if action != "stop" and len(self.skips.windows) >= _MOST_WINDOWS:
            action, reason = "stop", f"{reason}; {_MOST_WINDOWS} windows of batches were left out already"
        back_to = max(0, step - self.config.rollback_steps) if action == "rollback" else None
        return Verdict(action, step, position, loss, norm, kind, reason, back_to)

    def commit(self, verdict: Verdict) -> None:
        """Takes note of a step that is applied or skipped; then `position` says where the next one, or it again, reads.

        Raises:
            TrainError: The verdict is to stop.
        """
        if verdict.action == "stop":
            raise verdict.error()
        self._skipped, self._rollbacks = self._within(verdict.step)
        if verdict.action == "skip":
            self.skips.add(verdict.position, verdict.position + 1, verdict.kind)
            self._skipped.append(verdict.step)
            return
        if verdict.new_level:
            self._losses.clear()
            self._norms.clear()
        self._losses.append(verdict.loss)
        self._norms.append(verdict.norm)

    def roll_back(self, verdict: Verdict, to_step: int, earlier: dict[str, Any]) -> None:
        """Leaves out what was read since a checkpoint, the batch that showed the trouble, and the window after it.

        Args:
            verdict: The one that asked for it.
            to_step: Finished steps of the checkpoint that all workers go back to.
            earlier: The guardian's state in that checkpoint, for the losses before it; of a run's initial weights, that
                of a new guardian. What was left out since stays left out.
        """
        self.skips.add(self.position(to_step), verdict.position + 1 + self.config.rollback_skip_batches, verdict.kind)
        self._rollbacks = [*self._within(verdict.step)[1], (verdict.step, to_step)]
        self._skipped = []
        self._remember(earlier)

    def state(self) -> dict[str, Any]:
        """Everything it knows, for checkpoints and newcomers; JSON gives back the same bits."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "windows": [[window.first, window.after, window.kind] for window in self.skips.windows],
            "skipped": list(self._skipped),
            "rollbacks": [list(steps) for steps in self._rollbacks],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`; of a history longer than the configuration's, with its newest part."""
        self._remember(state)
        self.skips = Skips(Window(*row) for row in state["windows"])
        self._skipped = list(state["skipped"])
        self._rollbacks = [(after, before) for after, before in state["rollbacks"]]

    def _remember(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=self.config.history_steps)
        self._norms = deque(state["norms"], maxlen=self.config.history_steps)

    def _within(self, step: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Skips and rollbacks that the limits count at a step."""
        since = step - self.config.limit_steps
        return [at for at in self._skipped if at > since], [row for row in self._rollbacks if row[0] > since]

    def _troubles(self, loss: float, norm: float) -> list[tuple[str, str, str]]:
        """Kind, policy and description of all that is wrong with a step."""
        config, found = self.config, []
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return [("non_finite", config.non_finite, f"loss {loss}, gradient norm {norm}")]
        if len(self._losses) < config.history_steps:
            return []
        median, sigma = _spread(self._losses)
        if loss > median + max(config.loss_sigmas * sigma, config.loss_jump):
            found.append(("loss_spike", config.loss_spike, f"loss {loss:.4g} after a median of {median:.4g}"))
        median, sigma = _spread(self._norms)
        if norm > max(median + config.norm_sigmas * sigma, config.norm_factor * median):
            found.append(("norm_spike", config.norm_spike, f"gradient norm {norm:.4g} after a median of {median:.4g}"))
        return found


def checkpoint_before(verdict: Verdict, steps: Sequence[int]) -> int:
    """The checkpoint that a rollback goes to: the newest that is early enough, else the oldest.

    Args:
        verdict: To roll back.
        steps: Finished steps of the checkpoints that verify.

    Raises:
        TrainError: There is none.
    """
    early = [step for step in steps if step <= verdict.back_to]
    if not steps:
        raise TrainError(
            "training cannot go back: there is no checkpoint before the trouble",
            got=f"{verdict.reason}, at step {verdict.step}",
            do="lower pretrain.optimizer.learning_rate or pretrain.checkpoint_every_s and start again",
        )
    return max(early) if early else min(steps)


def _spread(values: Iterable[float]) -> tuple[float, float]:
    """Median, and the standard deviation that the median absolute deviation stands for."""
    ordered = sorted(values)
    median = ordered[len(ordered) // 2]
    return median, _SIGMA * sorted(abs(value - median) for value in ordered)[len(ordered) // 2]


@dataclass(frozen=True)
class Samples:
    """Documents of a batch: the first few as [source, document id], and how many there are."""

    documents: list[list[str]]
    count: int


def samples_of(loader: SlotLoader, position: int, most: int = 32) -> Samples:
    """The documents that have tokens in the batch at a position, in the order of its sequences.

    Cost: reads the document table of every shard that the batch touches: for incidents, not for steps.
    """
    order, size = loader.order, loader.slots * loader.micro_batch
    shards, sequences = order.locate(*order.samples(np.arange(position * size, (position + 1) * size)))
    found: dict[tuple[str, str], None] = {}
    tables: dict[int, tuple[np.ndarray, list[str]]] = {}
    for shard, sequence in zip(shards.tolist(), sequences.tolist(), strict=True):
        if shard not in tables:
            loader.reader.tokens(shard)  # opens it
            table = loader.reader.table(shard)
            tables[shard] = table["offset"].to_numpy(), table["id"].to_pylist()
        offsets, ids = tables[shard]
        start = sequence * order.seq_len
        first, last = np.searchsorted(offsets, [start, start + order.seq_len], side="right") - 1
        found |= dict.fromkeys((order.index.shards[shard].origin, name) for name in ids[first : last + 1])
    return Samples([list(document) for document in list(found)[:most]], len(found))


def digest(buffer: Tensor) -> int:
    """64 bits of a flat fp32 tensor that any change within one aligned pair of elements alters, a flipped bit included.

    Each 8-byte word is mixed by a bijection of its own place and added to its block's sum, modulo 2^64; block sums are
    mixed likewise. A change of several words is missed with a probability of about 2^-64, if nobody intends it. The
    digest is the same on CPU and GPU, on little-endian machines.

    Cost: 30 ms for 120 MB on one thread, SHA-256 61 ms (2026-11, Zen 4); memory for two blocks of 256 KiB on a CPU, of
    64 MiB on a GPU.
    """
    block = _BLOCK_WORDS * _BLOCKS_AT_ONCE[buffer.device.type]
    words = torch.empty(block, dtype=torch.int64, device=buffer.device)
    high = torch.empty_like(words)
    factors = torch.arange(1, _BLOCK_WORDS + 1, device=buffer.device).mul_(_FACTOR)
    _fold(factors, high[:_BLOCK_WORDS])
    factors.mul_(_FACTOR).bitwise_or_(1)
    sums = []
    for part in buffer.split(2 * block):
        floats = words.view(torch.float32)
        floats[: part.numel()] = part
        floats[part.numel() :] = 0.0
        _fold(words, high)
        words.view(-1, _BLOCK_WORDS).mul_(factors)
        _fold(words, high)
        sums.append(words.view(-1, _BLOCK_WORDS).sum(dim=1))
    total = buffer.numel()
    count = -(-buffer.numel() // (2 * _BLOCK_WORDS))
    for value in torch.cat(sums).tolist()[:count]:
        total = (total * _FACTOR + value) & _WORD
    return total


def _fold(words: Tensor, high: Tensor) -> None:
    """Adds the upper half of each word to the lower one, bit by bit: a bijection."""
    torch.bitwise_right_shift(words, 32, out=high)
    words.bitwise_xor_(high.bitwise_and_(0xFFFFFFFF))


def odd_ones(digests: Sequence[int]) -> list[int]:
    """Ranks whose state is not that of the strict majority; all ranks where there is none, for then none is trusted."""
    value, count = Counter(digests).most_common(1)[0]
    trusted = 2 * count > len(digests)
    return [rank for rank, mine in enumerate(digests) if not trusted or mine != value]
