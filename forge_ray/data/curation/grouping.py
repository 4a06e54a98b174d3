"""Which documents share a key (a hash of the whole, or of a band), over a corpus of any size.

Two maps. `Scatter`, a task for each group of parts: of the documents that share a key within the group the first stands
for all; it goes, with its key, to the range of keys that the key falls in. `Gather`, a task for each range: of the
groups that share a key, the first one's document is tied to the others'. So a key that every document has sends one row
per group, not one per document, and no task holds more than its group or its range.

Owns these two tasks and the cutting of parts into groups. Does not own what a pair means (`near.keepers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from forge_ray.artifact import FileEntry, Workspace
from forge_ray.data.curation.spill import Spill
from forge_ray.data.curation.text import Hashes, Ints

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Part:
    """A part of the corpus whose documents are compared with all others: cleaned, with the features of each."""

    name: str
    split: str
    generation: int
    documents: int
    clean: FileEntry
    features: FileEntry


@dataclass(frozen=True)
class Piece:
    """A part as the tasks see it: the number of its first document in the corpus, and what memory they need for it."""

    first: int
    documents: int
    features: FileEntry
    task_bytes: int


def groups(pieces: Sequence[Piece], spill_bytes: int) -> list[list[Piece]]:
    """Neighbouring parts together while one task has the memory for them; a larger part is by itself."""
    found: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        need = piece.task_bytes
        if not found or need > room:
            found.append([])
            room = spill_bytes
        found[-1].append(piece)
        room -= need
    return found


def ranges(pieces: Sequence[Piece], spill_bytes: int) -> int:
    """Into how many ranges keys are cut, so that a task may hold one."""
    return max(1, -(-sum(piece.task_bytes for piece in pieces) // spill_bytes))


def read_features(workspace: Workspace, piece: Piece, column: str) -> Iterator[tuple[int, pa.Array]]:
    """A column of a part's features, batch by batch, with the number of the batch's first document."""
    import pyarrow as pa

    first = piece.first
    if not piece.documents:
        return
    path = workspace.verified(piece.features, "dedup: features")
    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            yield first, batch[column]
            first += len(batch)
    if first != piece.first + piece.documents:
        raise ValueError(f"features of {first - piece.first} documents, {piece.documents} in the part")


class Scatter:
    """The task of one group.

    Args:
        column: `exact` or `bands`.
        ranges: How many ranges keys are cut into; none if there is one group alone.
    """

    __name__ = "compare"

    def __init__(self, column: str, ranges: int | None, spill: Spill) -> None:
        self.column, self.ranges, self.spill = column, ranges, spill

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row has the group's `pieces`, and as `skip` the documents (int64 bytes) that do not take part."""
        keys, documents = self._keys(row["pieces"], np.frombuffer(row["skip"], np.int64))
        if not len(documents):
            return [{"pairs": [], "ranges": {}}]
        keys, documents, pairs = same_key(keys, documents)
        columns = {f"key{i}": column for i, column in enumerate(keys)} | {"document": documents}
        sent = {} if self.ranges is None else self.spill.write_ranges(keys[0], columns, self.ranges)
        return [{"pairs": [self.spill.write({"pair": pairs})] if len(pairs) else [], "ranges": sent}]

    def _keys(self, pieces: Sequence[Piece], skip: Ints) -> tuple[list[Hashes], Hashes]:
        """Every key of the group, in columns of 64 bits, and its document."""
        import pyarrow.compute as pc

        keys, documents = [], []
        for piece in pieces:
            for first, column in read_features(self.spill.workspace, piece, self.column):
                place = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                number = place + first
                alive = ~np.isin(number, skip)
                if not alive.any():
                    continue
                if self.column == "exact":
                    width, buffer = 2, column.buffers()[1]
                    values = np.frombuffer(buffer, np.uint64, width * len(column), column.offset * 16)
                    keys.append(values.reshape(-1, width)[place[alive]])
                    documents.append(number[alive])
                else:
                    width = column.type.list_size
                    values = pc.list_flatten(column).to_numpy().reshape(-1, width)[alive]
                    keys.append(values.reshape(-1, 1))
                    documents.append(np.repeat(number[alive], width))
        if not keys:
            return [], np.empty(0, np.uint64)
        every = np.concatenate(keys)
        return [every[:, i] for i in range(every.shape[1])], np.concatenate(documents).astype(np.uint64)


class Gather:
    """The task of one range of keys."""

    __name__ = "join"

    def __init__(self, spill: Spill) -> None:
        self.spill = spill

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row has the `entries` that the groups sent to the range."""
        columns = self.spill.read_all(row["entries"])
        documents = columns.pop("document")
        _, _, pairs = same_key([columns[f"key{i}"] for i in range(len(columns))], documents)
        return [{"pairs": [self.spill.write({"pair": pairs})] if len(pairs) else []}]


def same_key(keys: list[Hashes], documents: Hashes) -> tuple[list[Hashes], Hashes, Hashes]:
    """The distinct keys, sorted; the first document of each; and every other document of a key tied to its first.

    Args:
        keys: The key of each row, in columns of 64 bits; at least one row.
        documents: The document of each row, less than 2 ** 32.

    Returns:
        Keys, documents, and the pairs `later << 32 | first`, distinct and sorted.
    """
    order = np.lexsort(keys[::-1]) if len(keys) > 1 else np.argsort(keys[0])
    keys, documents = [column[order] for column in keys], documents[order]
    changed = np.ones(len(documents), np.bool_)
    changed[1:] = False
    for column in keys:
        changed[1:] |= column[1:] != column[:-1]
    starts = np.flatnonzero(changed)
    first = np.minimum.reduceat(documents, starts)
    tied = np.repeat(first, np.diff(starts, append=len(documents)))
    others = documents != tied
    pairs = np.unique(documents[others] << np.uint64(32) | tied[others])
    return [column[starts] for column in keys], first, pairs
