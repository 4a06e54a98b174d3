"""The vocabulary studio: what it counts, what it trains for equal compute, what it recommends and how it says so."""

from __future__ import annotations

import base64
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config import ForgeConfig, ModelConfig, PretrainConfig
from forge_ray.data import tokenizer as vocabulary
from forge_ray.errors import DataError, NotInstalledError
from forge_ray.evaluate import general_tokenizers, recommendation, vocabulary_page
from forge_ray.evaluate.equal_compute import Trial, _Stream, _tokens
from forge_ray.evaluate.vocabulary import terms, trial
from forge_ray.model.arithmetic import train_flops_per_token

TINY = ModelConfig(num_layers=1, d_model=32, num_heads=1, num_kv_heads=1, d_ff=32)
FIELDS: dict[str, Any] = {"pattern": "gpt4", "special_tokens": ["<|end|>"]}


def prose(count: int, seed: int = 0) -> list[str]:
    """Documents of words that follow one another by a rule, so that there is something to learn."""
    draw = random.Random(seed)
    words = [f"{a}{b}" for a in ("inst", "snap", "bill", "conf") for b in ("ances", "shots", "ingly", "igure")]
    texts = []
    for _ in range(count):
        at, line = draw.randrange(16), []
        for _ in range(40):
            at = (at * 5 + draw.randrange(2) + 1) % 16
            line.append(words[at])
        texts.append(" ".join(line))
    return texts


def row(
    name: str, whose: str, size: int, tokens: int, bits: list[float], parameters: int = 1_000_000
) -> dict[str, Any]:
    """A candidate as the sweep makes it."""
    found = {"name": name, "whose": whose, "vocab_size": size, "pattern": "gpt4", "tokens": tokens, "bytes": 400_000}
    found |= {"bytes_per_token": 400_000 / tokens, "parameters": parameters, "embedding_frac": 0.25, "by": {}}
    return found | ({"trials": [{"bits_per_byte": b, "steps": 9} for b in bits]} if bits else {})


# -------------------------------------------------------------------------------------------------- equal compute


def test_every_vocabulary_gets_the_same_compute_and_a_larger_one_fewer_steps() -> None:
    plan = Trial(TINY, PretrainConfig(slots=2, max_workers=1, micro_batch=2, seq_len=32), flops=3e9)
    steps = {size: plan.sized(size, seed=3).steps for size in (300, 1000, 4000)}
    assert steps[300] > steps[1000] > steps[4000]
    for size, count in steps.items():
        spent = count * 2 * 2 * 32 * train_flops_per_token(TINY, size, 32)
        assert abs(spent - 3e9) <= 0.5001 * spent / count
    assert plan.sized(300, seed=3).seed == 3


def test_a_trial_learns_and_is_the_same_for_the_same_seed() -> None:
    training, held_out = prose(60), prose(6, seed=9)
    tokenizer = vocabulary.train(training, vocab_size=300, **FIELDS)
    config = PretrainConfig(slots=1, max_workers=1, micro_batch=4, seq_len=32, precision="fp32")
    results = [
        Trial(TINY, config, flops).run(tokenizer, iter(training), held_out, seed=seed, bf16=False)
        for flops, seed in ((1e7, 0), (1e9, 0), (1e9, 0), (1e9, 1))
    ]
    few, many, again, other = (result["bits_per_byte"] for result in results)
    assert many < 0.8 * few
    assert many == again != other
    assert results[1]["steps"] > results[0]["steps"] >= 1


def test_the_stream_reads_every_sequence_once_before_any_twice() -> None:
    import numpy as np

    config = PretrainConfig(slots=1, max_workers=1, micro_batch=3, seq_len=16, seed=5)
    stream = _Stream(np.arange(10 * 16 + 1, dtype=np.uint32), config)
    rows = np.concatenate([stream.slot(step, 0) for step in range(7)])
    assert (np.diff(rows, axis=1) == 1).all()
    firsts = rows[:, 0].tolist()
    assert sorted(firsts[:10]) == sorted(firsts[10:20]) == list(range(0, 160, 16))
    assert firsts[:10] != firsts[10:20]
    with pytest.raises(DataError, match="less than one sequence"):
        _Stream(np.arange(16, dtype=np.uint32), config)


