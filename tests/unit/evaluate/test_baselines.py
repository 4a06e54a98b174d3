"""The comparators: a distribution that sums to one, and compressors that another program can undo."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from forge_ray.evaluate import baselines
from forge_ray.evaluate.baselines import Bigram, causal_bits, gzip_bits, zstd_bits

VOCAB = 30


def stream(size: int = 5000, seed: int = 0) -> np.ndarray:
    """Tokens below 20 in which each mostly decides the next; 20 comes once, the others never."""
    draw = np.random.default_rng(seed)
    ids = [0]
    for _ in range(size - 1):
        ids.append((ids[-1] * 7 + 3) % 20 if draw.random() < 0.8 else int(draw.integers(0, 20)))
    ids[size // 2] = 20
    return np.array(ids, dtype=np.uint16)


def probabilities(bigram: Bigram, first: int) -> np.ndarray:
    return np.exp([-bigram.nats(np.array([first, second])) for second in range(VOCAB)])


@pytest.mark.parametrize("first", [0, 5, 20, 25, VOCAB - 1], ids=["frequent", "frequent too", "once", "never", "last"])
def test_the_next_tokens_probabilities_sum_to_one(first: int) -> None:
    found = probabilities(Bigram([stream()], VOCAB), first)
    assert found.sum() == pytest.approx(1.0, abs=1e-9)
    assert (found > 0).all()


def test_what_follows_often_is_likely_and_an_unseen_context_falls_back_on_single_tokens() -> None:
    ids = stream()
    bigram = Bigram([ids], VOCAB)
    assert probabilities(bigram, 5).argmax() == (5 * 7 + 3) % 20
    single = (np.bincount(ids, minlength=VOCAB) + 0.5) / (len(ids) + 0.5 * VOCAB)
    assert probabilities(bigram, 25) == pytest.approx(single)


def test_a_sequence_costs_the_sum_of_its_pairs() -> None:
    bigram, ids = Bigram([stream()], VOCAB), stream(seed=1)[:50]
    assert bigram.nats(ids) == pytest.approx(sum(bigram.nats(ids[i : i + 2]) for i in range(49)))
    assert bigram.nats(ids[:1]) == 0.0


def test_on_new_text_it_beats_the_uniform_guess_and_single_tokens() -> None:
    ids = stream(seed=1)
    per_token = Bigram([stream()], VOCAB).nats(ids) / (len(ids) - 1)
    share = np.bincount(ids, minlength=VOCAB) / len(ids)
    entropy = -sum(p * math.log(p) for p in share if p)
    assert per_token < 0.6 * entropy < 0.6 * math.log(VOCAB)


def test_streams_are_counted_apart_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.array([1, 2, 1, 2]), np.array([3, 4, 3, 4])
    apart = Bigram([first, second], VOCAB)
    joined = Bigram([np.concatenate([first, second])], VOCAB)
    assert apart.nats(np.array([2, 3])) > joined.nats(np.array([2, 3]))  # no document crosses from shard to shard
    monkeypatch.setattr(baselines, "BIGRAM_TRAIN_TOKENS", 4)
    bounded = Bigram([first, second], VOCAB)
    ids = np.array([1, 2, 3, 4, 5])
    assert bounded.nats(ids) == pytest.approx(Bigram([first], VOCAB).nats(ids))


def texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(["größe", "alpha", "beta", "gamma", "日本"], k=200)) for _ in range(5)]


@pytest.mark.parametrize("bits", [gzip_bits, zstd_bits])
def test_compressors_find_repetition_and_do_not_shrink_noise(bits: object) -> None:
    noise = "".join(random.Random(0).choices("0123456789abcdef", k=4000))
    assert bits([noise]) > 4000 * 4  # sixteen equally likely letters: four bits each, at the least
    assert bits([noise] * 2) < 1.2 * bits([noise])
    assert bits(texts()) < 0.4 * 8 * len("".join(texts()).encode())


class Fixed:
    """A model of transformers that gives its next token by its last one alone, and remembers what it was asked."""

    def __init__(self) -> None:
        self.logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.lengths: list[int] = []
        self.bf16: set[bool] = set()

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        self.lengths.append(ids.shape[1])
        self.bf16.add(torch.is_autocast_enabled("cpu"))
        return SimpleNamespace(logits=self.logits[ids])


class Letters:
    """A tokenizer of letters."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") + 1 for letter in text]}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("context", [4, 16, 64])
def test_a_general_model_sees_no_more_than_its_context_and_pays_for_every_token(context: int, bf16: bool) -> None:
    model, texts = Fixed(), ["abcdefghijklmnopqrstuvwxyz" * 3, "za", ""]
    found = causal_bits(model, Letters(), texts, context, bf16=bf16)
    logs = model.logits.log_softmax(1)
    ids = [[0, *Letters()(text, False)["input_ids"]] for text in texts]
    wanted = -sum(float(logs[a, b]) for row in ids for a, b in itertools.pairwise(row)) / math.log(2)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert max(model.lengths) == context
    assert model.bf16 == {bf16}
