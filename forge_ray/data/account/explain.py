"""The answer to `forge data why`: what became of one document, and who has read it.

Owns putting together the ledger's row, the token shards that hold the document in any build, the runs and models that
read those shards, and documents that say the same. Finding the row is `builds.py`.

Cost: reads every ledger of the workspace once, a column or two of each, files that builds share only once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from forge_ray.artifact import Artifact, Workspace
from forge_ray.data.account import builds, forget, ledger
from forge_ray.data.account.builds import Build, File, Found
from forge_ray.errors import ArtifactError, NotFoundError
from forge_ray.telemetry import format_bytes, say

_SHOWN = 12
_COPY_STEPS = ["exact", "near"]
_MOST_DUPLICATES = 100_000


@dataclass(frozen=True)
class Place:
    """Where a document's tokens lie: a shard, the artifacts that have it, the tokens from `offset` on."""

    id: str
    origin: str
    split: str
    shard: str
    name: str
    part: str
    offset: int
    tokens: int
    tokenize: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """What was made with a shard: `kind` is run (not finished), model, export or evaluation.

    `passes` says how often the run has read the document's source, on average over its sequences: below 1 the document
    may not have been among them. None where that is not known.
    """

    kind: str
    ref: str
    tokenize: str
    passes: float | None = None


@dataclass(frozen=True)
class Answer:
    """All that is known of a document."""

    found: Found
    is_newest: bool
    places: tuple[Place, ...] = ()
    readers: tuple[Reader, ...] = ()
    duplicates: tuple[dict[str, Any], ...] = ()
    original: dict[str, Any] | None = None
    tombstone: dict[str, Any] | None = None
    erasures: tuple[dict[str, Any], ...] = ()
    unknown_runs: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        row = {name: value for name, value in self.found.row.items() if value is not None}
        return {
            "document": row | {"found": dict(row.get("found") or ())},
            "build": self.found.build.refs,
            "is_newest_build": self.is_newest,
            "places": [asdict(place) for place in self.places],
            "readers": [asdict(reader) for reader in self.readers],
            "runs_that_do_not_say": list(self.unknown_runs),
            "duplicate_of": self.original and brief(self.original),
            "duplicates": [brief(row) for row in self.duplicates],
            "tombstone": self.tombstone,
            "erasures": [record["record"] for record in self.erasures],
        }


def why(workspace: Workspace, name: str, build: Build) -> Answer:
    """What became of the document of that id, unique prefix of an id, key or source.

    Args:
        build: The build whose word counts; a document that is not in it is looked for in all others.

    Raises:
        NotFoundError: No build has such a document; the message lists the nearest.
        ArtifactError: Several have that name.
    """
    found = builds.find(name, build, builds.every(workspace))
    places = tuple(places_of(workspace, {found.id}))
    readers, unknown = readers_of(workspace, places)
    rows = duplicates(found)
    original = next((row for row in rows if row["id"] == found.row["duplicate_of"]), None)
    if original is None and found.row["duplicate_of"]:
        original = row_of(found.build, found.row["duplicate_of"])
    stones = {stone["id"]: stone for stone in forget.tombstones(workspace)}
    return Answer(
        found=found,
        is_newest=found.build.refs == build.refs,
        places=places,
        readers=readers,
        duplicates=tuple(row for row in rows if row is not original),
        original=original,
        tombstone=stones.get(found.id),
        erasures=tuple(forget.erasures_of(workspace, {found.id})),
        unknown_runs=unknown,
    )


def duplicates(found: Found) -> list[dict[str, Any]]:
    """The other documents that were found to say the same, exactly or nearly, by their rows of the ledger.

    What a document was dropped for may itself have been dropped for a third one, so this goes up and then down. It
    reads the ledger once for each step on the way, of which there are few: exact and near are two steps.
    """
    import pyarrow.dataset as ds

    root, seen = found.row, {found.id}
    while _is_copy(root):
        above = row_of(found.build, root["duplicate_of"])
        if above is None or above["id"] in seen:
            break
        seen.add(above["id"])
        root = above
    rows = {root["id"]: root}
    new = {root["id"]}
    while new and len(rows) < _MOST_DUPLICATES:
        wanted = ds.field("step").isin(_COPY_STEPS) & ds.field("duplicate_of").isin(sorted(new))
        below = [row for file in _of_ledger(found.build) for row in file.rows(wanted, _MOST_DUPLICATES)]
        new = {row["id"] for row in below} - set(rows)
        rows |= {row["id"]: row for row in below}
    rows.pop(found.id, None)
    return list(rows.values())


def _is_copy(row: Mapping[str, Any]) -> bool:
    return bool(row["duplicate_of"]) and row["step"] in _COPY_STEPS


def row_of(build: Build, doc_id: str) -> dict[str, Any] | None:
    """The row of a document in a build's ledger; none if it is not there."""
    import pyarrow.dataset as ds

    return next((row for file in _of_ledger(build) for row in file.rows(ds.field("id") == doc_id, 1)), None)


