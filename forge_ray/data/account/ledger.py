"""The ledger: the fate of every document, as Parquet.

One row for each document that was found, whatever became of it. `ingest` writes the rows of what it could not read,
`curate` those of the rest, `tokenize` adds where each kept document lies. Owns the columns and their meaning; what a
person asks of it is `explain.py` and `report.py`, erasure is `erase.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace

if TYPE_CHECKING:
    import pyarrow as pa

PREFIX = "ledger-"
KEPT, DROPPED, SKIPPED, FORGOTTEN = "kept", "dropped", "skipped", "forgotten"
# What is known when a document has been read.
IDENTITY = ("id", "key", "group", "origin", "source", "licence", "language", "created")


def schema() -> pa.Schema:
    """The columns.

    `id` to `created` say what the document is; `split` is train or heldout; `fate` is kept, dropped, skipped (not
    readable, too short or too large) or forgotten; `step` and `reason` are stable names to count by, `detail` is this
    document's figures; `duplicate_of` is the id of the document that was kept in its place; `found` counts private data
    by kind; `shard` is the SHA-256 of the token shard, `offset` and `tokens` the place in it, in tokens.
    """
    import pyarrow as pa

    return pa.schema(
        [
            *((name, pa.string()) for name in IDENTITY),
            ("split", pa.string()),
            ("bytes_in", pa.int64()),
            ("bytes_out", pa.int64()),
            ("fate", pa.string()),
            ("step", pa.string()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("duplicate_of", pa.string()),
            ("found", pa.map_(pa.string(), pa.int32())),
            ("lines_removed", pa.int32()),
            ("shard", pa.string()),
            ("offset", pa.int64()),
            ("tokens", pa.int64()),
        ]
    )


def table(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """A ledger of these columns; those that are left out are null."""
    import pyarrow as pa

    wanted = schema()
    rows = len(next(iter(columns.values())))
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(rows, field.type)
        for field in wanted
    ]
    return pa.table(arrays, schema=wanted)


def store(workspace: Workspace, name: str, rows: pa.Table) -> FileEntry:
    """Writes a ledger as a blob."""
    import pyarrow.parquet as pq

    with workspace.new_file(name) as build:
        pq.write_table(rows, build.stream, compression="zstd")
    return build.entry


def parts(artifact: Artifact) -> list[str]:
    """Names of the ledger's files in an artifact."""
    return [name for name in artifact.names(".parquet") if name.startswith(PREFIX)]


def scan(artifact: Artifact, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The ledger of an artifact, a batch at a time, verified."""
    import pyarrow.parquet as pq

    for name in parts(artifact):
        yield from pq.ParquetFile(artifact.local_path(name)).iter_batches(columns=list(columns) if columns else None)
