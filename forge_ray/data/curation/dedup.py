"""Documents compared with each other: exact and near duplicates, contamination by evaluation texts, repeated lines.

Owns the features of a document (`features`), the order of the steps over the corpus and the decisions that come out
(`across`). The comparing itself is in `near.py` (MinHash, components), `grouping.py` (equal keys), `contamination.py`
and `lines.py`; applying the decisions is `curate.py`'s.

Every decision is a function of the documents and their order, not of how they lie in parts, of the number of tasks or
of what is computed anew. None depends on a later generation, so that new documents leave old shards as they are. Each
step looks at what the steps before it left; what a step drops, it drops for a document that is there at that time, and
which a later step may still drop.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from forge_ray.artifact import FileEntry, Workspace
from forge_ray.config import CurateConfig
from forge_ray.data.curation import contamination, grouping, lines
from forge_ray.data.curation.grouping import Part, Piece
from forge_ray.data.curation.near import band_hashes, keepers
from forge_ray.data.curation.spill import Spill
from forge_ray.data.curation.text import Ints, Texts, slices
from forge_ray.runtime import map_rows

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Part", "across", "features"]

Row = dict[str, Any]
REASONS = ("", "exact", "near", "contaminated")
_EXACT, _NEAR, _CONTAMINATED = 1, 2, 3
_CHUNK_CHARS = 4 << 20
# Memory of a task at its peak, measured with tracemalloc on 20,000 documents (2026-11-23): per document of an exact
# key, per band, per line, and per document that is decided about.
_EXACT_BYTES, _BAND_BYTES, _LINE_BYTES, _DECISION_BYTES = 96, 72, 112, 320


# ----------------------------------------------------------------------------------------------------- features


def features(texts: Sequence[str], config: CurateConfig) -> pa.Table:
    """What is compared of each document, one row each: columns for the steps that are switched on.

    Returns:
        `exact`: 16 bytes, equal for texts equal but for case and blanks. `bands`: a hash for each band, null for a text
        without words. `lines`: a hash for each line of `text.split("\\n")`, equal for lines equal but for ASCII case
        and outer blanks; 0 for one of fewer than `lines.min_chars` characters.

    Cost: 8 bytes per band and line and 16 per document; memory for 4 Mi characters of text at a time.
    """
    import pyarrow as pa

    schema = _schema(config)
    batches = [pa.record_batch(_chunk(chunk, config), schema) for chunk in slices(texts, _CHUNK_CHARS)]
    return pa.Table.from_batches(batches, schema).combine_chunks()


def _schema(config: CurateConfig) -> pa.Schema:
    import pyarrow as pa

    fields = []
    if config.exact.enabled:
        fields.append(("exact", pa.binary(16)))
    if config.near.enabled:
        fields.append(("bands", pa.list_(pa.uint64(), config.near.bands)))
    if config.lines.enabled:
        fields.append(("lines", pa.list_(pa.uint64())))
    return pa.schema(fields)


def _chunk(texts: Sequence[str], config: CurateConfig) -> list[Any]:
    import pyarrow as pa

    columns: list[Any] = []
    if config.exact.enabled:
        columns.append(pa.array([_digest(text) for text in texts], pa.binary(16)))
    batch = Texts(texts)
    if config.near.enabled:
        hashes, has_words = band_hashes(batch, config.near)
        values = pa.array(hashes.reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(values, config.near.bands, mask=pa.array(~has_words)))
    if config.lines.enabled:
        found = batch.lines()
        long = batch.chars(found.start, found.end) >= config.lines.min_chars
        offsets = np.searchsorted(found.document, np.arange(len(texts) + 1)).astype(np.int32)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.where(long, found.hash | 1, 0))))
    return columns


def _digest(text: str) -> bytes:
    plain = " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(plain, digest_size=16).digest()


# ------------------------------------------------------------------------------------------------------- across


def across(parts: Sequence[Part], config: CurateConfig, workspace: Workspace) -> list[FileEntry | None]:
    """Decides for every document whether it goes because of another, and which of its lines do.

    - exact: of equal documents the first stays.
    - near: of documents that equal bands tie together, in the generation of each, the first stays. Exact duplicates
      take part through the one that stays.
    - decontaminate: see `contamination.py`.
    - lines: within a split, a line that `max_copies` earlier documents hold that stay goes from later ones.

    Args:
        parts: In order of priority, so of what is equal the first stays: generations rise, and within one, held-out
            parts come first. Features are an Arrow IPC stream of `features` tables.
        config: The steps.
        workspace: Where the parts lie, and what the tasks hand on to each other in the meantime.

    Returns:
        For each part a Parquet blob of decisions, or None where nothing is decided. Columns: `row`; `drop` (why the
        document goes: exact, near, contaminated; null if it stays); `other` (the id of the document because of which,
        or the URI of an evaluation text); `remove` (the indices of the lines that go).

    Raises:
        StorageError: An evaluation set does not exist or cannot be read.

    Cost: this process holds 14 bytes per document; while components are computed 24 per pair of documents that share a
    band (at most `bands` for each duplicate); then 40 per document that goes, and 170 per document because of which
    others do. A task holds `spill_bytes`, or what a single part takes if that is more: 112 bytes per line, 72 per band
    and document.
    """
    with _Corpus(parts, config, workspace) as corpus:
        if config.exact.enabled:
            corpus.drop_duplicates("exact", _EXACT)
        if config.near.enabled:
            corpus.drop_duplicates("bands", _NEAR)
        if config.decontaminate.enabled:
            corpus.drop_contaminated()
        repeated = corpus.count_lines() if config.lines.enabled else {}
        return corpus.decisions(repeated)


def _run(name: str, task: Callable[[Row], list[Row]], rows: list[Row]) -> list[Row]:
    """The tasks of a phase; a single one, which is within `spill_bytes`, here: Ray takes a second to start any."""
    return task(rows[0]) if len(rows) == 1 else map_rows(name, task, rows)


class _Corpus:
    """All parts, and what is decided about their documents so far; documents are numbered through."""

    def __init__(self, parts: Sequence[Part], config: CurateConfig, workspace: Workspace) -> None:
        if any(one.generation > next_one.generation for one, next_one in pairwise(parts)):
            raise ValueError("parts come in the order of their generations")
        self.parts, self.config, self.workspace = parts, config, workspace
        counts = np.array([part.documents for part in parts], np.int64)
        self.firsts: Ints = np.cumsum(counts) - counts
        self.num_documents = int(counts.sum())
        if self.num_documents >= 1 << 32:
            raise ValueError(f"{self.num_documents} documents; their numbers have 32 bits")
        self.drop = np.zeros(self.num_documents, np.uint8)
        self.other = np.zeros(self.num_documents, np.int64)
        self.names: dict[int, str] = {}
        self.spill = Spill(workspace)
        self._spilled: list[FileEntry] = []

    def __enter__(self) -> _Corpus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.spill.delete(self._spilled)

    def drop_duplicates(self, column: str, reason: int) -> None:
        """Of documents that share a key of that column, or hang together by several, the first stays."""
        per_document = _EXACT_BYTES if column == "exact" else _BAND_BYTES * self.config.near.bands
        pieces = [self._piece(i, self.parts[i].documents * per_document) for i in self._filled()]
        groups = grouping.groups(pieces, self.config.spill_bytes)
        ranges = self._ranges(groups) if len(groups) > 1 else None
        rows = [{"pieces": pieces, "skip": self._dropped(pieces).tobytes()} for pieces in groups]
        scattered = _run(f"dedup: {column}", grouping.Scatter(column, ranges, self.spill), rows)
        sent = self._collect([row["ranges"] for row in scattered])
        rows = [{"entries": [entry for _, entry in sent[number]]} for number in sorted(sent)]
        gathered = _run(f"dedup: {column}, joined", grouping.Gather(self.spill), rows)
        entries = [entry for row in [*scattered, *gathered] for entry in row["pairs"]]
        self._spilled += entries
        if not entries:
            return
        pairs = np.unique(np.concatenate([self.spill.read(entry)["pair"] for entry in entries]))
        generations = np.array([part.generation for part in self.parts])
        starts = self.firsts[np.unique(generations, return_index=True)[1]]
        gone, stays = keepers(pairs, starts, self.num_documents)
        self.drop[gone], self.other[gone] = reason, stays

    def drop_contaminated(self) -> None:
        """Documents that overlap evaluation texts go."""
        dropped = np.flatnonzero(self.drop)
        found, self.names = contamination.find(self.parts, self.firsts, dropped, self.config, self.workspace)
        gone = np.fromiter(found, np.int64, len(found))
        self.drop[gone] = _CONTAMINATED
        self.other[gone] = np.fromiter(found.values(), np.int64, len(found))

    def count_lines(self) -> dict[int, list[FileEntry]]:
        """What each group must know of the lines of earlier ones; a group that is alone in its split, nothing."""
        groups = self._groups()
        splits = Counter(split for split, _ in groups)
        several = [(number, split, pieces) for number, (split, pieces) in enumerate(groups) if splits[split] > 1]
        max_copies = self.config.lines.max_copies
        count = lines.Count(max_copies, self._ranges([pieces for _, _, pieces in several]), self.spill)
        rows = [{"pieces": p, "split": split, "skip": self._dropped(p).tobytes()} for _, split, p in several]
        sent = self._collect([row["ranges"] for row in _run("dedup: lines", count, rows)])
        rows = [
            {"entries": [entry for _, entry in sent[key]], "groups": [several[place][0] for place, _ in sent[key]]}
            for key in sorted(sent)
        ]
        joined = _run("dedup: lines, joined", lines.Before(max_copies, self.spill), rows)
        found: dict[int, list[FileEntry]] = {}
        for row in joined:
            for group, entry in row["groups"].items():
                found.setdefault(int(group), []).append(entry)
                self._spilled.append(entry)
        return found

    def decisions(self, repeated: dict[int, list[FileEntry]]) -> list[FileEntry | None]:
        """Writes what is decided, part by part."""
        ids = self._ids()
        groups = self._groups()
        rows = []
        for number, (split, pieces) in enumerate(groups):
            dropped = self._dropped(pieces)
            if len(dropped) or self.config.lines.enabled:
                others = [ids[i] for i in self.other[dropped].tolist()]
                about = {"dropped": dropped.tobytes(), "reasons": self.drop[dropped].tobytes(), "others": others}
                rows.append({"pieces": pieces, "split": split, "before": repeated.get(number, []), **about})
        found: dict[int, FileEntry | None] = {}
        for row in _run("dedup: decisions", _Decide(self.config, self.spill), rows):
            found[row["first"]] = row["entry"]
        return [
            found.get(first) if part.documents else None
            for first, part in zip(self.firsts.tolist(), self.parts, strict=True)
        ]

    def _ids(self) -> dict[int, str]:
        """The id of every document because of which another goes."""
        named = np.unique(self.other[self.drop > 0])
        ids = {int(number): self.names[int(number)] for number in named[named < 0]}
        named = named[named >= 0]
        rows, numbers = [], []
        for _, pieces in self._groups():
            row = []
            for piece in pieces:
                start, end = np.searchsorted(named, [piece.first, piece.first + piece.documents])
                if end > start:
                    row.append([self._clean(piece), (named[start:end] - piece.first).tobytes()])
                    numbers += named[start:end].tolist()
            if row:
                rows.append({"parts": row})
        found = [one for row in _run("dedup: ids", _Ids(self.workspace), rows) for one in row["ids"]]
        return ids | dict(zip(numbers, found, strict=True))

    def _clean(self, piece: Piece) -> FileEntry:
        return self.parts[int(np.searchsorted(self.firsts, piece.first, "right")) - 1].clean

    def _filled(self) -> list[int]:
        return [i for i, part in enumerate(self.parts) if part.documents]

    def _piece(self, i: int, task_bytes: int) -> Piece:
        part = self.parts[i]
        return Piece(int(self.firsts[i]), part.documents, part.features, task_bytes)

    def _groups(self) -> list[tuple[str, list[Piece]]]:
        """Groups of parts of one split by their documents and lines, the corpus's order kept within each split."""
        exact, near, repeated = self.config.exact.enabled, self.config.near.enabled, self.config.lines.enabled
        fixed = 16 * exact + 8 * self.config.near.bands * near
        found = []
        for split in dict.fromkeys(part.split for part in self.parts):
            pieces = []
            for i in self._filled():
                part = self.parts[i]
                if part.split == split:
                    num_lines = max(part.features.size_bytes - part.documents * fixed, 0) // 8 if repeated else 0
                    pieces.append(self._piece(i, part.documents * _DECISION_BYTES + num_lines * _LINE_BYTES))
            found += [(split, group) for group in grouping.groups(pieces, self.config.spill_bytes)]
        return found

    def _ranges(self, groups: Sequence[Sequence[Piece]]) -> int:
        return grouping.ranges([piece for group in groups for piece in group], self.config.spill_bytes)

    def _dropped(self, pieces: Sequence[Piece]) -> Ints:
        spans = [np.flatnonzero(self.drop[p.first : p.first + p.documents]) + p.first for p in pieces]
        return np.concatenate(spans).astype(np.int64)

    def _collect(self, sent: list[dict[str, FileEntry]]) -> dict[int, list[tuple[int, FileEntry]]]:
        """What the groups sent, by range: each group's number and blob, groups rising."""
        found: dict[int, list[tuple[int, FileEntry]]] = {}
        for group, by_range in enumerate(sent):
            for number, entry in by_range.items():
                found.setdefault(int(number), []).append((group, entry))
                self._spilled.append(entry)
        return found


