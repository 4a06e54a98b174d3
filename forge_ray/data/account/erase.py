"""Erasure: the bytes of forgotten documents are deleted from a workspace, on record.

```
<workspace>/erasures/<time>-<digest>.json    documents, reason, who, what is deleted, what had seen it, what is left
                    /<time>-<digest>.done    there once all of it is deleted
```

The record is written before the first byte is deleted, create-only, so a process that is killed leaves its plan, and
the same command finishes it. Manifests and ledgers stay: the lineage of a model must remain readable, and a ledger
holds no text. Whoever reads a deleted blob is told so (`Workspace.missing`).

What holds a document is told by content, not by bookkeeping: every blob that is a part of documents or a token shard is
asked for the ids in it, those of other jobs and of killed runs included. With a cleaned part go the features and fates
that were made of it, unless an artifact without the document has the same ones; with a held-out document go all n-grams
that are remembered of held-out documents, which bear no names. Owns that search, the record and the
deleting. Tombstones are `forget.py`; making the builds anew, without the documents, comes first and is the pipeline's.

Cost: reads the first bytes of each blob of documents, the column of ids of each part and the table of each shard, eight
at a time.
Not covered: a stage that runs meanwhile may store a document once more (the command says which ones run; call it again
when they are done), damaged blobs, and all that `left` names in the record.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

from forge_ray import garbage
from forge_ray.artifact import Artifact, Workspace, cache_folder, digest_bytes
from forge_ray.data import shards
from forge_ray.data.account import builds, explain, forget, ledger
from forge_ray.data.account.forget import ERASURES
from forge_ray.errors import ArtifactError, DataError, NotFoundError
from forge_ray.storage import TEMP_PREFIX
from forge_ray.telemetry import format_bytes, say

if TYPE_CHECKING:
    import pyarrow as pa

_SCANNERS = 8
_COPY_GRACE_S = 3600.0
_OF_DOCUMENTS = ("ingest", "curate", "tokenize")
_NO_TEXT = (ledger.PREFIX, "fates/", "features/", "parts.json", "layout.parquet", shards.INDEX)
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Erased:
    """What a call did: the records that it finished, and blobs that nobody can read, so that nobody knows."""

    records: tuple[dict[str, Any], ...]
    unreadable: tuple[str, ...] = ()


def erase(
    workspace: Workspace,
    rows: Sequence[Mapping[str, Any]],
    why: str,
    builds_now: Sequence[Artifact],
    same: Sequence[Mapping[str, Any]] = (),
) -> Erased:
    """Deletes every blob that holds one of these documents, after finishing what an earlier call has begun.

    Args:
        rows: The documents' rows of the ledger; they have tombstones.
        why: The reason, for the record.
        builds_now: The artifacts that were made without them.
        same: Other documents that say the same, or nearly, and stay; the record names them.

    Raises:
        DataError: One of these artifacts holds one of the documents all the same; nothing is deleted.
    """
    records = [_finish(workspace, name) for name in unfinished(workspace)]
    ids = {row["id"] for row in rows}
    holding, unreadable = _holding(workspace, ids)
    for artifact in builds_now:
        for entry in artifact.manifest.files:
            if entry.sha256 in holding:
                raise DataError(
                    "the new build still holds a document that is to be erased; nothing was deleted",
                    got=f"{artifact.ref}:{entry.name}",
                    do="report this with the tombstone of the document: it is a defect",
                )
    if holding:
        name = _record(workspace, rows, why, holding, builds_now, same)
        records.append(_finish(workspace, name))
    return Erased(tuple(records), tuple(unreadable))


def unfinished(workspace: Workspace) -> list[str]:
    """Names of the records whose deleting was cut off."""
    names = workspace.storage.list(ERASURES)
    done = {name.removesuffix(".done") for name in names}
    return [name for name in names if name.endswith(".json") and name.removesuffix(".json") not in done]


def running(workspace: Workspace) -> list[str]:
    """Stages that run now, or were killed within the time that their marker counts."""
    found = []
    for name in garbage.active(workspace):
        try:
            marker = json.loads(workspace.storage.read_bytes(name))
            found.append(f"{marker['stage']}/{name.split('/')[1]} on {marker['host']}")
        except (NotFoundError, ValueError, KeyError):
            continue
    return found


# ------------------------------------------------------------------------------------------------------- the record


def _record(
    workspace: Workspace,
    rows: Sequence[Mapping[str, Any]],
    why: str,
    holding: Mapping[str, int],
    builds_now: Sequence[Artifact],
    same: Sequence[Mapping[str, Any]],
) -> str:
    """Writes down all that is going to happen."""
    sizes = dict(holding) | _companions(workspace, set(holding))
    if any(row["split"] == "heldout" for row in rows):
        sizes |= _ngrams(workspace)
    manifests = [artifact for stage in _OF_DOCUMENTS for artifact in builds.artifacts(workspace, stage)]
    hit = [a.ref for a in manifests if any(entry.sha256 in sizes for entry in a.manifest.files)]
    places = explain.places_of(workspace, {row["id"] for row in rows})
    readers, unknown = explain.readers_of(workspace, places)
    when = datetime.now(UTC)
    body = {
        "documents": [{name: row[name] for name in ("id", "key", "origin", "source")} for row in rows],
        "why": why,
        "who": forget.user(),
        "when": when.isoformat(timespec="seconds"),
        "blobs": [{"sha256": sha256, "size_bytes": sizes[sha256]} for sha256 in sorted(sizes)],
        "memories": [name for name, data in _memories(workspace, "memo") if not set(_digests(data)).isdisjoint(sizes)],
        "artifacts": sorted(hit),
        "other_jobs": _other_jobs(workspace, set(hit) - {artifact.ref for artifact in builds_now}),
        "shards": sorted({place.shard for place in places}),
        "readers": [{"kind": reader.kind, "ref": reader.ref} for reader in readers],
        "runs_that_do_not_say": list(unknown),
        "left": [*_left(workspace, rows, hit, readers), *_kept_copies(same)],
    }
    data = json.dumps(body, indent=1).encode()
    name = f"{ERASURES}/{when:%Y%m%dT%H%M%SZ}-{digest_bytes(data)[:16]}.json"
    workspace.storage.create(name, data)
    return name


def _other_jobs(workspace: Workspace, hit: set[str]) -> list[str]:
    """Artifacts that are the newest of some other job and lose files, so that the job must be run again."""
    names = workspace.storage.list("refs/lineage/ingest")
    return sorted(hit.intersection(workspace.storage.read_bytes(name).decode() for name in names))


def _left(
    workspace: Workspace,
    rows: Sequence[Mapping[str, Any]],
    hit: Sequence[str],
    readers: Sequence[explain.Reader],
) -> list[str]:
    """What is not erased, in words."""
    left = []
    trained = [reader.ref for reader in readers if reader.kind != "evaluation"]
    if trained:
        left.append(
            f"weights, checkpoints and exports of {', '.join(trained)}: what they have learned stays in them until a "
            "model is trained anew"
        )
    curated = {ref.partition("/")[2] for ref in hit if ref.startswith("curate/")}
    vocabularies = [
        artifact.ref
        for artifact in builds.artifacts(workspace, "tokenizer")
        if artifact.manifest.inputs.get("curate") in curated
    ]
    if vocabularies:
        left.append(
            f"the vocabularies {', '.join(vocabularies)}, learned from a sample of earlier documents; --tokenizer.keep "
            "false trains one without, and writes all shards anew"
        )
    reports = [
        artifact.ref
        for stage in ("evaluate", "sweep")
        for artifact in builds.artifacts(workspace, stage)
        if artifact.manifest.inputs.get("curate") in curated
    ]
    if reports:
        left.append(f"samples, scores and terms in the reports {', '.join(reports)}, which may quote a document")
    left.append("ids, keys and sources of the documents in ledgers, tombstones and this record")
    left.append("caches of other machines, backups, and versions or snapshots that the store itself keeps")
    left.append("the sources: " + ", ".join(sorted({str(row["source"]) for row in rows})))
    return left


def _kept_copies(same: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"documents that say the same, or nearly: {', '.join(str(row['id']) for row in same)}"] if same else []


def _finish(workspace: Workspace, name: str) -> dict[str, Any]:
    """Deletes what a record lists, from the store and this machine's caches, and marks the record as done."""
    record: dict[str, Any] = json.loads(workspace.storage.read_bytes(name))
    gone = {blob["sha256"] for blob in record["blobs"]}
    for memory in record["memories"]:
        workspace.storage.delete(memory)  # first: a memory must not promise what is going
    for sha256 in sorted(gone):
        workspace.storage.delete(f"blobs/{sha256[:2]}/{sha256}")
    _clear_caches(gone)
    _clear_leftovers(workspace)
    workspace.storage.create(
        f"{name.removesuffix('.json')}.done",
        json.dumps({"finished": datetime.now(UTC).isoformat(timespec="seconds")}).encode(),
    )
    size = sum(blob["size_bytes"] for blob in record["blobs"])
    say(f"  erased {len(gone)} files, {format_bytes(size)}: {name}")
    return record | {"record": name}


