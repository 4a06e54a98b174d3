"""The vocabulary: lossless, cut as its pattern says, of a size that the corpus supports."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from forge_ray.artifact import Artifact, Manifest
from forge_ray.config import TokenizerConfig
from forge_ray.data import tokenizer as vocabulary
from forge_ray.data.sample import sample
from forge_ray.errors import ConfigError, DataError

Publish, MakeRows = Callable[..., Artifact], Callable[..., list[dict[str, str]]]


def learn(documents: Artifact, **config: Any) -> tuple[Artifact, dict[str, Any]]:
    """Trains as the Ray task does and publishes the result."""
    fields = TokenizerConfig(**config)
    text = vocabulary.learnt(fields, [row["text"] for row in sample(documents, "train", fields.sample_bytes)])
    file = documents.workspace.put_bytes(vocabulary.FILE, text.encode())
    manifest = Manifest(stage="tokenizer", fingerprint=file.sha256[:16], files=(file,))
    metrics = vocabulary._measured(text, documents.ref, documents.workspace)
    return documents.workspace.publish(manifest), metrics


@pytest.fixture
def documents(publish: Publish, rows: MakeRows) -> Artifact:
    return publish({"train-00000.parquet": rows(60), "heldout-00000.parquet": rows(10, seed=1)})


@pytest.mark.parametrize("pattern", vocabulary.PATTERNS)
def test_any_text_comes_back_as_it_was(documents: Artifact, pattern: str) -> None:
    tokenizer = vocabulary.load(learn(documents, vocab_size=400, pattern=pattern)[0])
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
        "def f(self):\n\tif x_y:\n\t    return HTTPServer2()\n",
    ]
    draw = random.Random(0)
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    texts += ["".join(map(chr, draw.choices(points, k=50))) for _ in range(200)]
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert [tokenizer.decode(e.ids, skip_special_tokens=False) for e in encoded] == texts


@pytest.mark.parametrize(
    ("pattern", "text", "pieces"),
    [
        ("gpt4", "HTTPServerError max_len 12345", "HTTPServerError| max|_len| |123|45"),
        ("gpt4", "it's\n    x", "it|'s|\n|   | x"),
        ("gpt2", "max_len 12345 (it's)", "max|_|len| 12345| (|it|'s|)"),
        ("digits1", "v 123.4", "v| |1|2|3|.|4"),
        ("code", "HTTPServerError getURLPath max_len", "HTTP|Server|Error| get|URL|Path| max|_len"),
        ("code", "if A:\n        return ABc\n", "if| A|:|\n        |return| A|Bc|\n"),
        ("code", "日本語 straße ÉCOLE", "日本語| straße| ÉCOLE"),
    ],
)
def test_a_pattern_cuts_text_as_it_says(pattern: str, text: str, pieces: str) -> None:
    tokenizer = vocabulary.train([text], vocab_size=300, pattern=pattern, special_tokens=["<|end|>"])
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    starts = [start for _, (start, _) in found]
    assert [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])] == pieces.split("|")


@pytest.mark.parametrize("pattern", ["gpt4", "code"])
def test_a_vocabulary_cut_down_is_the_one_that_would_have_been_trained(rows: MakeRows, pattern: str) -> None:
    texts = [row["text"] for row in rows(40)] + ["a b a b aa ab aab aaab abab"] * 9
    fields: dict[str, Any] = {"pattern": pattern, "special_tokens": ["<|end|>", "<|user|>"]}
    largest = vocabulary.train(texts, vocab_size=10_000, **fields)
    assert largest.get_vocab_size() < 10_000
    for size in (258, 259, 300, 351, largest.get_vocab_size()):
        wanted = vocabulary.train(texts, vocab_size=size, **fields)
        assert json.loads(vocabulary.cut_to(largest, size).to_str()) == json.loads(wanted.to_str())


def test_the_vocabulary_has_the_size_asked_for_and_the_report_is_of_held_out_text(documents: Artifact) -> None:
    artifact, metrics = learn(documents, vocab_size=500)
    tokenizer = vocabulary.load(artifact)
    texts = [row["text"] for row in sample(documents, "heldout", 1 << 30)]
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


def test_a_size_without_room_for_the_bytes_is_refused(documents: Artifact) -> None:
    many = tuple(f"<|{i}|>" for i in range(60))
    with pytest.raises(ConfigError, match="too small") as caught:
        learn(documents, vocab_size=315, special_tokens=many)
    assert caught.value.wanted == "at least 316 entries"
    assert learn(documents, vocab_size=316, special_tokens=many)[1]["vocab_size"] == 316


def test_the_report_tells_types_of_documents_apart(publish: Publish, rows: MakeRows) -> None:
    kinds = [("guides", "en", "a/b.md"), ("guides", "", "c.txt"), ("tickets", "en", "d.jsonl#7")]
    held_out = [
        {**row, "origin": origin, "language": language, "key": key}
        for row, (origin, language, key) in zip(rows(3, seed=1), kinds, strict=True)
    ]
    documents = publish({"train-00000.parquet": rows(60), "heldout-00000.parquet": held_out})
    _, metrics = learn(documents, vocab_size=400)
    by, sizes = metrics["heldout_by"], [len(row["text"].encode()) for row in held_out]
    assert {name: cell["bytes"] for name, cell in by["origin"].items()} == {
        "guides": sizes[0] + sizes[1],
        "tickets": sizes[2],
    }
    assert set(by["language"]) == {"en"}
    assert set(by["suffix"]) == {".md", ".txt", ".jsonl"}
    assert sum(cell["tokens"] for cell in by["suffix"].values()) == metrics["heldout_tokens"]
