"""A fair draw of documents by the order of their ids, in the memory of the draw and not of the corpus.

The rule: documents of a split in the order of their id (the start of a SHA-256, so a fair draw) until `max_bytes` of
text are reached; the one that reaches them is the last. The draw depends on the documents alone, not on how they lie in
parts, and a larger draw extends a smaller one.

Owns the rule and its two ways, which give the same: `sample` in one process, and `candidates` with `merged`, two passes
of Ray tasks over groups of parts. Does not own what is done with the text.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, Workspace
from forge_ray.runtime import unwrapped

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# What a reader may want beside the text; parts that lack one of them are read without it.
COLUMNS = ("id", "key", "group", "origin", "source", "language", "text")
_PREFIX_DIGITS = 4
_MAX_TASKS = 128
_BATCH_DOCUMENTS = 1024


def sample(documents: Artifact, split: str, max_bytes: int) -> Iterator[dict[str, str]]:
    """The draw in this process, in the order of ids.

    Memory: `max_bytes` and one batch of documents. Cost: every part of the split is read once.
    """
    drawn = Draw(max_bytes)
    for path in _paths(documents, parts(documents, split)):
        for batch in _batches(path):
            for number, doc_id in enumerate(batch["id"].to_pylist()):
                if drawn.wants(doc_id):
                    drawn.add(batch.slice(number, 1).to_pylist()[0])
    return iter(drawn.rows())


def parts(documents: Artifact, split: str) -> list[str]:
    """Names of the parts of a split; an artifact may hold other Parquet files too."""
    return [name for name in documents.names(".parquet") if name.startswith(f"{split}-")]


class Draw:
    """Keeps the rows of smallest id that reach `max_bytes` of text, whatever order they come in."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._heap: list[_Largest] = []

    def wants(self, doc_id: str) -> bool:
        """Whether a document of this id would be kept now."""
        return self.num_bytes < self.max_bytes or doc_id <= self._heap[0].row["id"]

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row with `id` and `text`; what is too much now is let go."""
        item = _Largest(row, len(row["text"].encode()))
        heapq.heappush(self._heap, item)
        self.num_bytes += item.num_bytes
        while self.num_bytes - self._heap[0].num_bytes >= self.max_bytes:
            self.num_bytes -= heapq.heappop(self._heap).num_bytes

    def rows(self) -> list[dict[str, Any]]:
        """What was kept, in the order of ids."""
        return [item.row for item in sorted(self._heap, reverse=True)]


class _Largest:
    """A row in a heap whose first is the largest id."""

    def __init__(self, row: dict[str, Any], num_bytes: int) -> None:
        self.row, self.num_bytes = row, num_bytes
        self._order = (row["id"], row.get("source") or "")

    def __lt__(self, other: _Largest) -> bool:
        return self._order > other._order


# ------------------------------------------------------------------------------------------------------------ on Ray


def candidates(documents: Artifact, split: str, max_bytes: int) -> list[Any]:
    """The draw by Ray tasks: object references whose values `merged` takes.

    The first pass counts bytes by the first 16 bits of the id, which says where the draw ends to within a 65,536th of
    the corpus; the second collects what lies before that.

    Memory: a task holds one batch and its share of the draw; the driver 512 KB a task, at most 64 MB. Cost: every part
    of the split is read twice.
    """
    import ray

    names = parts(documents, split)
    groups = [names[start::_MAX_TASKS] for start in range(min(len(names), _MAX_TASKS))]
    count, pick = ray.remote(num_cpus=1)(_count), ray.remote(num_cpus=1)(_pick)
    with unwrapped():
        counts = ray.get([count.remote(documents.workspace, documents.ref, group) for group in groups])
    if not counts:
        return []
    last = last_prefix(sum(counts[1:], counts[0]), max_bytes)
    return [pick.remote(documents.workspace, documents.ref, group, last) for group in groups]


def last_prefix(num_bytes: np.ndarray, max_bytes: int) -> int:
    """The prefix of ids in which the draw ends, given the bytes of text by prefix."""
    import numpy as np

    return int(np.searchsorted(num_bytes.cumsum(), max_bytes))


def merged(pieces: Iterable[bytes], max_bytes: int) -> pa.Table:
    """The draw out of what the tasks gave, in the order of ids. Memory: twice the draw for a moment."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    schema = pa.schema([(name, pa.large_string()) for name in COLUMNS])
    tables = [schema.empty_table(), *(pa.ipc.open_stream(piece).read_all() for piece in pieces)]
    every = pa.concat_tables(tables).sort_by([("id", "ascending"), ("source", "ascending")])
    ends = np.cumsum(pc.binary_length(every["text"]).to_numpy())
    return every.slice(0, int(np.searchsorted(ends, max_bytes)) + 1)


def _count(workspace: Workspace, ref: str, names: Sequence[str]) -> np.ndarray:
    """The Ray task of the first pass: bytes of text by prefix of the id."""
    import numpy as np
    import pyarrow.compute as pc

    total = np.zeros(16**_PREFIX_DIGITS, dtype=np.int64)
    for path in _paths(workspace.get(ref), names):
        for batch in _batches(path, ("id", "text")):
            np.add.at(total, _prefixes(batch), pc.binary_length(batch["text"]).to_numpy())
    return total


def _pick(workspace: Workspace, ref: str, names: Sequence[str], last: int) -> bytes:
    """The Ray task of the second pass: the rows up to a prefix, as a compressed Arrow stream.

    Bytes, because a table would stay pinned in the shared memory of the node as long as it is used.
    """
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    schema = pa.schema([(name, pa.large_string()) for name in COLUMNS])
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for path in _paths(workspace.get(ref), names):
            for batch in _batches(path):
                chosen = batch.filter(pa.array(_prefixes(batch) <= last))
                columns = [chosen[n] if n in chosen.schema.names else pa.nulls(len(chosen)) for n in COLUMNS]
                writer.write_batch(pa.record_batch([column.cast(pa.large_string()) for column in columns], schema))
    return sink.getvalue().to_pybytes()


def _prefixes(batch: pa.RecordBatch) -> np.ndarray:
    import numpy as np

    digits = (doc_id[:_PREFIX_DIGITS] for doc_id in batch["id"].to_pylist())
    return np.fromiter((int(prefix, 16) for prefix in digits), dtype=np.int64, count=len(batch))


def _paths(documents: Artifact, names: Sequence[str]) -> Iterator[Any]:
    return (documents.local_path(name) for name in names)


def _batches(path: Any, columns: Sequence[str] = COLUMNS) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        there = set(file.schema_arrow.names)
        yield from file.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=[n for n in columns if n in there])
