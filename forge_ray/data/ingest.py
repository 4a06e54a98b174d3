"""Ingest: documents from sources into one Parquet layout, whole groups of them held out for evaluation.

Owns reading (`read_documents` in `formats.py` and `botocore_docs.py` do the parsing), document ids, the hold-out and
the account of what was skipped. Does not clean or deduplicate.

Parts are `train-00000.parquet`, `heldout-00000.parquet` ... with the columns of `SCHEMA_FIELDS`; `skipped.json` lists
each document that was left out, with the reason. Ids and groups hold no absolute path: a corpus that moves to another
folder or store keeps both.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from forge_ray.artifact import FileEntry, Workspace
from forge_ray.config import BotocoreSource, FilesSource, IngestConfig
from forge_ray.data import botocore_docs, formats
from forge_ray.data.formats import LARGE, SHORT, Document, Skipped
from forge_ray.errors import DataError
from forge_ray.runtime import map_rows
from forge_ray.telemetry import format_bytes, say

SCHEMA_FIELDS = ("id", "group", "source", "licence", "text")
FORMAT_VERSION = 2
_SHOWN_SKIPS = 3


def observe(config: IngestConfig) -> dict[str, Any]:
    """The state of every source now: what the fingerprint holds instead of a mutable URI.

    Returns:
        For each source its listing's digest (names, sizes, and times or ETags) or its package's version.

    Raises:
        ConfigError: No source is configured.
        StorageError: A source does not exist or cannot be listed.
        DataError: A source holds no readable file.
    """
    return {
        "sources": [
            botocore_docs.observe(s) if isinstance(s, BotocoreSource) else formats.observe(s) for s in config.sources
        ]
    }


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
    frozen = frozen if frozen is not None else observe(config)
    units = [unit for source in config.sources for unit in _units(source)]
    results = map_rows("ingest", _Reader(config, workspace), units)
    _check_unchanged(config, frozen)
    files, skipped = [], []
    totals = {split: {"parts": 0, "documents": 0, "bytes": 0} for split in ("train", "heldout")}
    groups: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for row in results:
        skipped += row["skipped"]
        for part in row["parts"]:
            split, total = part["split"], totals[part["split"]]
            files.append(replace(part["entry"], name=f"{split}-{total['parts']:05d}.parquet"))
            total["parts"] += 1
            total["documents"] += part["documents"]
            total["bytes"] += part["bytes"]
            groups[split].update(part["groups"])
    metrics = _metrics(totals, groups, skipped)
    _report_skips(skipped)
    _check(config, metrics, skipped)
    listed = [{"source": item.source, "reason": item.reason} for item in skipped]
    files.append(workspace.put_bytes("skipped.json", json.dumps(listed, indent=1).encode()))
    return files, metrics


def held_out(config: IngestConfig, group: str) -> bool:
    """Whether a group is kept from training: named, or its hash falls into the configured share."""
    if group in config.held_out_groups:
        return True
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return share < config.held_out_frac


def document_id(document: Document) -> str:
    """A stable id of 16 hex digits from the document's place below its source and what it says."""
    return hashlib.sha256(f"{document.key}\0{document.text}".encode()).hexdigest()[:16]


def _units(source: BotocoreSource | FilesSource) -> list[dict[str, Any]]:
    return botocore_docs.units(source) if isinstance(source, BotocoreSource) else formats.units(source)


