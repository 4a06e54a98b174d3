"""What small runs say of a large one: its loss with an interval, its time, its memory.

Owns the arithmetic from measured rungs to a prediction. Running the rungs is `plan_verbs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import DataError
from forge_ray.model.arithmetic import (
    activation_bytes,
    block_parameters,
    newton_schulz_flops,
    num_parameters,
    state_bytes,
    sums_bytes,
    train_flops_per_token,
)
from forge_ray.plan.law import Estimate, Law

MIN_RUNGS = 4
# The exponent of size at a fixed number of tokens per parameter: 0.35 and 0.37 in Chinchilla's runs (arXiv 2404.10102,
# table 1), 0.2 to 0.5 on other texts.
_EXPONENT, _EXPONENT_SPREAD = 0.35, 0.12
# Two runs that differ in their seed alone end up so far apart.
_NOISE_FRAC = 0.004
_DRAWS = 20_000
# How far from the fitted runs a ladder still speaks: times the job's size, times its tokens per parameter either way.
_BEYOND, _OFF_RATIO = 1.5, 2.0
# Sequences of a slot below which one more or less is a jump.
_COARSEST = 4


@dataclass(frozen=True)
class Run:
    """One training run: what is known before it, and what was measured after it.

    `bits_per_byte` on held-out documents; `step_s` the median; `peak_bytes` of one worker.
    """

    model: ModelConfig
    config: PretrainConfig
    vocab_size: int
    workers: int
    precision: str = "bf16"
    bits_per_byte: float = 0.0
    step_s: float = 0.0
    peak_bytes: float = 0.0

    @property
    def size(self) -> int:
        """Parameters of the blocks."""
        return block_parameters(self.model)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.config.steps * self.step_tokens

    @property
    def step_tokens(self) -> int:
        """Of a global batch."""
        return self.config.slots * self.config.micro_batch * self.config.seq_len

    def time_features(self) -> list[float]:
        """What the seconds of a step are a weighted sum of: operations, calls of a layer, values of the state, Muon."""
        flops = train_flops_per_token(self.model, self.vocab_size, self.config.seq_len) * self.step_tokens
        calls = self.config.slots * (self.model.num_layers + 1)
        shared = [flops, calls] + [newton_schulz_flops(self.model)] * (self.config.optimizer.kind == "muon")
        return [*(cost / self.workers for cost in shared), float(num_parameters(self.model, self.vocab_size))]

    def known_bytes(self) -> float:
        """The tensors that are known of: state, sums of gradients, a micro-batch's activations."""
        muon = self.config.optimizer.kind == "muon"
        exact = self.config.reduction == "exact"
        held = state_bytes(self.model, self.vocab_size, muon=muon, precision=self.precision)
        held += sums_bytes(self.model, self.vocab_size, self.config.slots, self.workers, exact=exact)
        return held + activation_bytes(
            self.model,
            self.config.seq_len,
            self.config.micro_batch,
            precision=self.precision,
            cpu=not self.config.gpus_per_worker,
            compiled=self.config.compile == "on",
        )


@dataclass(frozen=True)
class Prediction:
    """What is expected of a run. Hours are of training itself; memory of one worker."""

    bits_per_byte: Estimate
    hours: float
    peak_bytes: float
    exponent: float


def predict(rungs: Sequence[Run], target: Run) -> Prediction:
    """Carries the rungs on to a larger run with as many tokens per parameter.

    Raises:
        DataError: There are too few rungs.
    """
    if len(rungs) < MIN_RUNGS:
        raise DataError("too few runs to predict from", got=len(rungs), wanted=f"at least {MIN_RUNGS}")
    loss, exponent = _loss([run.size for run in rungs], [run.bits_per_byte for run in rungs], target.size)
    weights = _weights([run.time_features() for run in rungs], [run.step_s for run in rungs])
    step_s = float(np.dot(target.time_features(), weights))
    memory = _weights([[1e9, run.known_bytes()] for run in rungs], [run.peak_bytes for run in rungs])
    return Prediction(
        bits_per_byte=loss,
        hours=target.config.steps * step_s / 3600,
        peak_bytes=float(np.dot([1e9, target.known_bytes()], memory)),
        exponent=exponent,
    )