class _Ids:
    """The task that looks up the ids of some rows of some parts."""

    __name__ = "ids"

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        found: list[str] = []
        for clean, rows in row["parts"]:
            path = self.workspace.verified(clean, "dedup: cleaned documents")
            ids = pq.read_table(path, columns=["id"])["id"]
            found += ids.take(np.frombuffer(rows, np.int64)).to_pylist()
        return [{"ids": found}]


class _Decide:
    """The task that writes the decisions of a group of parts."""

    __name__ = "decide"

    def __init__(self, config: CurateConfig, spill: Spill) -> None:
        self.config, self.spill = config, spill

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        dropped = np.frombuffer(row["dropped"], np.int64)
        reasons = np.frombuffer(row["reasons"], np.uint8).tolist()
        decided = {
            document: (REASONS[reason], other, ())
            for document, reason, other in zip(dropped.tolist(), reasons, row["others"], strict=True)
        }
        if self.config.lines.enabled:
            max_copies = self.config.lines.max_copies
            gone = lines.mark(self.spill, row["pieces"], dropped, row["split"], row["before"], max_copies)
            decided |= {document: (None, None, index) for document, index in gone.items()}
        return [{"first": piece.first, "entry": self._write(piece, decided)} for piece in row["pieces"]]

    def _write(self, piece: Piece, decided: dict[int, tuple[str | None, str | None, Any]]) -> FileEntry | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        mine = [document for document in range(piece.first, piece.first + piece.documents) if document in decided]
        if not mine:
            return None
        columns = {
            "row": pa.array([document - piece.first for document in mine], pa.int32()),
            "drop": pa.array([decided[document][0] for document in mine], pa.string()),
            "other": pa.array([decided[document][1] for document in mine], pa.string()),
            "remove": pa.array([decided[document][2] for document in mine], pa.list_(pa.int32())),
        }
        with self.spill.workspace.new_file("decisions") as build:
            pq.write_table(pa.table(columns), build.stream, compression="zstd")
        return build.entry
