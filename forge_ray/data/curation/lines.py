"""Lines that several documents share: boilerplate, of which the first copies stay.

Three maps. `Count`, a task for each group of parts of one split: how many of the group's documents hold each line, up
to the number that may. `Before`, a task for each range of lines: how many documents of earlier groups hold it. `mark`,
in the task that writes the decisions of a group: a line that enough earlier documents hold goes. As with documents, a
line that stands everywhere sends one row per group.

Owns the counting. Does not own what a line is (`text.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_ray.artifact import FileEntry, Workspace
from forge_ray.data.curation.grouping import Piece, read_features
from forge_ray.data.curation.spill import Spill
from forge_ray.data.curation.text import Bools, Hashes, Ints

_OF_SPLIT = {"train": np.uint64(0), "heldout": np.uint64(0x9E3779B97F4A7C15)}


class Count:
    """The task of one group."""

    __name__ = "lines"

    def __init__(self, max_copies: int, ranges: int, spill: Spill) -> None:
        self.max_copies, self.ranges, self.spill = max_copies, ranges, spill

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row has the group's `pieces`, its `split`, and as `skip` the documents that are dropped."""
        skip = np.frombuffer(row["skip"], np.int64)
        keys, rank, _ = _ranked(*_lines(self.spill.workspace, row["pieces"], skip, row["split"])[:2])
        last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
        counts = np.minimum(rank[last] + 1, self.max_copies).astype(np.uint32)
        columns = {"key": keys[last], "count": counts}
        return [{"ranges": self.spill.write_ranges(columns["key"], columns, self.ranges)}]


class Before:
    """The task of one range of lines."""

    __name__ = "join lines"

    def __init__(self, max_copies: int, spill: Spill) -> None:
        self.max_copies, self.spill = max_copies, spill

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row has the `entries` that groups sent to the range, and the number of each one's group, rising."""
        read = [self.spill.read(entry) for entry in row["entries"]]
        keys = np.concatenate([columns["key"] for columns in read])
        counts = np.concatenate([columns["count"] for columns in read])
        group = np.repeat(np.arange(len(read)), [len(columns["key"]) for columns in read])
        order = np.argsort(keys, kind="stable")
        keys, counts, group = keys[order], counts[order].astype(np.int64), group[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        before = np.cumsum(counts) - counts
        before -= np.repeat(before[starts], np.diff(starts, append=len(keys)))
        held = before > 0
        keys, group = keys[held], group[held]
        before = np.minimum(before[held], self.max_copies).astype(np.uint32)
        found = {}
        for i, number in enumerate(row["groups"]):
            mine = group == i
            if mine.any():
                found[str(number)] = self.spill.write({"key": keys[mine], "before": before[mine]})
        return [{"groups": found}]


def mark(
    spill: Spill, pieces: Sequence[Piece], skip: Ints, split: str, before: Sequence[FileEntry], max_copies: int
) -> dict[int, Ints]:
    """The lines that go.

    Args:
        spill: Where the earlier groups' counts lie.
        pieces: The parts of a group.
        skip: Documents that are dropped.
        split: The group's split.
        before: What the tasks `Before` found for this group.
        max_copies: How many documents may hold the same line.

    Returns:
        For each document that loses lines their indices, rising.
    """
    hashes, documents, index = _lines(spill.workspace, pieces, skip, split)
    keys, rank, order = _ranked(hashes, documents)
    if before:
        held = spill.read_all(before)
        sort = np.argsort(held["key"])
        known, counts = held["key"][sort], held["before"][sort]
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        rank = rank + np.where(known[at] == keys, counts[at], 0)
    gone: Bools = np.zeros(len(hashes), np.bool_)
    gone[order] = rank >= max_copies
    losers, starts = np.unique(documents[gone], return_index=True)
    return dict(zip(losers.tolist(), np.split(index[gone], starts[1:])))


def _lines(workspace: Workspace, pieces: Sequence[Piece], skip: Ints, split: str) -> tuple[Hashes, Ints, Ints]:
    """Each line that counts: its hash, its document and its index there, in the corpus's order."""
    hashes, documents, index = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for piece in pieces:
        for first, column in read_features(workspace, piece, "lines"):
            offsets = column.offsets.to_numpy().astype(np.int64)
            sizes = np.diff(offsets)
            values = column.values.to_numpy()[offsets[0] : offsets[-1]]
            number = np.arange(first, first + len(column))
            sizes_alive = np.repeat(~np.isin(number, skip), sizes)
            counts = sizes_alive & (values != 0)
            place = np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], sizes)
            hashes.append(values[counts] ^ _OF_SPLIT[split])
            documents.append(np.repeat(number, sizes)[counts])
            index.append(place[counts])
    return np.concatenate(hashes), np.concatenate(documents), np.concatenate(index)


def _ranked(hashes: Hashes, documents: Ints) -> tuple[Hashes, Ints, NDArray[np.intp]]:
    """The lines sorted, for each how many earlier documents hold it, and the order that sorts them."""
    order = np.argsort(hashes, kind="stable")  # documents rise within equal lines
    keys, owners = hashes[order], documents[order]
    if not len(keys):
        return keys, np.empty(0, np.int64), order
    other_key = np.append(True, keys[1:] != keys[:-1])
    other_owner = other_key | np.append(True, owners[1:] != owners[:-1])
    holders = np.cumsum(other_owner)
    starts = np.flatnonzero(other_key)
    return keys, holders - np.repeat(holders[starts], np.diff(starts, append=len(keys))), order