def _of_ledger(build: Build) -> Iterator[File]:
    return (file for file in builds.files(build) if file.name.startswith(ledger.PREFIX))


def places_of(workspace: Workspace, ids: set[str]) -> list[Place]:
    """Where these documents' tokens lie or lay, in any published build; erased shards included."""
    import pyarrow.dataset as ds

    tokenized = builds.artifacts(workspace, "tokenize")
    holding: dict[str, list[Artifact]] = {}
    names: dict[str, str] = {}
    for artifact in tokenized:
        for entry in artifact.manifest.files:
            holding.setdefault(entry.sha256, []).append(artifact)
            names.setdefault(entry.sha256, entry.name)
    wanted = ds.field("id").isin(sorted(ids)) & ds.field("shard").is_valid()
    searched: set[str] = set()
    found: dict[tuple[str, str, int], Place] = {}
    for artifact in tokenized:
        for file in (File(artifact, name) for name in ledger.parts(artifact)):
            if file.sha256 in searched:
                continue
            searched.add(file.sha256)
            try:
                rows = file.rows(wanted, 2 * len(ids) + _SHOWN)
            except ArtifactError as error:
                say(f"  passed over: {error}")
                continue
            for row in rows:
                place = _place(row, file, holding.get(row["shard"], [artifact]), names.get(row["shard"], ""))
                found[place.id, place.shard, place.offset] = place
    return list(found.values())


def _place(row: dict[str, Any], file: File, holding: Sequence[Artifact], name: str) -> Place:
    return Place(
        id=row["id"],
        origin=row["origin"],
        split=row["split"],
        shard=row["shard"],
        name=name,
        part=file.part,
        offset=row["offset"],
        tokens=row["tokens"],
        tokenize=tuple(artifact.ref for artifact in holding),
    )


def readers_of(workspace: Workspace, places: Sequence[Place]) -> tuple[tuple[Reader, ...], tuple[str, ...]]:
    """Who has read these shards, and the unfinished runs that do not say which shards they read.

    A published model is told by its manifest, an unfinished run by its log. A run counts as a reader of every training
    shard of its artifact, an evaluation of every held-out one.
    """
    refs = {ref.partition("/")[2]: ref for place in places for ref in place.tokenize}
    splits = {place.split for place in places}
    origins = {place.origin for place in places}
    found: list[Reader] = []
    for stage, kind, split in (
        ("pretrain", "model", "train"),
        ("export", "export", "train"),
        ("evaluate", "evaluation", "heldout"),
    ):
        for artifact in builds.artifacts(workspace, stage) if split in splits else ():
            tokenize = refs.get(artifact.manifest.inputs.get("tokenize", ""))
            if tokenize:
                found.append(Reader(kind, artifact.ref, tokenize, _passes(workspace, artifact, origins)))
    if "train" not in splits:
        return tuple(found), ()
    unknown = []
    for run_id in _unfinished(workspace):
        tokenize = _shards_of(workspace, run_id)
        if tokenize is None:
            unknown.append(run_id)
        elif tokenize in refs.values():
            found.append(Reader("run", f"runs/{run_id}", tokenize))
    return tuple(found), tuple(unknown)


def _passes(workspace: Workspace, artifact: Artifact, origins: set[str]) -> float | None:
    """How often training went over these sources, for a model and what was made of it; the most of several."""
    if artifact.manifest.stage == "export":
        try:
            artifact = workspace.get(f"pretrain/{artifact.manifest.inputs['pretrain']}")
        except (ArtifactError, KeyError):
            return None
    by_source = artifact.metrics.get("epochs_by_source") or {}
    epochs = [by_source[origin] for origin in origins if origin in by_source] or [artifact.metrics.get("epochs")]
    return max((float(number) for number in epochs if number is not None), default=None)


def _unfinished(workspace: Workspace) -> list[str]:
    """Runs that have checkpoints, or a log of steps, and no published model."""
    names = workspace.storage.list("runs")
    runs = {name.split("/")[1] for name in names if "/checkpoints/" in name or "/events/" in name}
    return sorted(run_id for run_id in runs if not workspace.has(f"pretrain/{run_id}"))


def _shards_of(workspace: Workspace, run_id: str) -> str | None:
    """The artifact whose shards a run reads, as the first record of its log says; a log may be long."""
    for name in workspace.storage.list(f"runs/{run_id}/events"):
        try:
            with workspace.storage.open_read(name) as stream:
                record = json.loads(stream.readline(1 << 16))
        except (NotFoundError, ValueError):
            continue
        if record.get("event") == "start" and "shards" in record:
            return str(record["shards"])
    return None


# ------------------------------------------------------------------------------------------------------------ text


