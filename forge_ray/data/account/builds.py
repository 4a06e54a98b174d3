"""Builds: which artifacts belong together, and where in them a document's row lies.

A build is an ingest artifact with the curate and tokenize artifacts made of it, as far as there are any. Owns choosing
one (the latest, a job's, that of a REF) and looking a document up in its ledger. What is told of it is `explain.py`.

Cost: a look-up reads the columns id, key and source of every part of the ledger once; memory holds one batch of them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, Workspace
from forge_ray.config import CurateConfig, ForgeConfig, TokenizeConfig, TokenizerConfig
from forge_ray.data import layout
from forge_ray.data.account import ledger
from forge_ray.data.ingest import SPLITS
from forge_ray.errors import ArtifactError, NotFoundError
from forge_ray.telemetry import say

if TYPE_CHECKING:
    import pyarrow.dataset as ds

STAGES = ("ingest", "curate", "tokenize")
_BY_ID, _BY_KEY, _BY_SOURCE, _BY_PREFIX = range(4)
_MOST_MATCHES = 50
_NEAR_SHOWN = 6
_NEAR_ROWS = 20_000


@dataclass(frozen=True)
class Build:
    """Artifacts that were made of one another."""

    ingest: Artifact
    curate: Artifact | None = None
    tokenize: Artifact | None = None

    @property
    def last(self) -> Artifact:
        """The artifact that says most of the documents."""
        return self.tokenize or self.curate or self.ingest

    @property
    def refs(self) -> dict[str, str]:
        """The artifacts' names by stage."""
        found = {stage: getattr(self, stage) for stage in STAGES}
        return {stage: artifact.ref for stage, artifact in found.items() if artifact}


def artifacts(workspace: Workspace, stage: str) -> list[Artifact]:
    """Every published artifact of a stage, the newest first; a damaged manifest is named and passed over."""
    found = []
    for ref in workspace.refs_of_artifacts():
        if ref.startswith(f"{stage}/"):
            try:
                found.append(workspace.get(ref))
            except ArtifactError as error:
                say(f"  passed over: {error}")
    try:
        latest = workspace.resolve(f"latest/{stage}").ref
    except ArtifactError:
        latest = ""
    # Times have seconds; of two artifacts of one second that is newer which the stage's name means.
    return sorted(found, key=lambda a: (a.manifest.created, a.ref == latest), reverse=True)


def latest(workspace: Workspace, config: ForgeConfig | None = None) -> Build:
    """The newest build, or the newest of a job.

    Sources are not listed: what counts is what was read last.

    Raises:
        NotFoundError: Nothing was read yet.
    """
    ref = layout.lineage(config.ingest) if config else "latest/ingest"
    try:
        ingest = workspace.resolve(ref)
    except NotFoundError:
        raise NotFoundError(
            "no documents were read yet" + (" by this job" if config else ""),
            got=workspace.uri,
            do="`forge tokenize` with the job's YAML reads them; `--workspace` says where to look",
        ) from None
    return _grown(workspace, ingest, config)


def of_ref(workspace: Workspace, ref: str) -> Build:
    """The build that an artifact belongs to: its ancestors and, of ingest and curate, what was made of it last.

    Raises:
        NotFoundError: No such artifact, or one that was made of no documents.
    """
    artifact = workspace.resolve(ref)
    inputs = artifact.manifest.inputs
    stage = artifact.manifest.stage
    if stage == "ingest":
        return _grown(workspace, artifact, None)
    if stage == "tokenize":
        curate = workspace.get(f"curate/{inputs['curate']}")
        return Build(workspace.get(f"ingest/{curate.manifest.inputs['ingest']}"), curate, artifact)
    if stage == "curate":
        return Build(
            workspace.get(f"ingest/{inputs['ingest']}"), artifact, _made_of(workspace, "tokenize", artifact, None)
        )
    for role in ("tokenize", "curate"):
        if role in inputs:
            return of_ref(workspace, f"{role}/{inputs[role]}")
    raise NotFoundError(
        "this artifact was made of no documents", got=artifact.ref, wanted="ingest, curate, tokenize or later"
    )