def _clear_leftovers(workspace: Workspace) -> None:
    """Deletes what writers left that were cut off more than an hour ago, whatever it holds."""
    garbage.delete(workspace, garbage.leftovers(workspace))


def _clear_caches(gone: set[str]) -> None:
    """Deletes this machine's copies, and downloads that were cut off."""
    root = cache_folder("blobs").parent
    for path in root.rglob("*"):
        if not path.is_file():
            continue
        named = _DIGEST.search(path.name)
        is_old = path.name.startswith(TEMP_PREFIX) and time.time() - path.stat().st_mtime > _COPY_GRACE_S
        if is_old or (named and named[0] in gone):
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- the search


def _holding(workspace: Workspace, ids: set[str]) -> tuple[dict[str, int], list[str]]:
    """Digest and size of each blob that holds text or tokens of one of the documents; and what cannot be read."""
    sizes: dict[str, int] = {}
    unreadable: list[str] = []

    def look(name: str) -> None:
        sha256 = name.rpartition("/")[2]
        try:
            with workspace.storage.open_read(name) as stream:
                if any(ids.intersection(found) for found in _ids(stream)):
                    sizes[sha256] = workspace.storage.size_bytes(name)
        except NotFoundError:  # deleted in the meantime
            return
        except (ValueError, OSError, KeyError, TypeError, struct.error) as error:  # pyarrow's are the first two
            unreadable.append(f"{name}: {str(error)[:200]}")

    dull = _without_text(workspace)
    names = [name for name in workspace.storage.list("blobs") if name.rpartition("/")[2] not in dull]
    with ThreadPoolExecutor(_SCANNERS) as pool:
        list(pool.map(look, names))
    return sizes, sorted(unreadable)


