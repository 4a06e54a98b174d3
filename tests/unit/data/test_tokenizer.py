"""The vocabulary: lossless, of a size that the corpus supports, from a fair and bounded sample."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from forge_ray.artifact import Artifact, Manifest
from forge_ray.config import TokenizerConfig
from forge_ray.data import tokenizer as vocabulary
from forge_ray.errors import DataError

Publish, MakeRows = Callable[..., Artifact], Callable[..., list[dict[str, str]]]


def learn(documents: Artifact, **config: Any) -> tuple[Artifact, dict[str, Any]]:
    """Trains as the Ray task does and publishes the result."""
    text, metrics = vocabulary._learn(TokenizerConfig(**config), documents.ref, documents.workspace)
    file = documents.workspace.put_bytes("tokenizer.json", text.encode())
    manifest = Manifest(stage="tokenizer", fingerprint=file.sha256[:16], files=(file,))
    return documents.workspace.publish(manifest), metrics


@pytest.fixture
def documents(publish: Publish, rows: MakeRows) -> Artifact:
    return publish({"train-00000.parquet": rows(60), "heldout-00000.parquet": rows(10, seed=1)})


def test_any_text_comes_back_as_it_was(documents: Artifact) -> None:
    tokenizer = vocabulary.load(learn(documents, vocab_size=400)[0])
    texts = [
        "",
        " ",
        "\n\n\t  \r\n",
        "e\u0301 is not é",
        "日本語",
        "العربية",
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        "\0\x1f\ufeff\uffff",
        "a" * 99,
        "it's WE'RE",
        " x ",
    ]
    draw = random.Random(0)
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    texts += ["".join(map(chr, draw.choices(points, k=50))) for _ in range(200)]
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert [tokenizer.decode(e.ids, skip_special_tokens=False) for e in encoded] == texts


def test_the_vocabulary_has_the_size_asked_for_and_the_report_is_of_held_out_text(documents: Artifact) -> None:
    artifact, metrics = learn(documents, vocab_size=500)
    tokenizer = vocabulary.load(artifact)
    texts = [row["text"] for row in vocabulary.sample(documents, "heldout", 1 << 30)]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert tokenizer.get_vocab_size() == metrics["vocab_size"] == 500
    assert metrics["heldout_bytes"] == num_bytes
    assert metrics["heldout_bytes_per_token"] == num_bytes / sum(len(tokenizer.encode(text).ids) for text in texts)
    assert learn(documents, vocab_size=300)[1]["heldout_bytes_per_token"] < metrics["heldout_bytes_per_token"]


def test_a_vocabulary_that_the_corpus_does_not_support_names_the_size_that_it_does(documents: Artifact) -> None:
    with pytest.raises(DataError, match="at most") as caught:
        learn(documents, vocab_size=50_000)
    possible = int(caught.value.wanted.split()[2].rstrip(","))
    assert learn(documents, vocab_size=possible)[1]["vocab_size"] == possible
    with pytest.raises(DataError):
        learn(documents, vocab_size=possible + 1)


def test_the_first_special_token_ends_a_document(documents: Artifact) -> None:
    artifact, _ = learn(documents, vocab_size=300, special_tokens=("<|end|>", "<|user|>"))
    tokenizer = vocabulary.load(artifact)
    assert tokenizer.id_to_token(vocabulary.end_of_document(tokenizer)) == "<|end|>"


def test_special_tokens_that_stand_in_a_text_are_text(documents: Artifact) -> None:
    artifact, _ = learn(documents, vocab_size=300, special_tokens=("<|end|>", "<|user|>"))
    tokenizer = vocabulary.load(artifact)
    text = "write <|end|> and <|user|> so"
    ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == text


def test_the_sample_depends_on_documents_and_not_on_parts(publish: Publish, rows: MakeRows) -> None:
    every = rows(50)
    one = publish({"train-00000.parquet": every})
    other = every[::-1]
    three = publish(
        {"train-00000.parquet": other[:7], "train-00001.parquet": other[7:8], "train-00002.parquet": other[8:]}
    )
    drawn = [[row["id"] for row in vocabulary.sample(documents, "train", 3000)] for documents in (one, three)]
    assert drawn[0] == drawn[1]
    assert 0 < len(drawn[0]) < 50


def test_the_sample_is_bounded_and_a_larger_one_extends_a_smaller(publish: Publish, rows: MakeRows) -> None:
    documents = publish({"train-00000.parquet": rows(50), "heldout-00000.parquet": rows(5, seed=1)})
    largest = max(len(row["text"]) for row in rows(50))
    drawn = [list(vocabulary.sample(documents, "train", size)) for size in (1, 2000, 4000, 1 << 30)]
    ids = [[row["id"] for row in found] for found in drawn]
    assert len(ids[0]) == 1
    assert 2000 <= sum(len(row["text"]) for row in drawn[1]) < 2000 + largest
    assert set(ids[1]) < set(ids[2]) < set(ids[3]) == {row["id"] for row in rows(50)}
    assert ids[3] == sorted(ids[3])
