"""Token shards: fixed-width token ids with a document table, readable at any sample without reading the whole.

The format, version 1, little-endian:

```
offset 0    8 bytes   magic b"FORGETOK"
       8    u32       format version
      12    u32       H, length of the header
      16    H bytes   header, JSON: dtype ("uint16" or "uint32"), num_tokens, num_documents, vocab_size, end_token,
                      table_bytes, tokens_sha256, table_sha256
      ...             zeros up to a multiple of 64
      T               tokens: num_tokens ids; each document is its ids followed by end_token
      T + tokens      table: one Arrow IPC stream with the columns id, offset, length, source, licence; offset and
      length
                      count tokens, the end token included
```

A shard is a blob, so its manifest holds the SHA-256 of the whole; the two digests inside let a lone file be verified.
Owns writing and reading the format and the `tokenize` stage. Does not own the order of training (`loader.py`).
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace, digest_bytes
from forge_ray.config import TokenizeConfig
from forge_ray.errors import CorruptError
from forge_ray.runtime import map_rows
from forge_ray.telemetry import say

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FORMAT_VERSION = 1
MAGIC = b"FORGETOK"
_ALIGN = 64
_ENCODE_DOCUMENTS = 256


@dataclass(frozen=True)
class Header:
    """What a shard says of itself."""

    dtype: str
    num_tokens: int
    num_documents: int
    vocab_size: int
    end_token: int
    table_bytes: int
    tokens_sha256: str
    table_sha256: str


class Shard:
    """A shard opened for reading: tokens are memory-mapped, the table is read when asked for.

    Raises:
        CorruptError: The file is no shard, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np

        self.path = path
        with path.open("rb") as stream:
            start = stream.read(16)
            if len(start) < 16 or start[:8] != MAGIC:
                raise _damaged(path, "it does not start as a token shard")
            version, length = struct.unpack("<II", start[8:])
            if version != FORMAT_VERSION:
                raise _damaged(path, f"its format version is {version}, this program reads {FORMAT_VERSION}")
            try:
                self.header = Header(**json.loads(stream.read(length)))
                dtype = np.dtype(self.header.dtype).newbyteorder("<")
            except (ValueError, TypeError) as error:
                raise _damaged(path, f"its header cannot be read: {error}") from None
        self._tokens_at = _aligned(16 + length)
        self._table_at = self._tokens_at + self.header.num_tokens * dtype.itemsize
        if path.stat().st_size != self._table_at + self.header.table_bytes:
            raise _damaged(
                path, f"it has {path.stat().st_size} bytes, its header wants {self._table_at + self.header.table_bytes}"
            )
        self.tokens: np.ndarray = np.memmap(
            path, dtype=dtype, mode="r", offset=self._tokens_at, shape=(self.header.num_tokens,)
        )

    def table(self) -> pa.Table:
        """The document table."""
        import pyarrow as pa

        return pa.ipc.open_stream(self._table_bytes()).read_all()

    def verify(self) -> None:
        """Checks both digests of a lone file.

        Raises:
            CorruptError: Naming the file and the part that differs.
        """
        for part, data, wanted in (
            ("tokens", self.tokens.tobytes(), self.header.tokens_sha256),
            ("document table", self._table_bytes(), self.header.table_sha256),
        ):
            if digest_bytes(data) != wanted:
                raise _damaged(self.path, f"the SHA-256 of its {part} does not match")

    def _table_bytes(self) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(self._table_at)
            return stream.read()


def write(stream: Any, tokens: np.ndarray, table: pa.Table, *, vocab_size: int, end_token: int) -> None:
    """Writes a shard in the format above.

    Args:
        stream: A binary file at its start.
        tokens: Ids, of `dtype_of(vocab_size)`.
        table: Columns id, offset, length, source, licence.
        vocab_size: Entries of the vocabulary; every id is below it.
        end_token: The id that ends each document.
    """
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    table_bytes = sink.getvalue().to_pybytes()
    data = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
    header = json.dumps(
        asdict(
            Header(
                dtype=tokens.dtype.name,
                num_tokens=len(tokens),
                num_documents=table.num_rows,
                vocab_size=vocab_size,
                end_token=end_token,
                table_bytes=len(table_bytes),
                tokens_sha256=digest_bytes(data),
                table_sha256=digest_bytes(table_bytes),
            )
        )
    ).encode()
    stream.write(MAGIC + struct.pack("<II", FORMAT_VERSION, len(header)) + header)
    stream.write(b"\0" * (_aligned(16 + len(header)) - 16 - len(header)))
    stream.write(data)
    stream.write(table_bytes)