def _ids(stream: IO[bytes]) -> Iterator[list[str]]:
    """The ids of the documents in a part or a shard, in batches; none for any other file."""
    import pyarrow.parquet as pq

    magic = stream.read(8)
    stream.seek(0)
    if magic == shards.MAGIC:
        yield _table(stream)["id"].to_pylist()
    elif magic.startswith(b"PAR1"):
        file = pq.ParquetFile(stream)
        if {"id", "text"} <= set(file.schema_arrow.names):
            for batch in file.iter_batches(columns=["id"]):
                yield batch["id"].to_pylist()


def _table(stream: IO[bytes]) -> pa.Table:
    """The document table of a shard on any store, without its tokens."""
    import numpy as np
    import pyarrow as pa

    length = struct.unpack("<8sII", stream.read(16))[2]
    header = shards.Header(**json.loads(stream.read(length)))
    stream.seek(shards.tokens_at(length) + header.num_tokens * np.dtype(header.dtype).itemsize)
    return pa.ipc.open_stream(stream.read()).read_all()


def _without_text(workspace: Workspace) -> set[str]:
    """Blobs that need no look: those of checkpoints, models and reports, and of artifacts of documents all but parts
    and shards. What a manifest calls two things is looked at."""
    dull: set[str] = set()
    other: set[str] = set()
    for ref in workspace.refs_of_artifacts():
        try:
            artifact = workspace.get(ref)
        except ArtifactError:
            continue  # its blobs are looked at, one by one
        for entry in artifact.manifest.files:
            is_dull = artifact.manifest.stage not in _OF_DOCUMENTS or entry.name.startswith(_NO_TEXT)
            (dull if is_dull else other).add(entry.sha256)
    return dull - other