def as_text(answer: Answer) -> str:
    """For a terminal."""
    row, build = answer.found.row, answer.found.build
    rows = [("document", f"{row['id']}  {row['key'] or ''}".rstrip()), ("from", row["source"])]
    facts = [
        f"source {row['origin']}" if row["origin"] else "",
        row["licence"],
        row["language"],
        row["created"] and f"created {row['created']}",
        format_bytes(row["bytes_in"]) if row["bytes_in"] is not None else "",
        {"train": "for training", "heldout": "held out for evaluation"}.get(row["split"] or "", ""),
    ]
    rows += [("", ", ".join(fact for fact in facts if fact))] if any(facts) else []
    rows += [("fate", line) for line in _fate(answer)]
    rows += [("changed", line) for line in _changes(row)]
    if answer.original:
        rows.append(("kept instead" if row["step"] in _COPY_STEPS else "overlaps", one_line(answer.original)))
    elif row["duplicate_of"]:
        rows.append(("overlaps", row["duplicate_of"]))
    rows += lines("says the same", [one_line(other) for other in answer.duplicates])
    gone = {blob["sha256"] for record in answer.erasures for blob in record["blobs"]}
    where = [place_text(place) + (", erased" if place.shard in gone else "") for place in answer.places]
    rows += lines("tokens in", where)
    rows += lines("read by", [reader_text(reader) for reader in answer.readers])
    if answer.unknown_runs:
        ids = ", ".join(answer.unknown_runs[:_SHOWN])
        rows.append(("perhaps by", f"unfinished runs whose log does not say which shards they read: {ids}"))
    if answer.places and not answer.readers and not answer.unknown_runs:
        rows.append(("read by", "no run yet"))
    note = "" if answer.is_newest else ", an earlier build: the newest does not have it"
    rows.append(("build", f"{build.last.ref} of {build.last.manifest.created}{note}"))
    return table(rows)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Labels and what they say in two columns; a label that repeats is shown once.

    Names come from documents: what could steer a terminal is shown as a question mark.
    """
    width = max(len(label) for label, _ in rows)
    printed, last = [], ""
    for label, text in rows:
        shown = "".join(mark if mark.isprintable() else "?" for mark in text)
        printed.append(f"{'' if label == last else label:<{width}}  {shown}".rstrip())
        last = label
    return "\n".join(printed)


def _fate(answer: Answer) -> list[str]:
    row = answer.found.row
    reason = "" if row["reason"] == row["step"] else f": {row['reason']}"
    reason += f" ({row['detail']})" if row["detail"] else ""
    if row["fate"] == ledger.KEPT:
        where = {"tokenize": "", "curate": ", not tokenized yet", "ingest": ", not curated yet"}
        stage = answer.found.build.last.manifest.stage
        said = [f"kept{where[stage]}"]
        if answer.tombstone:
            said.append("to be forgotten: the next build leaves it out")
    elif row["fate"] == ledger.FORGOTTEN:
        said = ["forgotten"]
    else:
        said = [f"{row['fate']} by {row['step']}{reason}"]
    if answer.tombstone:
        stone = answer.tombstone
        said.append(f"tombstone of {stone['when']} by {stone['who']}: {stone['why'] or 'no reason given'}")
    said += [f"erased on {record['when']} by {record['who']}: {record['record']}" for record in answer.erasures]
    return said


def _changes(row: dict[str, Any]) -> list[str]:
    said = []
    found = dict(row["found"] or ())
    if found:
        said.append("private details found: " + ", ".join(f"{count} {kind}" for kind, count in found.items()))
    if row["lines_removed"]:
        said.append(f"{row['lines_removed']} lines removed that other documents have too")
    if row["bytes_out"] and row["bytes_out"] != row["bytes_in"]:
        said.append(f"{row['bytes_in']:,} bytes before, {row['bytes_out']:,} after")
    return said


def lines(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """A label and the first of its texts, for `table`."""
    rows = [(label, text) for text in texts[:_SHOWN]]
    return rows + ([(label, f"and {len(texts) - _SHOWN:,} more; --json lists all")] if len(texts) > _SHOWN else [])


def one_line(row: dict[str, Any]) -> str:
    """A document and its fate."""
    how = f", {row['fate']}" + (f" by {row['step']}" if row["step"] else "")
    return f"{row['id']}  {row['source']}{how}"


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """What tells a document from others."""
    return {name: row[name] for name in ("id", "key", "origin", "source", "fate", "step")}


def place_text(place: Place) -> str:
    """Where tokens lie, in words."""
    more = f" and {len(place.tokenize) - 1} more builds" if len(place.tokenize) > 1 else ""
    last = place.offset + place.tokens
    return f"{place.name} of {place.tokenize[0]}{more}, tokens {place.offset:,} to {last:,}, sha256 {place.shard}"


def reader_text(reader: Reader) -> str:
    """Who has read a shard, in words."""
    if reader.kind == "evaluation":
        return f"{reader.ref}, which scored held-out documents"
    if reader.passes is None:
        return f"{reader.ref}, unfinished" if reader.kind == "run" else reader.ref
    if reader.passes >= 1:
        return f"{reader.ref}, which went over its source {reader.passes:.2f} times"
    return f"{reader.ref}, which read {reader.passes:.0%} of its source, perhaps without this document"
