"""From a budget to a run: which size, on which machines, for how long and how much.

Owns the search: for every machine and market, every depth of the model's dial that the budget, the memory and the
endpoint allow, and of those the one with the lowest loss by the law. Pure arithmetic: no torch, no network.

What it assumes and does not model: machines reach the share of their peak that the price file says, several of them as
much as one, and that share is of bf16, whatever `pretrain.precision` is; storage and traffic cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from forge_ray.config import ForgeConfig, ModelConfig, PlanConfig
from forge_ray.config.train import shape_of
from forge_ray.errors import ConfigError
from forge_ray.model.arithmetic import (
    activation_bytes,
    num_parameters,
    state_bytes,
    sums_bytes,
    train_flops_per_token,
)
from forge_ray.plan.law import Estimate, Law, best_batch_tokens
from forge_ray.prices import CORE, Chip, Machine, Prices

# Above 8 only even ones: heads of 128 cover the width exactly.
_DEPTHS = (*range(1, 9), *range(10, 65, 2))
# Of a chip's memory: the rest is the library's, the allocator's waste and what is not counted here.
_USABLE_FRAC = 0.8
# A smaller model is taken if its loss is no further than this from the lowest: the law is not more exact.
_AS_GOOD_FRAC = 0.005
# A spot machine that is taken away is missing for so long; its work is done by the others.
_AWAY_S = 300.0
# Width from which an accelerator reaches its share of the peak; below it the share falls in proportion.
_FULL_WIDTH = {CORE: 256}
_FULL_WIDTH_ELSE = 2048
# Below this, what is trained from scratch was behind a general model of 135 million parameters when we measured it.
_FEW_TOKENS = 20e6


@dataclass(frozen=True)
class Serving:
    """What the endpoint costs.

    `ms_per_token` is of one answer on an idle engine, whose time goes into reading the weights.
    """

    machine: str
    chips: int
    usd_per_million_tokens: float
    ms_per_token: float


@dataclass(frozen=True)
class Option:
    """One way to spend the budget.

    `relative_loss` ranks options and promises nothing (`law.py`); `bits_per_byte` is what a ladder of the job's own
    expects, where there is one that speaks for this size (`fit.py`).
    """

    machine: str
    market: str
    nodes: int
    depth: int
    vocab_size: int
    tied_embeddings: bool
    parameters: int
    tokens: float
    epochs: float
    steps: int
    slots: int
    micro_batch: int
    seq_len: int
    workers: int
    min_workers: int
    gpus_per_worker: int
    sharding: str
    reduction: str
    memory_gib: float
    usd_per_node_hour: float
    hours: float
    train_usd: float
    interruptions: float
    serving: Serving
    serve_usd: float
    relative_loss: float
    bits_per_byte: Estimate | None = None

    @property
    def usd(self) -> float:
        """Training and serving."""
        return self.train_usd + self.serve_usd

    def job(self) -> dict[str, Any]:
        """The sections of a job that this option decides, to be laid over the others."""
        return {
            "tokenizer": {"vocab_size": self.vocab_size},
            "model": {
                "depth": self.depth,
                **shape_of(self.depth),
                "num_experts": 0,
                "tied_embeddings": self.tied_embeddings,
            },
            "pretrain": {
                "steps": self.steps,
                "slots": self.slots,
                "micro_batch": self.micro_batch,
                "seq_len": self.seq_len,
                "min_workers": self.min_workers,
                "max_workers": self.workers,
                "sharding": self.sharding,
                "reduction": self.reduction,
                "gpus_per_worker": self.gpus_per_worker,
                "usd_per_node_hour": self.usd_per_node_hour,
            },
        }


@dataclass(frozen=True)
class Plan:
    """The options, best first, and what is to be said about them."""

    options: tuple[Option, ...]
    corpus_tokens: float
    prices_as_of: str
    advice: str
    ladder: str = ""
    """The artifact of `forge plan fit` that expects `bits_per_byte`."""
    spoken_for: tuple[float, float] = (0.0, 0.0)
    """Parameters of blocks between which it does."""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "corpus_tokens": self.corpus_tokens,
            "prices_as_of": self.prices_as_of,
            "advice": self.advice,
            "ladder": self.ladder,
            "options": [{**asdict(option), "usd": option.usd} for option in self.options],
        }


@dataclass(frozen=True)
class _Case:
    """What all options have in common."""

    config: ForgeConfig
    prices: Prices
    corpus_tokens: float
    law: Law

    @property
    def plan(self) -> PlanConfig:
        return self.config.plan


def make(config: ForgeConfig, prices: Prices, corpus_tokens: float) -> Plan:
    """All that the budget allows, best first.

    Args:
        config: Its `plan`, and of the job what stays as it is: vocabulary size, context, optimizer, and the model's
            shape if `model.depth` is given.
        corpus_tokens: Tokens of the training documents.

    Raises:
        ConfigError: No budget is given, the model has experts, or nothing fits; says which limit stands in the way and
            what would do.
    """
    plan = config.plan
    if plan.usd is None and plan.hours is None:
        raise ConfigError(
            "a plan needs a budget",
            got="neither plan.usd nor plan.hours",
            do="add --plan.usd 500, or --plan.hours 24 with --plan.nodes and --plan.machines",
        )
    if config.model.num_experts:
        raise ConfigError(
            "forge plan knows dense models alone",
            got=f"model.num_experts {config.model.num_experts}",
            do="plan with --model.num_experts 0; with experts the same run takes more memory than the plan says",
        )
    case = _Case(config, prices, corpus_tokens, Law())
    found: list[Option] = []
    reasons: list[str] = []
    for name, machine in prices.chosen(plan.machines).items():
        for market in _markets(machine, plan.market):
            options = list(_options(case, name, machine, market, reasons))
            if options:
                found.append(_best(options))
    if not found:
        raise ConfigError(
            "nothing can be trained within these limits",
            got=_limits(plan),
            wanted=reasons[0] if reasons else f"a machine on the {plan.market} market",
            do="raise the limit that is named, or choose other plan.machines",
        )
    lowest = min(option.relative_loss for option in found)
    good = [o for o in found if o.relative_loss <= lowest * (1 + _AS_GOOD_FRAC)]
    rest = [o for o in found if o not in good]
    ordered = sorted(good, key=lambda o: o.usd) + sorted(rest, key=lambda o: o.relative_loss)
    return Plan(tuple(ordered), corpus_tokens, prices.as_of.isoformat(), _advice(ordered[0], corpus_tokens))


def _markets(machine: Machine, wanted: str) -> list[str]:
    here = ["on-demand"] + ["spot"] * (machine.spot_usd_per_hour is not None)
    return [market for market in here if wanted in ("any", market)]


def _best(options: list[Option]) -> Option:
    lowest = min(option.relative_loss for option in options)
    return min((o for o in options if o.relative_loss <= lowest * (1 + _AS_GOOD_FRAC)), key=lambda o: o.usd)


def _options(case: _Case, name: str, machine: Machine, market: str, reasons: list[str]) -> Iterator[Option]:
    fixed = case.config.model.depth
    for depth in [fixed] if fixed else _DEPTHS:
        outcome = _option(case, name, machine, market, depth)
        if isinstance(outcome, Option):
            yield outcome
        else:
            reasons.append(outcome)


def _option(case: _Case, name: str, machine: Machine, market: str, depth: int) -> Option | str:
    """The run of a model of this depth there, or why there is none."""
    plan, chip = case.plan, case.prices.chips[machine.chip]
    vocab_size, seq_len = case.config.tokenizer.vocab_size, case.config.pretrain.seq_len
    model = ModelConfig(depth=depth, tied_embeddings=case.config.model.tied_embeddings)
    serving = _serving(case, model)
    if isinstance(serving, str):
        return serving
    serve_usd = plan.served_tokens / 1e6 * serving.usd_per_million_tokens
    usd_per_hour = machine.usd_per_hour if market == "on-demand" else machine.spot_usd_per_hour or 0.0
    node_hours = math.inf if plan.usd is None else (plan.usd - serve_usd) / usd_per_hour
    if node_hours <= 0:
        return f"plan.usd above {serve_usd:,.0f}: serving {plan.served_tokens:,.0f} tokens costs that alone"
    if plan.hours is not None:
        node_hours = min(node_hours, plan.hours * plan.nodes)
    flops = _flops_per_s(chip, machine, model) * 3600
    if market == "spot":
        flops *= 1 - machine.interruptions_per_day * _AWAY_S / 86400
    per_token = train_flops_per_token(model, vocab_size, seq_len)
    tokens = min(node_hours * flops / per_token, plan.max_epochs * case.corpus_tokens)
    parameters = num_parameters(model, vocab_size)
    if tokens < parameters:
        return f"more money, time or text: a model of depth {depth} would see less than one token per parameter"
    layout = _layout(case, model, chip, machine, tokens)
    if isinstance(layout, str):
        return layout
    steps = max(1, round(tokens / (layout["slots"] * layout["micro_batch"] * seq_len)))
    tokens = float(steps * layout["slots"] * layout["micro_batch"] * seq_len)
    node_hours = tokens * per_token / flops
    hours = node_hours / plan.nodes
    return Option(
        machine=name,
        market=market,
        nodes=plan.nodes,
        depth=depth,
        vocab_size=vocab_size,
        tied_embeddings=model.tied_embeddings,
        parameters=parameters,
        tokens=tokens,
        epochs=tokens / case.corpus_tokens,
        steps=steps,
        seq_len=seq_len,
        hours=hours,
        train_usd=node_hours * usd_per_hour,
        interruptions=machine.interruptions_per_day * node_hours / 24 if market == "spot" else 0.0,
        serving=serving,
        serve_usd=serve_usd,
        relative_loss=case.law.loss(parameters, tokens, case.corpus_tokens),
        gpus_per_worker=0 if machine.chip == CORE else 1,
        usd_per_node_hour=usd_per_hour,
        **layout,
    )


def _flops_per_s(chip: Chip, machine: Machine, model: ModelConfig) -> float:
    full = _FULL_WIDTH.get(machine.chip, _FULL_WIDTH_ELSE)
    return machine.count * chip.peak_tflops * 1e12 * chip.train_frac * min(1.0, model.d_model / full)


def _layout(case: _Case, model: ModelConfig, chip: Chip, machine: Machine, tokens: float) -> dict[str, Any] | str:
    """Workers, slots, micro-batch, sharding and the memory of one chip; or why it does not fit."""
    training = case.config.pretrain
    workers = machine.count * case.plan.nodes
    # With half of them a run still goes on; each then holds more sums.
    min_workers = max(1, workers // 2)
    # `auto` takes bf16 where it is fast, and the peaks of the price file are those of bf16.
    precision = "bf16" if training.precision == "auto" else training.precision
    usable = chip.memory_gib * 2**30 * _USABLE_FRAC
    vocab_size = case.config.tokenizer.vocab_size
    state = state_bytes(model, vocab_size, muon=training.optimizer.kind == "muon", precision=precision)
    one = activation_bytes(model, training.seq_len, 1, precision=precision, cpu=machine.chip == CORE)
    sequences = max(workers, best_batch_tokens(tokens) / training.seq_len)
    fewest, least = 2 ** math.ceil(math.log2(workers)), math.inf
    largest = 2 ** max(0, math.floor(math.log2(sequences / fewest)))
    for sharding, reduction in (("replicated", "exact"), ("replicated", "fast"), ("fsdp", "fast")):
        # The smaller the micro-batch, the more slots and in exact mode the more sums: only both together fit or do not.
        for micro_batch in (largest >> k for k in range(largest.bit_length())):
            slots = fewest * 2 ** max(0, math.floor(math.log2(sequences / (fewest * micro_batch))))
            if sharding == "fsdp":
                held = state / workers
            else:
                held = state + sums_bytes(model, vocab_size, slots, min_workers, exact=reduction == "exact")
            if held + micro_batch * one <= usable:
                return {
                    "workers": workers,
                    "min_workers": min_workers,
                    "slots": slots,
                    "micro_batch": micro_batch,
                    "sharding": sharding,
                    "reduction": reduction,
                    "memory_gib": (held + micro_batch * one) / 2**30,
                }
            least = min(least, held + micro_batch * one)
    return (
        f"more than {workers} x {chip.memory_gib:g} GiB: a model of depth {model.depth} needs "
        f"{least / 2**30:,.0f} GiB on each of them"
    )


def _serving(case: _Case, model: ModelConfig) -> Serving | str:
    """The cheapest endpoint for a model, or why none is allowed."""
    plan = case.plan
    machines = case.prices.chosen([plan.serve_on] if plan.serve_on else plan.machines)
    parameters = num_parameters(model, case.config.tokenizer.vocab_size)
    weights = 2 * parameters
    found = []
    for name, machine in machines.items():
        chip = case.prices.chips[machine.chip]
        room = chip.memory_gib * 2**30 * _USABLE_FRAC / 2  # half of it for the requests' keys and values
        # Cores share one memory and work on one model; accelerators hold one each, or share one in powers of two.
        chips = machine.count if machine.chip == CORE else 2 ** max(0, math.ceil(math.log2(max(1.0, weights / room))))
        if chips > machine.count or weights > room * chips:
            continue
        copies = machine.count // chips
        rate = copies * min(chips * chip.peak_tflops * 1e12 * chip.serve_frac / (2 * parameters), chip.max_tokens_per_s)
        found.append(
            Serving(
                machine=name,
                chips=chips,
                usd_per_million_tokens=machine.usd_per_hour / 3600 / rate * 1e6,
                ms_per_token=weights / (chips * chip.memory_gb_per_s * 1e9) * 1e3,
            )
        )
    if not found:
        size = f"{weights / 1e9:,.1f} GB of weights"
        return f"a machine to serve on with more memory: a model of depth {model.depth} has {size}"
    fast = [s for s in found if plan.max_ms_per_token is None or s.ms_per_token <= plan.max_ms_per_token]
    if not fast:
        quickest = min(s.ms_per_token for s in found)
        return f"plan.max_ms_per_token of {quickest:.2g} for a model of depth {model.depth}, or faster machines"
    return min(fast, key=lambda s: s.usd_per_million_tokens)


def _limits(plan: PlanConfig) -> str:
    given = {
        "usd": plan.usd,
        "hours": plan.hours,
        "nodes": plan.nodes,
        "max_ms_per_token": plan.max_ms_per_token,
        "served_tokens": plan.served_tokens or None,
    }
    return ", ".join(f"plan.{name} {value:,g}" for name, value in given.items() if value is not None)


def _advice(best: Option, corpus_tokens: float) -> str:
    if best.tokens >= _FEW_TOKENS:
        return ""
    limit = "the corpus" if corpus_tokens < _FEW_TOKENS else "the budget"
    return (
        f"Adapting an open model is the better choice: {limit} allows {best.tokens:,.0f} tokens of training, and below "
        f"about {_FEW_TOKENS:,.0f} a model of your own does not catch up. Evidence: README's demo, of a few million "
        "tokens, stays behind SmolLM2-135M in bits per byte on the same held-out documents, ours in windows of 256 "
        "tokens, SmolLM2 in windows of 1,024; `make smollm2` and `make demo` compare both in windows of 256."
    )