def _companions(workspace: Workspace, holding: set[str]) -> dict[str, int]:
    """Features and fates that were made of the cleaned parts that go, and that nothing which stays has too."""
    sizes: dict[str, int] = {}
    kept: set[str] = set()
    for clean, companions in chain(_groups(workspace), _remembered(workspace)):
        if clean in holding:
            sizes.update(companions)
        else:
            kept.update(companions)
    for stage in _OF_DOCUMENTS:
        for artifact in builds.artifacts(workspace, stage):
            kept.update(artifact.entry(name).sha256 for name in ledger.parts(artifact))
    return {sha256: size for sha256, size in sizes.items() if sha256 not in kept}


def _groups(workspace: Workspace) -> Iterator[tuple[str, dict[str, int]]]:
    """For each cleaned part of every artifact: its digest, and what was made with it."""
    for artifact in builds.artifacts(workspace, "curate"):
        entries = {entry.name: entry for entry in artifact.manifest.files}
        for name, clean in entries.items():
            if name.startswith("clean/"):
                found = [entries.get(f"{kind}/{name.removeprefix('clean/')}") for kind in ("features", "fates")]
                yield clean.sha256, {entry.sha256: entry.size_bytes for entry in found if entry}


def _ngrams(workspace: Workspace) -> dict[str, int]:
    """What `contamination.py` remembers of held-out documents: hashes of their n-grams, made again when wanted."""
    sizes: dict[str, int] = {}
    for folder in ("memo/evaluation", "memo/evaluation-joined"):
        for _, data in _memories(workspace, folder):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged: of no use to anyone
                files = [run["$file"] for row in json.loads(data)["rows"] for run in row["runs"]]
                sizes |= {sha256: size for _, sha256, size in files}
    return sizes


def _remembered(workspace: Workspace) -> Iterator[tuple[str, dict[str, int]]]:
    """The same of the memories of the first pass, which a killed run leaves without a manifest."""
    for _, data in _memories(workspace, "memo/clean"):
        try:
            for row in json.loads(data)["rows"]:
                found = {kind: row[kind]["$file"] for kind in ("clean", "features", "fates") if row.get(kind)}
                if "clean" in found:
                    yield found.pop("clean")[1], {sha256: size for _, sha256, size in found.values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged, so of no use to anyone


def _memories(workspace: Workspace, folder: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the records below a folder; one that goes in the meantime is empty."""

    def read(name: str) -> bytes:
        try:
            return workspace.storage.read_bytes(name)
        except NotFoundError:
            return b""

    names = workspace.storage.list(folder)
    with ThreadPoolExecutor(_SCANNERS) as pool:
        yield from zip(names, pool.map(read, names), strict=True)


def _digests(data: bytes) -> list[str]:
    return _DIGEST.findall(data.decode(errors="replace"))
