"""The shard format, and the stage that writes it."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from forge_ray.artifact import Artifact, Manifest
from forge_ray.config import CurateConfig, TokenizeConfig, TokenizerConfig
from forge_ray.data import curate, shards
from forge_ray.data import tokenizer as vocabulary
from forge_ray.data.shards import Shard
from forge_ray.errors import CorruptError


def written(path: Path, num_tokens: int = 1000, vocab_size: int = 60_000) -> np.ndarray:
    """Writes a shard of seeded tokens in documents of 100."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(shards.dtype_of(vocab_size))
    offsets = list(range(0, num_tokens, 100))
    names = [f"doc-{offset}" for offset in offsets]
    table = pa.table(
        {
            "id": names,
            "offset": offsets,
            "length": [min(100, num_tokens - o) for o in offsets],
            "source": names,
            "licence": ["MIT"] * len(names),
        }
    )
    with path.open("wb") as stream:
        shards.write(stream, tokens, table, vocab_size=vocab_size, end_token=7)
    return tokens


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(256, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (1 << 20, 4)])
@pytest.mark.parametrize("num_tokens", [1, 31, 1000])
def test_a_shard_comes_back_as_it_was_written(tmp_path: Path, vocab_size: int, itemsize: int, num_tokens: int) -> None:
    tokens = written(tmp_path / "a.tok", num_tokens, vocab_size)
    shard = Shard(tmp_path / "a.tok")
    shard.verify()
    assert shard.tokens.itemsize == itemsize
    assert (shard.tokens == tokens).all()
    assert (shard.header.vocab_size, shard.header.end_token, shard.header.num_tokens) == (vocab_size, 7, num_tokens)
    assert shard.table().num_rows == shard.header.num_documents == -(-num_tokens // 100)
    assert sum(shard.table()["length"].to_pylist()) == num_tokens


def test_the_file_reads_as_its_docstring_says(tmp_path: Path) -> None:
    tokens = written(tmp_path / "a.tok")
    data = (tmp_path / "a.tok").read_bytes()
    magic, version, length = struct.unpack("<8sII", data[:16])
    start = (16 + length + 63) // 64 * 64
    assert (magic, version) == (b"FORGETOK", 1)
    assert not any(data[16 + length : start])
    assert struct.unpack("<1000H", data[start : start + 2000]) == tuple(tokens)
    assert pa.ipc.open_stream(io.BytesIO(data[start + 2000 :])).read_all().num_rows == 10


@pytest.mark.parametrize(("where", "part"), [("tokens", "tokens"), ("table", "document table")])
def test_any_flipped_byte_is_found_and_the_file_named(tmp_path: Path, where: str, part: str) -> None:
    path = tmp_path / "a.tok"
    written(path)
    good = path.read_bytes()
    shard = Shard(path)
    first, last = (shard._tokens_at, shard._table_at) if where == "tokens" else (shard._table_at, len(good))
    for at in (first, last - 1, *random.Random(0).sample(range(first, last), 10)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(CorruptError, match=rf"a\.tok.*{part}"):
            Shard(path).verify()


@pytest.mark.parametrize("keep", [0, 10, 16, 100, 600, -1])
def test_a_truncated_shard_is_refused_when_opened(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.tok"
    written(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"a\.tok"):
        Shard(path)


@pytest.mark.parametrize(
    ("at", "new", "why"),
    [
        (0, b"SAFETENS", "does not start as a token shard"),
        (8, struct.pack("<I", 2), "its format version is 2"),
        (16, b"[", "its header cannot be read"),
    ],
)
def test_what_is_no_shard_of_this_version_is_refused(tmp_path: Path, at: int, new: bytes, why: str) -> None:
    path = tmp_path / "a.tok"
    written(path)
    data = path.read_bytes()
    path.write_bytes(data[:at] + new + data[at + len(new) :])
    with pytest.raises(CorruptError, match=why):
        Shard(path)


def test_a_byte_flipped_anywhere_in_the_header_raises_nothing_but_our_own_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tok"
    written(path)
    good = path.read_bytes()
    found = 0
    for at in range(Shard(path)._tokens_at):
        path.write_bytes(good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :])
        try:
            Shard(path).verify()
        except CorruptError:
            found += 1
    assert found > 200


# -------------------------------------------------------------------------------------------------------------- stage


@pytest.fixture
def stage(publish: Callable[..., Artifact], rows: Callable[..., Any], plain_loop: None) -> tuple[Artifact, Artifact]:
    """Documents and a vocabulary of theirs."""
    texts = [row["text"] for row in rows(40)] + ["text with <|endoftext|> in it", "日本語 👩‍👧"]
    documents = publish({"train-00000.parquet": rows(texts=texts), "heldout-00000.parquet": rows(5, seed=1)})
    text = vocabulary.learnt(TokenizerConfig(vocab_size=400), texts)
    file = documents.workspace.put_bytes("tokenizer.json", text.encode())
    tokenizer = documents.workspace.publish(Manifest(stage="tokenizer", fingerprint=file.sha256[:16], files=(file,)))
    return documents, tokenizer


def opened(documents: Artifact, tokenizer: Artifact, shard_tokens: int) -> tuple[dict[str, Shard], dict[str, int]]:
    """Runs the stage; shards by name."""
    workspace = documents.workspace
    files, metrics = shards.run(TokenizeConfig(shard_tokens=shard_tokens), documents, tokenizer, workspace)
    shards_of = [entry for entry in files if entry.name.endswith(".tok")]
    found = {entry.name: Shard(workspace.verified(entry, entry.name)) for entry in shards_of}
    for shard in found.values():
        shard.verify()
    return found, metrics


def test_the_table_leads_to_every_documents_text(stage: tuple[Artifact, Artifact]) -> None:
    documents, tokenizer_artifact = stage
    tokenizer = vocabulary.load(tokenizer_artifact)
    found, metrics = opened(documents, tokenizer_artifact, shard_tokens=1 << 20)
    assert list(found) == ["train-00000.tok", "heldout-00000.tok"]
    for split in ("train", "heldout"):
        shard = found[f"{split}-00000.tok"]
        wanted = {row["id"]: row for row in vocabulary.sample(documents, split, 1 << 30)}
        end = 0
        for row in shard.table().to_pylist():
            assert row["offset"] == end
            end = row["offset"] + row["length"]
            ids = shard.tokens[row["offset"] : end]
            assert ids[-1] == shard.header.end_token
            assert shard.header.end_token not in ids[:-1]
            document = wanted.pop(row["id"])
            assert tokenizer.decode(ids[:-1]) == document["text"]
            assert row["key"] == document["key"]
        assert not wanted
        assert end == shard.header.num_tokens == metrics[f"{split}_tokens"]


def test_smaller_shards_hold_the_same_tokens(stage: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, totals = opened(*stage, shard_tokens=1 << 20)
    monkeypatch.setattr(shards, "_ENCODE_DOCUMENTS", 7)
    monkeypatch.setattr(shards, "_ENCODE_CHARS", 1000)
    pieces, split_totals = opened(*stage, shard_tokens=300)
    train = [name for name in pieces if name.startswith("train")]
    assert train == [f"train-{i:05d}.tok" for i in range(len(train))]
    assert len(train) > 3
    assert all(pieces[name].header.num_tokens >= 300 for name in train[:-1])
    assert (np.concatenate([pieces[name].tokens for name in train]) == whole["train-00000.tok"].tokens).all()
    assert split_totals == totals


def test_the_index_says_of_each_training_shard_what_is_in_it(stage: tuple[Artifact, Artifact]) -> None:
    documents, tokenizer = stage
    files, metrics = shards.run(TokenizeConfig(shard_tokens=300), documents, tokenizer, documents.workspace)
    published = documents.workspace.publish(Manifest(stage="tokenize", fingerprint="0" * 16, files=tuple(files)))
    index = shards.ShardIndex.of(published)
    assert [row.name for row in index.shards] == [n for n in published.names(".tok") if n.startswith("train")]
    assert sum(row.tokens for row in index.shards) == metrics["train_tokens"]
    for row in index.shards:
        header = Shard(published.local_path(row.name)).header
        assert row.entry == published.entry(row.name)
        assert (row.tokens, row.documents) == (header.num_tokens, header.num_documents)
        assert (index.vocab_size, index.end_token) == (header.vocab_size, header.end_token)


def test_shards_hold_documents_of_one_source_each(
    stage: tuple[Artifact, Artifact], publish: Callable[..., Artifact], rows: Callable[..., Any]
) -> None:
    mixed = [row | {"origin": origin} for row, origin in zip(rows(9, seed=3), "aaabbabbb", strict=True)]
    documents = publish({"train-00000.parquet": mixed, "train-00001.parquet": rows(2, seed=4)})
    files, _ = shards.run(TokenizeConfig(), documents, stage[1], documents.workspace)
    content = next(entry for entry in files if entry.name == shards.INDEX)
    published = documents.workspace.publish(Manifest(stage="tokenize", fingerprint="1" * 16, files=tuple(files)))
    assert content in published.manifest.files
    found = [(row.origin, row.documents) for row in shards.ShardIndex.of(published).shards]
    assert found == [("a", 3), ("b", 2), ("a", 1), ("b", 3), ("", 2)]


def test_of_two_documents_with_one_id_each_has_the_place_that_is_its_own(
    stage: tuple[Artifact, Artifact], publish: Callable[..., Artifact], rows: Callable[..., Any]
) -> None:
    """Two sources, or http and https, may give the same file, and so the same id."""
    documents, tokenizer = stage
    workspace = documents.workspace
    # The middle one is the first again.
    twice = [row | {"origin": "a"} for row in rows(2, seed=3)]
    documents = publish(
        {"train-00000.parquet": [twice[0], twice[0], twice[1]], "heldout-00000.parquet": rows(5, seed=1)}
    )
    for steps, fates in (({}, ["kept", "kept", "kept"]), ({"exact": {"enabled": True}}, ["kept", "dropped", "kept"])):
        curated, _ = curate.run(CurateConfig.model_validate(steps), documents, workspace)
        name = f"{len(steps):016d}"
        artifact = workspace.publish(Manifest(stage="curate", fingerprint=name, files=tuple(curated)))
        files, _ = shards.run(TokenizeConfig(), artifact, tokenizer, workspace)
        entries = {entry.name: entry for entry in files}
        table = Shard(workspace.verified(entries["train-00000.tok"], "x")).table()
        ledger = pq.read_table(workspace.verified(entries["ledger-train-00000.parquet"], "x"))
        assert ledger["fate"].to_pylist() == fates
        placed = ledger.filter(pc.is_valid(ledger["shard"]))
        assert placed["fate"].to_pylist() == ["kept"] * fates.count("kept")
        for ours, theirs in (("id", "id"), ("offset", "offset"), ("tokens", "length")):
            assert placed[ours].to_pylist() == table[theirs].to_pylist()
