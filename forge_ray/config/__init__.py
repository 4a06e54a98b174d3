"""The closed, frozen schema of everything a user can choose. Attribute docstrings are the reference and the CLI help.

Owns the field names, types, ranges and defaults, and the rules that tie fields together: `base.py` what a section is,
`data.py` from documents to token shards, `train.py` model, training and evaluation, `plan.py` a budget, here export,
endpoint, Ray and the whole. Does not own where values come from (`settings.py`) nor what a stage does with them.
Imports no torch, ray or vllm.

Fields marked `OPERATIONAL` change how a stage runs but not what it produces, so they stay out of its fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from forge_ray.config.base import OPERATIONAL, Fraction, Positive, Section
from forge_ray.config.data import (
    BotocoreSource,
    CurateConfig,
    DecontaminateConfig,
    ExactConfig,
    FilesSource,
    HttpSource,
    IngestConfig,
    LanguageConfig,
    LicenceConfig,
    LinesConfig,
    NearConfig,
    NormalizeConfig,
    PrivacyConfig,
    QualityConfig,
    Source,
    SweepConfig,
    TokenizeConfig,
    TokenizerConfig,
)
from forge_ray.config.guard import GuardConfig
from forge_ray.config.plan import PlanConfig
from forge_ray.config.train import (
    AdamWConfig,
    EvaluateConfig,
    MixtureConfig,
    ModelConfig,
    MuonConfig,
    Optimizer,
    PretrainConfig,
)

__all__ = [
    "OPERATIONAL",
    "AdamWConfig",
    "BotocoreSource",
    "CurateConfig",
    "DecontaminateConfig",
    "EvaluateConfig",
    "ExactConfig",
    "ExportConfig",
    "FilesSource",
    "ForgeConfig",
    "Fraction",
    "GuardConfig",
    "HttpSource",
    "IngestConfig",
    "LanguageConfig",
    "LicenceConfig",
    "LinesConfig",
    "MixtureConfig",
    "ModelConfig",
    "MuonConfig",
    "NearConfig",
    "NormalizeConfig",
    "Optimizer",
    "PlanConfig",
    "Positive",
    "PretrainConfig",
    "PrivacyConfig",
    "QualityConfig",
    "RayConfig",
    "Section",
    "ServeConfig",
    "Source",
    "SweepConfig",
    "TokenizeConfig",
    "TokenizerConfig",
]


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
    cache_bytes: Annotated[Positive | None, OPERATIONAL] = None
    """Of a workspace in an object store: what copies of its files may take on each machine, token shards apart
    (`pretrain.cache_bytes`); none for 20 GiB, or a quarter of the disk if that is less."""
    ray: Annotated[RayConfig, OPERATIONAL] = RayConfig()
    """Which Ray cluster the stages run on."""
    plan: Annotated[PlanConfig, OPERATIONAL] = PlanConfig()
    """What the model may cost (`forge plan`)."""
    ingest: IngestConfig = IngestConfig()
    """Documents in."""
    curate: CurateConfig = CurateConfig()
    """Cleaning, deduplication, private data."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The vocabulary."""
    sweep: Annotated[SweepConfig, OPERATIONAL] = SweepConfig()
    """The comparison of vocabularies (`forge tokenizer sweep`)."""
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

    @model_validator(mode="after")
    def _check(self) -> ForgeConfig:
        if self.pretrain.precision == "fp8":
            sides = ("d_model",) if self.model.num_experts else ("d_model", "d_ff")  # experts stay bf16
            for name in sides:
                if (side := getattr(self.model, name)) % 16:
                    raise ValueError(
                        f"pretrain.precision fp8 wants model.{name} to be a multiple of 16, got {side}: take "
                        f"{side + -side % 16}, or precision bf16"
                    )
        return self