def test_tokens_are_taken_until_there_are_enough_and_documents_are_ended() -> None:
    texts = prose(20)
    tokenizer = vocabulary.train(texts, vocab_size=300, **FIELDS)
    every = _tokens(tokenizer, texts, 0, 10**9)
    assert every[0] == every[-1] == 0
    assert (every == 0).sum() == 21
    assert tokenizer.decode([int(t) for t in every if t]) == "".join(texts)
    assert _tokens(tokenizer, iter(texts), 0, 100).tolist() == every[:100].tolist()


def test_the_job_decides_the_optimizer_and_the_sweep_the_size() -> None:
    config = ForgeConfig.model_validate(
        {
            "pretrain": {"optimizer": {"kind": "adamw", "learning_rate": 0.5}, "seq_len": 512, "slots": 8},
            "sweep": {"seq_len": 64, "micro_batch": 3, "train_flops": 7e9, "model": {"num_layers": 3}},
        }
    )
    found = trial(config)
    assert found.config.optimizer == config.pretrain.optimizer
    assert (found.config.seq_len, found.config.micro_batch, found.config.slots) == (64, 3, 1)
    assert (found.flops, found.model.num_layers) == (7e9, 3)


# -------------------------------------------------------------------------------------------------- recommendation


def test_the_fewest_bits_win_where_the_difference_is_more_than_noise() -> None:
    rows = [
        row("a", "own", 4096, 100_000, [1.20, 1.21]),
        row("b", "own", 8192, 90_000, [1.30, 1.31]),
        row("c", "own", 16384, 80_000, [1.40]),
    ]
    chosen, why = recommendation.recommend(rows)
    assert chosen["name"] == "a"
    assert "8.3% below the next, b" in why[0]


def test_within_the_noise_fewer_tokens_win_and_then_the_smaller_vocabulary() -> None:
    noisy = [
        row("a", "own", 4096, 100_000, [1.20, 1.24]),
        row("b", "own", 8192, 90_000, [1.22, 1.25]),
        row("c", "own", 16384, 89_500, [1.21, 1.25]),
        row("d", "own", 32768, 70_000, [1.50, 1.52]),
    ]
    chosen, why = recommendation.recommend(noisy)
    assert chosen["name"] == "b"  # c has fewer tokens, but by less than 1%
    assert "noise of a, c" in why[0]
    chosen, _ = recommendation.recommend([*noisy[:2], row("c", "own", 16384, 80_000, [1.21, 1.25]), noisy[3]])
    assert chosen["name"] == "c"


def test_noise_is_pooled_over_what_was_trained_more_than_once() -> None:
    rows = [
        row("a", "own", 4096, 1, [1.0, 1.2]),
        row("b", "own", 8192, 1, [2.0, 2.0, 2.3]),
        row("c", "own", 300, 1, [9.0]),
    ]
    found = recommendation.noise(rows)
    assert found["degrees_of_freedom"] == 3
    assert found["bits_per_byte"] == pytest.approx(((0.02 + 0.06) / 3) ** 0.5)
    assert recommendation.noise(rows[2:]) == {"bits_per_byte": 0.0, "degrees_of_freedom": 0}


@pytest.mark.parametrize(
    ("bits", "says"),
    [([1.40, 1.41], "16.7% more tokens and 8.1% more bits per byte"), ([1.30, 1.31], "serves as well")],
)
def test_it_says_what_a_general_vocabulary_of_the_same_size_costs(bits: list[float], says: str) -> None:
    rows = [
        row("own", "own", 8192, 90_000, [1.295, 1.305]),
        row("general text", "general", 8192, 105_000, bits),
        row("worse", "general", 8192, 100_000, [2.0]),
        row("other", "general", 4096, 300_000, [5.0]),
    ]
    _, why = recommendation.recommend(rows)
    assert says in why[2]
    assert len(why) == 3