class _Reader:
    """The Ray task: reads one unit (some files or services) and stores its documents as parts."""

    __name__ = "ingest"

    def __init__(self, config: IngestConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace

    def __call__(self, unit: dict[str, Any]) -> list[dict[str, Any]]:
        reader = botocore_docs.read if unit["kind"] == "botocore" else formats.read
        parts: list[dict[str, Any]] = []
        skipped: list[Skipped] = []
        open_parts = {split: _Part(split, self.workspace) for split in ("train", "heldout")}
        for item in self._checked(reader(unit, self.config)):
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            part = open_parts["heldout" if held_out(self.config, item.group) else "train"]
            part.add(item)
            if part.num_bytes >= self.config.part_bytes:
                parts.append(part.store())
        parts += [part.store() for part in open_parts.values() if part.rows]
        return [{"parts": parts, "skipped": skipped}]

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

    def __init__(self, split: str, workspace: Workspace) -> None:
        self.split, self.workspace = split, workspace
        self._clear()

    def _clear(self) -> None:
        self.rows: list[dict[str, str]] = []
        self.num_bytes = 0

    def add(self, document: Document) -> None:
        self.rows.append(
            {
                "id": document_id(document),
                "group": document.group,
                "source": document.source,
                "licence": document.licence,
                "text": document.text,
            }
        )
        self.num_bytes += len(document.text.encode())

    def store(self) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({name: [row[name] for row in self.rows] for name in SCHEMA_FIELDS})
        with self.workspace.new_file(self.split) as build:
            pq.write_table(table, build.stream, compression="zstd")
        row = {
            "split": self.split,
            "entry": build.entry,
            "documents": len(self.rows),
            "bytes": self.num_bytes,
            "groups": sorted({row["group"] for row in self.rows}),
        }
        self._clear()
        return row


def _check_unchanged(config: IngestConfig, frozen: Mapping[str, Any]) -> None:
    """The fingerprint names what the sources were when the stage was planned; what was read must be that."""
    changed = [
        _shown(source)
        for source, before, now in zip(config.sources, frozen["sources"], observe(config)["sources"], strict=True)
        if before != now
    ]
    if changed:
        raise DataError(
            "a source changed while it was read, so what was read is neither the old state nor the new",
            got=", ".join(changed),
            do="run the same command again, once nothing writes there",
        )


def _shown(source: BotocoreSource | FilesSource) -> str:
    return source.uri if isinstance(source, FilesSource) else "botocore"


def _metrics(totals: dict[str, Any], groups: dict[str, set[str]], skipped: list[Skipped]) -> dict[str, Any]:
    return {
        "train_documents": totals["train"]["documents"],
        "train_bytes": totals["train"]["bytes"],
        "train_groups": len(groups["train"]),
        "heldout_documents": totals["heldout"]["documents"],
        "heldout_bytes": totals["heldout"]["bytes"],
        "heldout_groups": sorted(groups["heldout"]),
        "skipped": dict(Counter(item.kind for item in skipped)),
    }


def _report_skips(skipped: list[Skipped]) -> None:
    for item in skipped[:_SHOWN_SKIPS]:
        say(f"  skipped {item.source}: {item.reason}")
    if len(skipped) > _SHOWN_SKIPS:
        say(f"  ... {len(skipped) - _SHOWN_SKIPS} more skipped; all of them are in skipped.json of the artifact")


def _check(config: IngestConfig, metrics: dict[str, Any], skipped: list[Skipped]) -> None:
    where = ", ".join(_shown(source) for source in config.sources)
    kept = f"{metrics['train_documents']} training and {metrics['heldout_documents']} held-out documents"
    seen = f"{kept}, {len(skipped)} skipped"
    first = f"; first reason: {skipped[0].reason} ({skipped[0].source})" if skipped else ""
    if not metrics["train_documents"]:
        raise DataError(
            "the corpus is empty: nothing is left to train on",
            got=f"{where}: {seen}{first}",
            wanted="at least one readable document",
            do="check ingest.sources, held_out_frac and min_document_chars",
        )
    _check_readable(config, metrics, skipped, where)
    missing = sorted(set(config.held_out_groups) - set(metrics["heldout_groups"]))
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


def _check_readable(config: IngestConfig, metrics: dict[str, Any], skipped: list[Skipped], where: str) -> None:
    unreadable = [item for item in skipped if item.unreadable]
    num_seen = metrics["train_documents"] + metrics["heldout_documents"] + len(skipped)
    if len(unreadable) <= config.max_unreadable_frac * num_seen:
        return
    kinds = Counter(item.kind for item in unreadable).most_common()
    first = "".join(f"\n    {item.source}: {item.reason}" for item in unreadable[:_SHOWN_SKIPS])
    raise DataError(
        "too much of the corpus is unreadable",
        got=f"{where}: {len(unreadable)} of {num_seen} documents ("
        + ", ".join(f"{count} {kind}" for kind, count in kinds)
        + f"); the first:{first}",
        wanted=f"at most {config.max_unreadable_frac:g} of them",
        do="mend the files or the source's text_field, or raise ingest.max_unreadable_frac to train on the rest",
    )