def every(workspace: Workspace) -> Iterator[Build]:
    """All builds, the newest first; nothing is read before the first is asked for."""
    found = []
    seen: set[str] = set()
    for stage in reversed(STAGES):
        for artifact in artifacts(workspace, stage):
            if artifact.ref in seen:
                continue
            try:
                build = of_ref(workspace, artifact.ref)
            except ArtifactError as error:
                say(f"  {artifact.ref} is passed over: {error}")
                continue
            seen.update(build.refs.values())
            found.append(build)
    yield from sorted(found, key=lambda build: build.last.manifest.created, reverse=True)


def _grown(workspace: Workspace, ingest: Artifact, config: ForgeConfig | None) -> Build:
    curate = _made_of(workspace, "curate", ingest, config)
    return Build(ingest, curate, _made_of(workspace, "tokenize", curate, config) if curate else None)


def _made_of(workspace: Workspace, stage: str, of: Artifact, config: ForgeConfig | None) -> Artifact | None:
    """The newest artifact of a stage that was made of this one, by this configuration where one is given."""
    for artifact in artifacts(workspace, stage):
        is_child = artifact.manifest.inputs.get(of.manifest.stage) == of.manifest.fingerprint
        if is_child and (config is None or _same_config(artifact, config)):
            return artifact
    return None


def _same_config(artifact: Artifact, config: ForgeConfig) -> bool:
    kinds = {"curate": (CurateConfig,), "tokenize": (TokenizeConfig, TokenizerConfig)}[artifact.manifest.stage]
    names = {CurateConfig: "curate", TokenizeConfig: "tokenize", TokenizerConfig: "tokenizer"}
    try:
        return all(
            kind.model_validate(artifact.manifest.config[names[kind]]).fingerprinted()
            == getattr(config, names[kind]).fingerprinted()
            for kind in kinds
        )
    except (ValueError, KeyError):  # written by another version, whose fields were others
        return False


# ----------------------------------------------------------------------------------------------------- looking up


@dataclass(frozen=True)
class Found:
    """A document's row of the ledger (its columns by name) and the build that it stands in."""

    row: dict[str, Any]
    build: Build

    @property
    def id(self) -> str:
        """The document's id."""
        return str(self.row["id"])


def find(name: str, first: Build, others: Iterable[Build] = ()) -> Found:
    """The document of that id, unique prefix of an id, key or source.

    Args:
        first: Where to look first.
        others: Where to look, in turn, for what is not there; read no further than need be.

    Raises:
        ArtifactError: More than one document has that name; the message lists them.
        NotFoundError: None has; the message lists the nearest.
    """
    searched: set[str] = set()
    for build in chain((first,), others):
        rows = _look_up(name, build, first, searched)
        if not rows:
            continue
        if len({row["id"] for row in rows}) > 1:
            raise ArtifactError(
                "more than one document has that name",
                got=name,
                wanted="\n    ".join(["one of", *(_shown(row) for row in rows[:_NEAR_SHOWN])])
                + (f"\n    and {len(rows) - _NEAR_SHOWN} more" if len(rows) > _NEAR_SHOWN else ""),
                do="give the id",
            )
        return Found(rows[0], build)
    near = _near(name, first)
    raise NotFoundError(
        "no document of that name",
        got=f"{name}; looked in {first.last.ref} and earlier builds",
        wanted="\n    ".join(["an id, its beginning, a key or a source; near are", *near]) if near else None,
        do="`forge data report` counts what there is, by source",
    )


