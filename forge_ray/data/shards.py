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
      T + tokens      table: one Arrow IPC stream with the columns id, offset, length, key, licence; offset and length
                      count tokens, the end token included
```

It names no place: of a corpus that moves to another folder or store, every shard stays the same, byte for byte.

A shard is a blob, so its manifest holds the SHA-256 of the whole; the two digests inside let a lone file be verified.
A shard holds documents of one split and one source. Beside them the artifact has `index.json`: what training plans its
order from, without opening a shard.

Owns writing and reading the format and the `tokenize` stage. Does not own the order of training (`loader.py`).
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace, digest_bytes
from forge_ray.config import TokenizeConfig
from forge_ray.data.account import ledger
from forge_ray.data.curation.text import slices
from forge_ray.errors import CorruptError, NotFoundError
from forge_ray.memo import Memo
from forge_ray.runtime import map_rows
from forge_ray.telemetry import say

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from tokenizers import Tokenizer

FORMAT_VERSION = 3
_SHARD_VERSION = 1
INDEX = "index.json"
MAGIC = b"FORGETOK"
_ALIGN = 64
_ENCODE_DOCUMENTS = 256
_ENCODE_CHARS = 2 << 20
_LOADED: dict[str, Tokenizer] = {}  # by digest; one at a time
_Place = tuple[str, str, int, int]  # a document's id, its shard, the place in it and the length, in tokens


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
            if version != _SHARD_VERSION:
                raise _damaged(path, f"its format version is {version}, this program reads {_SHARD_VERSION}")
            try:
                self.header = Header(**json.loads(stream.read(length)))
                dtype = np.dtype(self.header.dtype).newbyteorder("<")
            except (ValueError, TypeError) as error:
                raise _damaged(path, f"its header cannot be read: {error}") from None
        self._tokens_at = tokens_at(length)
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


@dataclass(frozen=True)
class ShardInfo:
    """A training shard as the index has it; `origin` is the name of the source that its documents came from."""

    name: str
    sha256: str
    size_bytes: int
    tokens: int
    documents: int
    origin: str

    @property
    def entry(self) -> FileEntry:
        """The manifest's row of it."""
        return FileEntry(self.name, self.sha256, self.size_bytes)


@dataclass(frozen=True)
class ShardIndex:
    """All training shards of an artifact, in the order of the documents, and what their tokens mean."""

    shards: tuple[ShardInfo, ...]
    vocab_size: int
    end_token: int

    def to_json(self) -> bytes:
        """The content of `index.json`."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def of(artifact: Artifact) -> ShardIndex:
        """The index of a published `tokenize` artifact."""
        body = artifact.read_json(INDEX)
        shards = tuple(ShardInfo(**row) for row in body.pop("shards"))
        return ShardIndex(shards=shards, **body)


def write(stream: Any, tokens: np.ndarray, table: pa.Table, *, vocab_size: int, end_token: int) -> None:
    """Writes a shard in the format above.

    Args:
        stream: A binary file at its start.
        tokens: Ids, of `dtype_of(vocab_size)`.
        table: Columns id, offset, length, key, licence.
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
    stream.write(MAGIC + struct.pack("<II", _SHARD_VERSION, len(header)) + header)
    stream.write(b"\0" * (tokens_at(len(header)) - 16 - len(header)))
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
        Shards `train-00000.tok`, `heldout-00000.tok` ... in the order of the documents, the index of those to train
        on, the ledger with the place of each document in them, and their totals.
    """
    from forge_ray.data import tokenizer as vocabulary

    units = [
        {
            "_part": name,
            "split": name.partition("-")[0],
            "entry": documents.entry(name),
            "ledger": _ledger_of(documents, name),
            "tokenizer": tokenizer.entry(vocabulary.FILE).sha256,
        }
        for name in documents.names(".parquet")
        if name.startswith(("train-", "heldout-"))
    ]
    memo = Memo(workspace, "tokenize", FORMAT_VERSION, config.fingerprinted())
    results = map_rows("tokenize", _Tokenizer(config, documents.ref, tokenizer.ref, workspace), units, memo)
    files: list[FileEntry] = []
    index: list[ShardInfo] = []
    numbers: Counter[str] = Counter()
    metrics = {f"{split}_{what}": 0 for split in ("train", "heldout") for what in ("tokens", "documents", "bytes")}
    for unit, result in zip(units, results, strict=True):
        for row in result["shards"]:
            files.append(replace(row["entry"], name=f"{row['split']}-{numbers[row['split']]:05d}.tok"))
            numbers[row["split"]] += 1
            if row["split"] == "train":
                size, digest = files[-1].size_bytes, files[-1].sha256
                index.append(ShardInfo(files[-1].name, digest, size, row["tokens"], row["documents"], row["origin"]))
            for what in ("tokens", "documents", "bytes"):
                metrics[f"{row['split']}_{what}"] += row[what]
        if result["ledger"]:
            files.append(replace(result["ledger"], name=unit["ledger"].name))
    unread = {unit["ledger"].name for unit in units if unit["ledger"]}
    files += [documents.entry(name) for name in ledger.parts(documents) if name not in unread]
    reader = vocabulary.load(tokenizer)
    content = ShardIndex(tuple(index), reader.get_vocab_size(), vocabulary.end_of_document(reader)).to_json()
    files.append(workspace.put_bytes(INDEX, content))
    say(f"  {metrics['train_tokens']:,} training tokens in {len(index)} shards")
    return files, metrics


def _ledger_of(documents: Artifact, part: str) -> FileEntry | None:
    try:
        return documents.entry(f"{ledger.PREFIX}{part}")
    except NotFoundError:
        return None


class _Tokenizer:
    """The Ray task: one part of documents into one or more shards."""

    __name__ = "tokenize"

    def __init__(self, config: TokenizeConfig, documents_ref: str, tokenizer_ref: str, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        self.documents_ref, self.tokenizer_ref = documents_ref, tokenizer_ref

    def __call__(self, unit: dict[str, Any]) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        from forge_ray.data import tokenizer as vocabulary

        tokenizer = self._loaded(unit["tokenizer"])
        self._vocab_size, self._end = tokenizer.get_vocab_size(), vocabulary.end_of_document(tokenizer)
        path = self.workspace.verified(unit["entry"], f"{self.documents_ref}:{unit['_part']}")
        split = unit["split"]
        rows, pending = [], _Pending()
        places: list[_Place] = []
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_ENCODE_DOCUMENTS):
            documents = batch.to_pylist()
            ids_of = _encoded(tokenizer, [document["text"] for document in documents])
            for document, ids in zip(documents, ids_of, strict=True):
                origin = document.get("origin") or ""
                if origin != pending.origin and pending.num_tokens:
                    rows.append(self._store(split, pending, places))
                    pending = _Pending()
                pending.origin = origin
                pending.add(document, [*ids, self._end])
                if pending.num_tokens >= self.config.shard_tokens:
                    rows.append(self._store(split, pending, places))
                    pending = _Pending()
        if pending.num_tokens:
            rows.append(self._store(split, pending, places))
        return [{"shards": rows, "ledger": unit["ledger"] and self._ledger(unit, places)}]

    def _loaded(self, sha256: str) -> Tokenizer:
        """The tokenizer, once per process.

        One that has encoded leaves 2.2 MiB behind when it is dropped (tokenizers 0.23.3, 2026-11-23), so a worker that
        loaded it for every part would grow with the corpus.
        """
        from forge_ray.data import tokenizer as vocabulary

        if sha256 not in _LOADED:
            _LOADED.clear()
            _LOADED[sha256] = vocabulary.load(self.workspace.get(self.tokenizer_ref))
        return _LOADED[sha256]

    def _ledger(self, unit: dict[str, Any], places: list[_Place]) -> FileEntry:
        """The part's ledger with the place of each kept document: they come in one order, and ids may come twice."""
        import pyarrow.parquet as pq

        found = pq.read_table(self.workspace.verified(unit["ledger"], f"{self.documents_ref}:{unit['ledger'].name}"))
        columns = {name: found[name].to_pylist() for name in found.column_names}
        kept = [i for i, fate in enumerate(columns["fate"]) if fate == ledger.KEPT]
        if [columns["id"][i] for i in kept] != [doc_id for doc_id, *_ in places]:
            raise CorruptError(
                "a part and its ledger do not name the same documents",
                got=f"{self.documents_ref}:{unit['_part']}: {len(places)} documents, {len(kept)} kept by the ledger",
                do=f"delete artifacts/{self.documents_ref}.json and run the same command again; report it as a defect",
            )
        for i, (_, *place) in zip(kept, places, strict=True):
            columns["shard"][i], columns["offset"][i], columns["tokens"][i] = place
        return ledger.store(self.workspace, unit["ledger"].name, ledger.table(columns))

    def _store(self, split: str, pending: _Pending, places: list[_Place]) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        tokens = np.concatenate(pending.tokens).astype(dtype_of(self._vocab_size))
        with self.workspace.new_file(split) as build:
            write(build.stream, tokens, pa.table(pending.columns), vocab_size=self._vocab_size, end_token=self._end)
        for doc_id, offset, length in zip(*(pending.columns[n] for n in ("id", "offset", "length")), strict=True):
            places.append((doc_id, build.entry.sha256, offset, length))
        return {
            "split": split,
            "entry": build.entry,
            "tokens": len(tokens),
            "documents": len(pending.columns["id"]),
            "origin": pending.origin,
            "bytes": pending.num_bytes,
        }


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text; long ones not together, because the library needs 63 bytes for each of theirs.

    1.5 million tokens of 4.8 MB took 303 MB (tokenizers 0.23.3, 2026-11-24).
    """
    for some in slices(texts, _ENCODE_CHARS):
        for encoding in tokenizer.encode_batch_fast(list(some), add_special_tokens=False):
            yield encoding.ids


class _Pending:
    """Documents on their way into a shard."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.num_tokens = self.num_bytes = 0
        self.origin = ""
        self.columns: dict[str, list[Any]] = {name: [] for name in ("id", "offset", "length", "key", "licence")}

    def add(self, document: dict[str, str], ids: list[int]) -> None:
        import numpy as np

        row = (document["id"], self.num_tokens, len(ids), document["key"], document["licence"])
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.tokens.append(np.asarray(ids, dtype=np.uint32))
        self.num_tokens += len(ids)
        self.num_bytes += len(document["text"].encode())


def tokens_at(header_bytes: int) -> int:
    """Where the tokens begin behind a header of this length."""
    return -(-(16 + header_bytes) // _ALIGN) * _ALIGN


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(
        "a token shard is damaged", got=f"{path}: {why}", do="restore the file, or run `forge tokenize` again"
    )