def test_it_says_when_a_general_tokenizer_serves_as_well_and_when_none_does() -> None:
    own = row("own", "own", 8192, 90_000, [1.3, 1.3], parameters=10_000_000_000)
    better = row("theirs", "general tokenizer", 131_072, 88_000, [], parameters=10_500_000_000)
    large = {**better, "name": "large", "tokens": 80_000, "parameters": 12_000_000_000}
    longer = {**better, "name": "longer", "tokens": 91_000}
    _, why = recommendation.recommend([own, longer, large, better])
    assert why[-1].startswith("theirs serves as well: 2.2% fewer tokens")
    assert "5.0% larger" in why[-1]
    _, why = recommendation.recommend([own, longer, large])
    assert why[-1].startswith("No general tokenizer here serves as well: the best, large, needs 11.1% fewer tokens")
    assert "16.0 times the entries" in why[-1]
    assert "1.2 times as large" in why[-1]


# -------------------------------------------------------------------------------------------------- terms and pages


def test_terms_are_frequent_words_of_one_token_that_others_cut() -> None:
    texts = ["set the autoscaling group and autoscaling policy of the hypervisor here"] * 20 + ["once superlative"]
    tokenizer = vocabulary.train(texts, vocab_size=400, **FIELDS)
    halves = lambda words: [2 + (word == " hypervisor") for word in words]
    whole = lambda words: [1 if word == " hypervisor" else 2 for word in words]
    found = terms(tokenizer, texts, {"x": halves})
    assert [(r["term"], r["count"], r["pieces"]["x"]) for r in found] == [("hypervisor", 20, 3), ("autoscaling", 40, 2)]
    assert [r["term"] for r in terms(tokenizer, texts, {"x": halves, "y": whole})] == ["autoscaling"]
    assert terms(tokenizer, texts, {}) == []


@pytest.fixture
def report() -> dict[str, Any]:
    rows = [
        row("own 8,192 gpt4", "own", 8192, 90_000, [1.30, 1.31]),
        row("general text 8,192 gpt4", "general", 8192, 105_000, [1.40, 1.41]),
        row("<b>GPT</b>", "general tokenizer", 200_019, 85_000, [], 30_000_000),
    ]
    for found in rows:
        found["by"] = {"origin": {n: {"bytes": 9, "tokens": 2, "bytes_per_token": 4.5} for n in ("a&b", "c")}}
    return {
        "documents": "curate/0123456789abcdef",
        "heldout_bytes": 400_000,
        "recommended": {"vocab_size": 8192, "pattern": "gpt4"},
        "why": recommendation.recommend(rows)[1],
        "noise": recommendation.noise(rows),
        "candidates": rows,
        "missing": [{"name": "SmolLM2", "why": "not installed; `make smollm2` adds it"}],
        "terms": [{"term": "hypervisor", "count": 20, "pieces": {"<b>GPT</b>": 3}}],
        "small_model": {"flops": 1e13, "seq_len": 256, "scored_bytes": 200_000, "parameters": 5},
    }