def _look_up(name: str, build: Build, first: Build, searched: set[str]) -> list[dict[str, Any]]:
    """The rows that match best; files that were searched before are not searched again."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    # A source that is a local file may be named relative to where one stands.
    sources = [name] if "://" in name else [name, os.path.abspath(name)]
    wanted = (ds.field("id") == name) | (ds.field("key") == name) | ds.field("source").isin(sources)
    is_prefix = bool(re.fullmatch("[0-9a-f]{3,15}", name))
    if is_prefix:
        wanted |= pc.starts_with(ds.field("id"), pattern=name)
    ranked: dict[int, list[dict[str, Any]]] = {}
    for file in files(build):
        if file.sha256 in searched:
            continue
        searched.add(file.sha256)
        try:
            rows = file.rows(wanted, _MOST_MATCHES)
        except ArtifactError as error:
            if build is first:
                raise
            say(f"  passed over: {error.what}")  # an earlier build, of which something was erased
            continue
        for row in rows:
            rank = _BY_ID if row["id"] == name else _BY_KEY if row["key"] == name else _BY_SOURCE
            if rank == _BY_SOURCE and row["source"] not in sources:
                rank = _BY_PREFIX
            ranked.setdefault(rank, []).append(row)
    return ranked[min(ranked)] if ranked else []


def _near(name: str, build: Build) -> list[str]:
    """Documents whose source holds the last part of the name, or is written nearly like it."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    tail = name.rstrip("/").rpartition("/")[2] or name
    wanted = pc.match_substring(ds.field("source"), tail, ignore_case=True)
    found: list[str] = []
    by_key: dict[str, str] = {}
    for file in files(build):
        found += [_shown(row) for row in file.rows(wanted, _NEAR_SHOWN - len(found))]
        if len(found) >= _NEAR_SHOWN:
            return found
        if len(by_key) < _NEAR_ROWS:
            by_key |= {row["key"] or row["source"]: _shown(row) for row in file.rows(None, _NEAR_ROWS - len(by_key))}
    return found or [by_key[key] for key in difflib.get_close_matches(name, by_key, n=_NEAR_SHOWN)]


def _shown(row: dict[str, Any]) -> str:
    return f"{row['id']}  {row['source'] or row['key']}  {row.get('fate') or ''}".rstrip()


@dataclass(frozen=True)
class File:
    """A file of rows: a part of a ledger, or of documents that nobody has curated yet."""

    artifact: Artifact
    name: str

    @property
    def sha256(self) -> str:
        """Its content's name."""
        return self.artifact.entry(self.name).sha256

    @property
    def part(self) -> str:
        """The part of documents that it tells of; empty for what was skipped."""
        part = self.name.removeprefix(ledger.PREFIX)
        return part if part.startswith(SPLITS) else ""

    def batches(self, columns: list[str] | None = None, wanted: ds.Expression | None = None) -> Iterator[Any]:
        """Its rows as Arrow batches, verified; columns that it lacks are left out."""
        import pyarrow.dataset as ds

        path = self.artifact.local_path(self.name)  # the dataset opens it late, by name
        dataset = ds.dataset(path, format="parquet")
        chosen = [name for name in columns or dataset.schema.names if name in dataset.schema.names and name != "text"]
        yield from dataset.scanner(
            columns=chosen, filter=wanted, batch_size=1 << 16, batch_readahead=1, fragment_readahead=1
        ).to_batches()

    def rows(self, wanted: ds.Expression | None, limit: int) -> list[dict[str, Any]]:
        """Up to so many of the rows that are wanted, as ledger rows."""
        found: list[dict[str, Any]] = []
        for batch in self.batches(wanted=wanted):
            if len(found) >= limit:
                break
            found += batch.slice(0, limit - len(found)).to_pylist()
        if not self.name.startswith(ledger.PREFIX):
            empty = dict.fromkeys(ledger.schema().names)
            found = [{**empty, **row, "split": self.part.partition("-")[0], "fate": ledger.KEPT} for row in found]
        return found


def files(build: Build) -> list[File]:
    """The files that hold a row for every document of a build."""
    found = [File(build.last, name) for name in ledger.parts(build.last)]
    if build.last is build.ingest:
        found += [File(build.ingest, name) for name in build.ingest.names(".parquet") if name.startswith(SPLITS)]
    return found