@dataclass(frozen=True)
class Ladder:
    """What `forge plan fit` measured for a job, carried on to runs like that job's.

    Sizes are parameters of blocks, the job's the last one; losses are the rungs'.
    """

    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    tokens_per_parameter: float

    @staticmethod
    def of(row: Mapping[str, Any]) -> Ladder:
        """From the metrics of its artifact."""
        rungs = sorted(row["rungs"], key=lambda rung: rung["size"])
        sizes = (*(rung["size"] for rung in rungs), row["size"])
        return Ladder(sizes, tuple(rung["bits_per_byte"] for rung in rungs), row["tokens"] / row["size"])

    @property
    def spoken_for(self) -> tuple[float, float]:
        """Smallest and largest size that it says something of."""
        return self.sizes[0], self.sizes[-1] * _BEYOND

    def expects(self, size: float, tokens: float, corpus_tokens: float) -> Estimate | None:
        """Bits per byte of a run of this size; none where it is not near those that were fitted.

        Other tokens per parameter than the ladder's move the median by what the published law says they do, and the
        interval holds both, with and without that.
        """
        low, high = self.spoken_for
        fitted = self.tokens_per_parameter * size
        if not (low <= size <= high and 1 / _OFF_RATIO <= tokens / fitted <= _OFF_RATIO):
            return None
        found, _ = _loss(self.sizes[:-1], self.losses, size)
        law = Law()
        by = law.loss(size, tokens, corpus_tokens) / law.loss(size, fitted, corpus_tokens)
        return Estimate(found.median * by, found.low * min(1.0, by), found.high * max(1.0, by))


def _loss(sizes: Sequence[float], losses: Sequence[float], size: float) -> tuple[Estimate, float]:
    """Loss = floor + scale / size^exponent: all curves that pass near the rungs, each weighted by how near.

    The floor and the scale are never negative; the exponent has a prior, because a few points hardly tell it from the
    floor.
    """
    sizes, losses = np.array(sizes, dtype=float), np.array(losses)
    generator = np.random.default_rng(0)
    exponents = generator.normal(_EXPONENT, _EXPONENT_SPREAD, _DRAWS).clip(0.05, 1.0)
    floors = generator.uniform(0.0, losses.min(), _DRAWS)
    shapes = (sizes / sizes.max()) ** -exponents[:, None]
    # Relative errors: the best scale of each curve in closed form.
    scales = (shapes * (losses - floors[:, None]) / losses**2).sum(1) / (shapes**2 / losses**2).sum(1)
    fitted = floors[:, None] + scales[:, None] * shapes
    misfit = (((fitted - losses) / losses) ** 2).sum(1)
    noise = max(_NOISE_FRAC, float(np.sqrt(misfit.min() / max(1, len(sizes) - 3))))
    weight = np.exp(-0.5 * (misfit - misfit.min()) / noise**2)
    weight /= weight.sum()
    at_size = floors + scales * (size / sizes.max()) ** -exponents
    at_size = at_size * (1 + generator.normal(0.0, noise, _DRAWS))
    order = np.argsort(at_size)
    passed = np.cumsum(weight[order])
    low, median, high = (float(at_size[order][np.searchsorted(passed, share)]) for share in (0.05, 0.5, 0.95))
    return Estimate(median, low, high), float((weight * exponents).sum())


def _weights(features: Sequence[Sequence[float]], measured: Sequence[float]) -> np.ndarray:
    """The weights, none negative, of the sum that comes nearest in relative terms."""
    rows, goal = np.array(features, dtype=float), np.array(measured, dtype=float)
    unit = rows.max(axis=0)
    found, _ = nnls(rows / unit / goal[:, None], np.ones(len(goal)))
    return found / unit


def smaller(target: Run, frac: float) -> Run:
    """A run with this share of the target's parameters and tokens, in the same proportions, or as near as shapes go.

    The batch shrinks with the tokens to the power of 0.383, as the best one does (`law.best_batch_tokens`), but to no
    fewer than four sequences in a slot: from two to one a rung would take more steps than the one above it.
    """
    model = _shrunk(target.model, frac)
    real = block_parameters(model) / target.size
    whole = target.config.micro_batch
    micro_batch = max(min(whole, _COARSEST), round(whole * real**0.383))
    tokens = target.tokens * real
    steps = max(1, round(tokens / (target.config.slots * micro_batch * target.config.seq_len)))
    config = target.config.replace(micro_batch=micro_batch, steps=steps)
    return Run(model, config, target.vocab_size, target.workers, target.precision)


def _shrunk(model: ModelConfig, frac: float) -> ModelConfig:
    wanted = block_parameters(model) * frac
    aspect = model.d_model / model.num_layers
    found = []
    for num_layers in range(1, model.num_layers + 1):
        for d_model in range(32, model.d_model + 1, 16):
            shape = _scaled(model, num_layers, d_model)
            off = abs(np.log(block_parameters(shape) / wanted))
            found.append((off > 0.15, abs(np.log(d_model / num_layers / aspect)) + off, num_layers, d_model))
    _, _, num_layers, d_model = min(found)
    return _scaled(model, num_layers, d_model)


def _scaled(model: ModelConfig, num_layers: int, d_model: int) -> ModelConfig:
    by = d_model / model.d_model
    heads = max(1, round(model.num_heads * by))
    kv_heads = max(1, round(model.num_kv_heads * by))
    while heads % kv_heads:
        kv_heads -= 1
    width = max(16, 16 * round(model.d_ff * by / 16))
    experts = {"expert_d_ff": max(16, 16 * round(model.expert_width * by / 16))} if model.num_experts else {}
    return model.replace(
        depth=None,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=kv_heads,
        d_ff=width,
        **experts,
    )