class _Checker(HTMLParser):
    """Collects what a page opens and closes, and what it would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)
        self.wrong += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "onload", "onclick")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            self.wrong.append(f"closes {tag}")


def test_the_page_stands_alone_and_tells_every_candidate(report: dict[str, Any]) -> None:
    page, checker = vocabulary_page.as_html(report), _Checker()
    checker.feed(page)
    assert checker.wrong == checker.open == []
    assert checker.seen.count("svg") == 2
    assert checker.seen.count("rect") == 3
    assert checker.seen.count("circle") == 4
    assert not {"script", "link", "img", "b"} & set(checker.seen)
    assert not re.search(r"https?://|@import|url\(", page)
    for text in (
        "&lt;b&gt;GPT&lt;/b&gt;",
        "a&amp;b",
        "hypervisor",
        "make smollm2",
        *(r["name"] for r in report["candidates"][:2]),
    ):
        assert text in page


def test_the_terminal_marks_the_recommended_row(report: dict[str, Any]) -> None:
    text = vocabulary_page.as_text(report, "/somewhere/report.html")
    assert next(line for line in text.splitlines() if line.startswith("->")).split()[1:3] == ["own", "8,192"]
    for part in (*report["why"], "1.3050", "hypervisor (3-3", "Not compared: SmolLM2", "/somewhere/report.html"):
        assert part in text


# -------------------------------------------------------------------------------------------------- general tokenizers


def test_a_tokenizer_that_is_not_here_is_named_with_what_adds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general_tokenizers, "folder", lambda: tmp_path)
    assert general_tokenizers.found("o200k") is general_tokenizers.digest("llama3") is None
    with pytest.raises(NotInstalledError, match="GPT-4o") as caught:
        general_tokenizers.load("o200k")
    assert caught.value.do == "make tokenizers"


def test_files_of_both_kinds_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_tokenizers, "folder", lambda: tmp_path)
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b" ab", b"Ab"]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    (tmp_path / "o200k_base.tiktoken").write_text("\n".join(lines))
    found = general_tokenizers.load("o200k")
    assert found.count(["ab ab", "abab", "abAb"]) == [2, 2, 2]
    assert found.vocab_size == len(tokens) + 21
    tokenizer = vocabulary.train(prose(5), vocab_size=300, **FIELDS)
    (tmp_path / "llama3_1.json").write_text(json.dumps(json.loads(tokenizer.to_str())))
    assert general_tokenizers.load("llama3").vocab_size == 300
    assert general_tokenizers.load("llama3").count(prose(3)) == vocabulary.counter(tokenizer)(prose(3))


def test_mistrals_tokenizer_is_what_mistral_says_it_is() -> None:
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    path = general_tokenizers.found("tekken")
    assert path is not None
    theirs, ours = tekken.Tekkenizer.from_file(path), general_tokenizers.load("tekken")
    texts = ["Creates an Amazon EC2 instance's snapshot (12345).\n\n  DescribeInstances", "straße 日本語 👩‍👩‍👧‍👦"]
    assert ours.count(texts) == [len(theirs.encode(text, bos=False, eos=False)) for text in texts]
    assert ours.vocab_size == theirs.n_words


def test_the_beginning_of_a_general_vocabulary_is_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general_tokenizers, "folder", lambda: tmp_path)
    with pytest.raises(NotInstalledError):
        general_tokenizers.beginning(300, ["<|end|>"])
    fields: dict[str, Any] = {"pattern": "gpt4", "special_tokens": []}
    body = json.loads(vocabulary.train(prose(40), vocab_size=330, **fields).to_str())
    ids = body["model"]["vocab"]
    early = next(token for token, number in ids.items() if 256 <= number < 300 and len(token) > 2)
    ids |= {} if early[1:] in ids else {early[1:]: len(ids)}
    body["model"]["merges"].append([early[0], early[1:]])  # an early entry out of a later one, as their files have them
    (tmp_path / "llama3_1.json").write_text(json.dumps(body))
    found = general_tokenizers.beginning(301, ["<|end|>"])
    assert found.get_vocab_size() == 301
    assert found.id_to_token(vocabulary.end_of_document(found)) == "<|end|>"
    wanted = vocabulary.train(prose(40), vocab_size=300, **fields)
    texts = [*prose(5, seed=4), "the <|end|> of 日本語"]
    assert vocabulary.counter(found)(texts) == vocabulary.counter(wanted)(texts)
    assert found.decode(found.encode(texts[-1]).ids) == texts[-1]
