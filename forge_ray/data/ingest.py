"""Ingest: documents from sources into one Parquet layout, whole groups of them held out for evaluation.

Owns document ids, the hold-out and the account of what was skipped or is to be forgotten. Which files are read together
is `layout.py`, reading them `formats.py` and `botocore_docs.py`. Does not clean or deduplicate (`curate.py`).

The artifact:

```
train-00000.parquet, heldout-00000.parquet ...   documents of one source each, with the columns of SCHEMA_FIELDS
ledger-skipped-00000.parquet ...                 what was left out, and why (ledger.py)
parts.json                                       for each part: split, generation, origin, documents, bytes
layout.parquet                                   which files were read together
```

Ids and groups hold no absolute path: a corpus that moves to another folder or store keeps both. Work is done by units
of files and remembered (`memo.py`): what was read is not read again when files are added or a run was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from forge_ray.artifact import Artifact, FileEntry, Workspace, digest_bytes
from forge_ray.config import BotocoreSource, IngestConfig, Source
from forge_ray.data import layout
from forge_ray.data.account import forget, ledger
from forge_ray.data.reading.formats import LARGE, SHORT, Document, Skipped
from forge_ray.errors import DataError
from forge_ray.memo import Memo
from forge_ray.runtime import map_rows
from forge_ray.telemetry import format_bytes, say

SCHEMA_FIELDS = ("id", "key", "group", "origin", "source", "licence", "language", "created", "metadata", "text")
FORMAT_VERSION = 4
PARTS = "parts.json"
SPLITS = ("train", "heldout")
_OF_THE_WHOLE = ("sources", "max_unreadable_frac")
_SHOWN_SKIPS = 3
_SHOWN_GROUPS = 100
# Rows wait in lists, some 500 bytes each beside the text, until a file of them is written: short documents close a part
# before `part_bytes` do, and a file of a hundred million broken lines takes no more memory than one of a thousand.
_PART_ROWS = 1 << 17
_SKIPPED_ROWS = 1 << 16


@dataclass(frozen=True)
class Part:
    """A row of `parts.json`."""

    name: str
    split: str
    generation: int
    origin: str
    documents: int
    bytes: int


def observe(config: IngestConfig, workspace: Workspace) -> dict[str, Any]:
    """The state of every source now and what is to be forgotten: what the fingerprint holds instead of a mutable URI.

    Raises:
        ConfigError: No source is configured.
        StorageError: A source does not exist or cannot be listed.
        DataError: A source holds no readable file.
    """
    units = layout.plan(config, workspace)
    return {
        "layout": layout.digest(units),
        "files": sum(len(unit.rows) for unit in units),
        "bytes": sum(unit.num_bytes for unit in units),
        "generations": 1 + max(unit.generation for unit in units),
        "forgotten": sorted({i for ids in _forgotten(units, forget.tombstones(workspace)).values() for i in ids}),
    }


def lineage(config: IngestConfig) -> str:
    """The ref that points at this configuration's newest artifact."""
    return layout.lineage(config)