def dtype_of(vocab_size: int) -> str:
    """The narrowest id type that holds a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def run(
    config: TokenizeConfig, documents: Artifact, tokenizer: Artifact, workspace: Workspace
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Tokenizes every part with Ray Data.

    Returns:
        Shards `train-00000.tok`, `heldout-00000.tok` ... in the order of the documents, and their totals.
    """
    units = [{"part": name} for name in documents.names(".parquet")]
    results = map_rows("tokenize", _Tokenizer(config, documents.ref, tokenizer.ref, workspace), units)
    files: list[FileEntry] = []
    metrics = {f"{split}_{what}": 0 for split in ("train", "heldout") for what in ("tokens", "documents", "bytes")}
    for row in results:
        number = sum(entry.name.startswith(row["split"]) for entry in files)
        files.append(FileEntry(f"{row['split']}-{number:05d}.tok", row["sha256"], row["size_bytes"]))
        for what in ("tokens", "documents", "bytes"):
            metrics[f"{row['split']}_{what}"] += row[what]
    say(f"  {metrics['train_tokens']:,} training tokens in {len(files)} shards")
    return files, metrics


class _Tokenizer:
    """The Ray task: one part of documents into one or more shards."""

    __name__ = "tokenize"

    def __init__(self, config: TokenizeConfig, documents_ref: str, tokenizer_ref: str, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        self.documents_ref, self.tokenizer_ref = documents_ref, tokenizer_ref

    def __call__(self, unit: dict[str, Any]) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        from forge_ray.data import tokenizer as vocabulary

        tokenizer = vocabulary.load(self.workspace.get(self.tokenizer_ref))
        self._vocab_size, self._end = tokenizer.get_vocab_size(), vocabulary.end_of_document(tokenizer)
        path = self.workspace.get(self.documents_ref).local_path(unit["part"])
        split = unit["part"].partition("-")[0]
        rows, pending = [], _Pending()
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_ENCODE_DOCUMENTS):
            documents = batch.to_pylist()
            encodings = tokenizer.encode_batch_fast(
                [document["text"] for document in documents], add_special_tokens=False
            )
            for document, encoding in zip(documents, encodings, strict=True):
                pending.add(document, [*encoding.ids, self._end])
                if pending.num_tokens >= self.config.shard_tokens:
                    rows.append(self._store(split, pending))
                    pending = _Pending()
        return rows + ([self._store(split, pending)] if pending.num_tokens else [])

    def _store(self, split: str, pending: _Pending) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        tokens = np.concatenate(pending.tokens).astype(dtype_of(self._vocab_size))
        with self.workspace.new_file(split) as build:
            write(build.stream, tokens, pa.table(pending.columns), vocab_size=self._vocab_size, end_token=self._end)
        return {
            "split": split,
            "sha256": build.entry.sha256,
            "size_bytes": build.entry.size_bytes,
            "tokens": len(tokens),
            "documents": len(pending.columns["id"]),
            "bytes": pending.num_bytes,
        }


class _Pending:
    """Documents on their way into a shard."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.num_tokens = self.num_bytes = 0
        self.columns: dict[str, list[Any]] = {name: [] for name in ("id", "offset", "length", "source", "licence")}

    def add(self, document: dict[str, str], ids: list[int]) -> None:
        import numpy as np

        row = (document["id"], self.num_tokens, len(ids), document["source"], document["licence"])
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.tokens.append(np.asarray(ids, dtype=np.uint32))
        self.num_tokens += len(ids)
        self.num_bytes += len(document["text"].encode())


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(
        "a token shard is damaged", got=f"{path}: {why}", do="restore the file, or run `forge tokenize` again"
    )
