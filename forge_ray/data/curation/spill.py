"""Columns of numbers on their way from the tasks of one phase to those of the next, as blobs of the workspace.

Owns writing and reading them, cutting keys into ranges, and deleting them when the phases are done; what a killed run
leaves is garbage like any blob that no manifest names. Does not own what the numbers mean.

Reading maps the file, so a task pays in memory for what it computes and not for what it reads.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from forge_ray.artifact import FileEntry, Workspace
from forge_ray.data.curation.text import Hashes

if TYPE_CHECKING:
    import pyarrow as pa

Columns = dict[str, NDArray[Any]]


class Spill:
    """A place for what one call spills; picklable.

    Every blob bears a mark of its call, so that none is shared with another run, which would miss it.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.mark = workspace, secrets.token_hex(8)

    def write(self, columns: Columns) -> FileEntry:
        """Stores columns of equal length."""
        return write_columns(self.workspace, columns, self.mark)

    def read(self, entry: FileEntry) -> Columns:
        """The columns of a blob; read-only."""
        columns = read_columns(self.workspace, entry)
        if self.workspace.storage.local is None:  # each is read once; the mapping outlives the name
            self.workspace.verified(entry, entry.name).unlink(missing_ok=True)
        return columns

    def read_all(self, entries: Sequence[FileEntry]) -> Columns:
        """The columns of several blobs, one after another; there must be at least one."""
        read = [self.read(entry) for entry in entries]
        return {name: np.concatenate([columns[name] for columns in read]) for name in read[0]}

    def delete(self, entries: Sequence[FileEntry]) -> None:
        """Removes blobs that have served."""
        for entry in entries:
            self.workspace.delete_blob(entry)

    def write_ranges(self, keys: Hashes, columns: Columns, pieces: int) -> dict[str, FileEntry]:
        """Stores rows by the range that their key falls in; `keys` are sorted.

        Returns:
            A blob for each range that has a row, under its number as text.
        """
        bounds = [-(-(piece << 64) // pieces) for piece in range(1, pieces)]
        cuts = [0, *np.searchsorted(keys, np.array(bounds, np.uint64)).tolist(), len(keys)]
        return {
            str(piece): self.write({name: column[start:end] for name, column in columns.items()})
            for piece, (start, end) in enumerate(pairwise(cuts))
            if start < end
        }


def write_columns(workspace: Workspace, columns: Columns, mark: str = "") -> FileEntry:
    """Stores columns of equal length as Arrow IPC; equal columns give equal bytes."""
    import pyarrow as pa

    table = pa.table({name: pa.array(column) for name, column in columns.items()})
    with workspace.new_file("spill") as build, pa.ipc.new_file(build.stream, _marked(table.schema, mark)) as writer:
        writer.write_table(table.replace_schema_metadata({"mark": mark}))
    return build.entry


def read_columns(workspace: Workspace, entry: FileEntry) -> Columns:
    """What `write_columns` stored, verified and mapped."""
    import pyarrow as pa

    path = workspace.verified(entry, "dedup: intermediate")
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    return {name: _numbers(table[name]) for name in table.column_names}


def _marked(schema: pa.Schema, mark: str) -> pa.Schema:
    return schema.with_metadata({"mark": mark})


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    chunks = column.chunks
    return chunks[0].to_numpy() if len(chunks) == 1 else column.to_numpy()