def run(
    config: IngestConfig, workspace: Workspace, frozen: Mapping[str, Any] | None = None
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Reads every source and stores the parts.

    Args:
        config: The sources and what is kept of them.
        workspace: Where the parts go.
        frozen: What `observe` gave when the stage was planned; none for what it gives now.

    Returns:
        The artifact's files and its metrics (documents, bytes, groups, skips by kind).

    Raises:
        DataError: No document is left for training or none is held out, too many are unreadable, or a source changed
            while it was read.
        StorageError: A file cannot be read.
    """
    units = layout.plan(config, workspace)
    frozen = frozen if frozen is not None else observe(config, workspace)
    if layout.digest(units) != frozen["layout"]:
        raise _changed(config)
    stones = [stone for stone in forget.tombstones(workspace) if stone["id"] in frozen["forgotten"]]
    forgotten = _forgotten(units, stones)
    # What a unit gives depends on its own source, and not on how many units may go wrong.
    read = {name: value for name, value in config.fingerprinted().items() if name not in _OF_THE_WHOLE}
    memo = Memo(workspace, "ingest", FORMAT_VERSION, read)
    results = map_rows("ingest", _Reader(config, workspace), [_row(config, unit, forgotten) for unit in units], memo)
    if layout.digest(layout.plan(config, workspace)) != frozen["layout"]:
        raise _changed(config)
    files, parts = _named(results, units)
    skips = _Skips(results)
    metrics = _metrics(config, parts, results, skips)
    skips.report()
    _check(config, metrics, skips)
    files.append(workspace.put_bytes(PARTS, json.dumps([asdict(part) for part in parts]).encode()))
    files.append(layout.store(workspace, units))
    return files, metrics


def parts_of(documents: Artifact) -> list[Part]:
    """What an artifact of documents says of its parts."""
    return [Part(**row) for row in documents.read_json(PARTS)]


def by_origin(parts: Sequence[Part]) -> dict[str, dict[str, int]]:
    """Documents and bytes of each source."""
    totals: dict[str, dict[str, int]] = {}
    for part in parts:
        row = totals.setdefault(part.origin, {"documents": 0, "bytes": 0})
        row["documents"] += part.documents
        row["bytes"] += part.bytes
    return totals


def held_out(config: IngestConfig, group: str) -> bool:
    """Whether a group is kept from training: named, or its hash falls into the configured share."""
    if group in config.held_out_groups:
        return True
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return share < config.held_out_frac


def document_id(document: Document) -> str:
    """A stable id of 16 hex digits from the document's place below its source and what it says."""
    return hashlib.sha256(f"{document.key}\0{document.text}".encode()).hexdigest()[:16]


def _forgotten(units: list[layout.Unit], stones: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What is to be forgotten in each file that is read here; tombstones of other corpora do not matter to it."""
    return forget.by_file(stones, {row["key"] for unit in units for row in unit.rows}) if stones else {}


def _row(config: IngestConfig, unit: layout.Unit, forgotten: Mapping[str, list[str]]) -> dict[str, Any]:
    source = config.sources[unit.source]
    return {
        "unit": layout.reader(source).unit(source, unit.rows),
        "states": [row["state"] for row in unit.rows],
        "botocore": isinstance(source, BotocoreSource),
        "origin": layout.origin(source),
        "forget": sorted({i for row in unit.rows for i in forgotten.get(row["key"], ())}),
    }


class _Reader:
    """The Ray task: reads one unit (some files or services) and stores its documents as parts."""

    __name__ = "ingest"

    def __init__(self, config: IngestConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        from forge_ray.data.reading import botocore_docs, formats

        reader = botocore_docs if row["botocore"] else formats
        parts: list[dict[str, Any]] = []
        skipped = _SkippedRows(row["origin"], self.workspace)
        open_parts = {split: _Part(split, row["origin"], self.workspace) for split in SPLITS}
        forgotten = frozenset(row["forget"])
        for item in self._checked(reader.read(row["unit"], self.config)):
            if isinstance(item, Skipped):
                skipped.add(item)
                continue
            doc_id = document_id(item)
            if doc_id in forgotten:
                skipped.add_forgotten(doc_id, item)
                continue
            part = open_parts["heldout" if held_out(self.config, item.group) else "train"]
            part.add(doc_id, item)
            if part.num_bytes >= self.config.part_bytes or part.num_rows >= _PART_ROWS:
                parts.append(part.store(self.config))
        parts += [part.store(self.config) for part in open_parts.values() if part.num_rows]
        return [{"parts": parts, "origin": row["origin"], "skipped": skipped.finish()}]

    def _checked(self, items: Iterator[Document | Skipped]) -> Iterator[Document | Skipped]:
        for item in items:
            if isinstance(item, Document) and len(item.text) < self.config.min_document_chars:
                yield Skipped(item.source, SHORT, f"{len(item.text)} characters")
            elif isinstance(item, Document) and (size := len(item.text.encode())) > self.config.max_document_bytes:
                yield Skipped(item.source, LARGE, f"{size} bytes")
            else:
                yield item


class _Part:
    """Documents of one split on their way into one Parquet blob."""

    def __init__(self, split: str, origin: str, workspace: Workspace) -> None:
        self.split, self.origin, self.workspace = split, origin, workspace
        self._clear()

    def _clear(self) -> None:
        self.columns: dict[str, list[str]] = {name: [] for name in SCHEMA_FIELDS}
        self.num_bytes = self.num_rows = 0

    def add(self, doc_id: str, document: Document) -> None:
        d = document
        row = (doc_id, d.key, d.group, self.origin, d.source, d.licence, d.language, d.created, d.metadata, d.text)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.num_bytes += len(document.text.encode())
        self.num_rows += 1

    def store(self, config: IngestConfig) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self.workspace.new_file(self.split) as build:
            pq.write_table(pa.table(self.columns), build.stream, compression="zstd", row_group_size=4096)
        groups = set(self.columns["group"])
        row = {
            "split": self.split,
            "entry": build.entry,
            "documents": self.num_rows,
            "bytes": self.num_bytes,
            "groups": "".join(sorted(digest_bytes(g.encode())[:16] for g in groups)) if self.split == "heldout" else "",
            "examples": sorted(groups)[:_SHOWN_GROUPS] if self.split == "heldout" else [],
            "named": sorted(groups.intersection(config.held_out_groups)),
        }
        self._clear()
        return row


class _SkippedRows:
    """What a unit left out, on its way into the ledger."""

    def __init__(self, origin: str, workspace: Workspace) -> None:
        self.origin, self.workspace = origin, workspace
        self.counts: Counter[str] = Counter()
        self.first: list[list[str]] = []
        self.unreadable: list[list[str]] = []
        self.num_unreadable = 0
        self.entries: list[FileEntry] = []
        self._clear()

    def _clear(self) -> None:
        names = ("id", "key", "origin", "source", "fate", "step", "reason", "detail")
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, item: Skipped) -> None:
        """Something that is no document that can be used; its id names its place alone."""
        self.counts[item.kind] += 1
        shown = [item.source, item.reason, item.kind]
        if len(self.first) < _SHOWN_SKIPS:
            self.first.append(shown)
        if item.unreadable:
            self.num_unreadable += 1
            if len(self.unreadable) < _SHOWN_SKIPS:
                self.unreadable.append(shown)
        place = digest_bytes(item.source.encode())[:16]
        self._row(place, "", item.source, ledger.SKIPPED, item.kind, item.detail)

    def add_forgotten(self, doc_id: str, document: Document) -> None:
        """A document with a tombstone."""
        self.counts[ledger.FORGOTTEN] += 1
        self._row(doc_id, document.key, document.source, ledger.FORGOTTEN, "tombstone", "")

    def _row(self, doc_id: str, key: str, source: str, fate: str, reason: str, detail: str) -> None:
        row = (doc_id, key, self.origin, source, fate, "ingest", reason, detail)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        if len(self.columns["id"]) >= _SKIPPED_ROWS:
            self._store()

    def _store(self) -> None:
        self.entries.append(ledger.store(self.workspace, "skipped", ledger.table(self.columns)))
        self._clear()

    def finish(self) -> dict[str, Any]:
        """Its counts, and its blobs."""
        if self.columns["id"]:
            self._store()
        return {
            "entries": self.entries,
            "counts": dict(self.counts),
            "first": self.first,
            "unreadable": self.unreadable,
            "num_unreadable": self.num_unreadable,
        }


def _named(results: list[dict[str, Any]], units: list[layout.Unit]) -> tuple[list[FileEntry], list[Part]]:
    """The files under the names that the manifest will give them: older generations first, so that names stay."""
    files: list[FileEntry] = []
    parts: list[Part] = []
    numbers: Counter[str] = Counter()
    for result, unit in zip(results, units, strict=True):
        for row in result["parts"]:
            name = f"{row['split']}-{numbers[row['split']]:05d}.parquet"
            numbers[row["split"]] += 1
            files.append(replace(row["entry"], name=name))
            part = Part(name, row["split"], unit.generation, result["origin"], row["documents"], row["bytes"])
            parts.append(part)
        for entry in result["skipped"]["entries"]:
            files.append(replace(entry, name=f"{ledger.PREFIX}skipped-{numbers['skipped']:05d}.parquet"))
            numbers["skipped"] += 1
    return files, parts


def _changed(config: IngestConfig) -> DataError:
    """The fingerprint names what the sources were when the stage was planned; what was read must be that."""
    return DataError(
        "a source changed while it was read, so what was read is neither the old state nor the new",
        got=", ".join(_shown(source) for source in config.sources),
        do="run the same command again, once nothing writes there: what did not change is not read again",
    )


def _shown(source: Source) -> str:
    return "botocore" if isinstance(source, BotocoreSource) else source.uri


class _Skips:
    """All units' skips together: counts and the first few, never every one."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        rows = [result["skipped"] for result in results]
        self.counts: Counter[str] = Counter()
        for row in rows:
            self.counts.update(row["counts"])
        self.forgotten = self.counts.pop(ledger.FORGOTTEN, 0)
        self.total = sum(self.counts.values())
        self.first = [item for row in rows for item in row["first"]][:_SHOWN_SKIPS]
        self.unreadable = [item for row in rows for item in row["unreadable"]][:_SHOWN_SKIPS]
        self.num_unreadable = sum(row["num_unreadable"] for row in rows)
        self.unreadable_kinds = {kind: n for kind, n in self.counts.most_common() if kind not in (SHORT, LARGE)}

    def report(self) -> None:
        """Tells of the first."""
        for source, reason, _ in self.first:
            say(f"  skipped {source}: {reason}")
        if self.total > len(self.first):
            say(f"  ... {self.total - len(self.first)} more skipped; `forge data report` tells of all of them")
        if self.forgotten:
            say(f"  {self.forgotten} documents left out, as `forge data forget` asked")


def _metrics(config: IngestConfig, parts: list[Part], results: list[dict[str, Any]], skips: _Skips) -> dict[str, Any]:
    rows = [row for result in results for row in result["parts"]]
    examples = {group for row in rows for group in row["examples"]}
    metrics: dict[str, Any] = {
        f"{split}_{what}": sum(getattr(part, what) for part in parts if part.split == split)
        for split in SPLITS
        for what in ("documents", "bytes")
    }
    return {
        **metrics,
        "num_heldout_groups": _num_groups([row["groups"] for row in rows]),
        "heldout_groups": sorted(examples)[:_SHOWN_GROUPS],
        "held_out_by_name": sorted({name for row in rows for name in row["named"]}),
        "origins": by_origin(parts),
        "skipped": dict(skips.counts),
        "forgotten": skips.forgotten,
        "generations": 1 + max((part.generation for part in parts), default=0),
    }


def _num_groups(digests: Sequence[str]) -> int:
    """How many groups there are, of which parts give 16 hex digits each; memory: 16 bytes for each that a part has."""
    import numpy as np

    return len(np.unique(np.frombuffer(bytes.fromhex("".join(digests)), np.uint64)))


def _check(config: IngestConfig, metrics: dict[str, Any], skips: _Skips) -> None:
    where = ", ".join(_shown(source) for source in config.sources)
    kept = f"{metrics['train_documents']} training and {metrics['heldout_documents']} held-out documents"
    seen = f"{kept}, {skips.total} skipped"
    first = f"; first reason: {skips.first[0][1]} ({skips.first[0][0]})" if skips.first else ""
    if not metrics["train_documents"]:
        raise DataError(
            "the corpus is empty: nothing is left to train on",
            got=f"{where}: {seen}{first}",
            wanted="at least one readable document",
            do="check ingest.sources, held_out_frac and min_document_chars",
        )
    _check_readable(config, metrics, skips, where)
    missing = sorted(set(config.held_out_groups) - set(metrics["held_out_by_name"]))
    if missing:
        raise DataError(
            "ingest.held_out_groups names what is not in the corpus, so nothing would be held back for it",
            got=", ".join(missing),
            wanted="names of services, or paths of files below their source, as in guide/setup.md or posts.jsonl#7",
            do="mend the name",
        )
    if not metrics["heldout_documents"]:
        raise DataError(
            "no document is held out for evaluation",
            got=f"{where}: {seen}",
            wanted="at least one group",
            do="raise ingest.held_out_frac, or name one in ingest.held_out_groups",
        )
    say(f"  {seen}, {format_bytes(metrics['train_bytes'])} of training text")


def _check_readable(config: IngestConfig, metrics: dict[str, Any], skips: _Skips, where: str) -> None:
    num_seen = metrics["train_documents"] + metrics["heldout_documents"] + skips.total
    if skips.num_unreadable <= config.max_unreadable_frac * num_seen:
        return
    first = "".join(f"\n    {source}: {reason}" for source, reason, _ in skips.unreadable)
    raise DataError(
        "too much of the corpus is unreadable",
        got=f"{where}: {skips.num_unreadable} of {num_seen} documents ("
        + ", ".join(f"{count} {kind}" for kind, count in skips.unreadable_kinds.items())
        + f"); the first:{first}",
        wanted=f"at most {config.max_unreadable_frac:g} of them",
        do="mend the files or the source's text_field, or raise ingest.max_unreadable_frac to train on the rest",
    )
