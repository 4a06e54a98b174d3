"""MinHash signatures: how well they estimate, and what they do not depend on. Components of pairs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from forge_ray.config import NearConfig
from forge_ray.data.curation import near
from forge_ray.data.curation.near import Components, band_hashes, keepers
from forge_ray.data.curation.text import Texts


def some_texts(count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Texts of numbered words, some of them empty."""
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(500)}" for _ in range(draw.randrange(longest))) for _ in range(count)]


def pairs_of(*ties: tuple[int, int]) -> np.ndarray:
    """Ties as `keepers` takes them."""
    return np.unique(np.array([max(tie) << 32 | min(tie) for tie in ties], np.uint64))


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_the_share_of_equal_hashes_estimates_jaccard_similarity(similarity: float) -> None:
    """4,096 functions have a standard error of at most 0.008 on one pair; over eight pairs the mean has 0.003."""
    config, size = NearConfig(ngram_words=1, bands=4096, rows=1), 300
    shared = round(2 * size * similarity / (1 + similarity))
    texts = []
    for pair in range(8):
        words = [f"p{pair}w{i}" for i in range(2 * size)]
        texts += [" ".join(words[:size]), " ".join(words[size - shared : 2 * size - shared])]
    hashes, _ = band_hashes(Texts(texts), config)
    agree = (hashes[::2] == hashes[1::2]).mean(axis=1)
    assert np.abs(agree - shared / (2 * size - shared)).max() < 0.035
    assert abs(agree.mean() - shared / (2 * size - shared)) < 0.012


def test_a_band_is_equal_when_all_its_rows_are() -> None:
    config, size = NearConfig(ngram_words=1, bands=1024, rows=4), 300
    words = [f"w{i}" for i in range(2 * size)]
    hashes, _ = band_hashes(Texts([" ".join(words[:size]), " ".join(words[50 : size + 50])]), config)
    assert abs((hashes[0] == hashes[1]).mean() - (250 / 350) ** 4) < 0.05


def test_documents_do_not_depend_on_their_neighbours_or_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    config, texts = NearConfig(), some_texts(60)
    whole, has_words = band_hashes(Texts(texts), config)
    monkeypatch.setattr(near, "_BLOCK", 37)
    for i, text in enumerate(texts):
        alone, there = band_hashes(Texts([text]), config)
        assert there[0] == has_words[i] == bool(text)
        assert not text or np.array_equal(alone[0], whole[i])
    in_blocks, _ = band_hashes(Texts(texts), config)
    assert np.array_equal(in_blocks[has_words], whole[has_words])


def test_repeated_and_reordered_shingles_change_nothing() -> None:
    hashes, _ = band_hashes(Texts(["a b c", "c c b a A", "a b"]), NearConfig(ngram_words=1))
    assert np.array_equal(hashes[0], hashes[1])
    assert not np.array_equal(hashes[0], hashes[2])


def test_bands_and_seeds_have_hashes_of_their_own() -> None:
    one, _ = band_hashes(Texts(["one word"]), NearConfig(bands=50, rows=1))
    other, _ = band_hashes(Texts(["one word"]), NearConfig(bands=50, rows=1, seed=2))
    assert len({*one[0].tolist(), *other[0].tolist()}) == 100


def test_hashes_are_for_ever() -> None:
    """They are written into artifacts: other values would be another format."""
    hashes, _ = band_hashes(Texts(["the quick brown fox jumps over the lazy dog"]), NearConfig(bands=2, rows=3, seed=7))
    assert [f"{value:016x}" for value in hashes[0].tolist()] == ["17bdc1649ea02fe4", "fc382ed2fb7b0429"]


def test_components_are_those_of_a_plain_union() -> None:
    draw = random.Random(5)
    for size in (1, 2, 30, 300):
        ties = [(draw.randrange(size), draw.randrange(size)) for _ in range(size // 2)]
        label = list(range(size))
        for a, b in ties * size if size <= 30 else ties * 40:
            label[a] = label[b] = min(label[a], label[b])
        components = Components(size)
        one, other = np.array(ties, np.uint32).reshape(-1, 2).T
        for start in range(0, len(ties), 50):
            components.join(one[start : start + 50], other[start : start + 50])
        assert components.find(np.arange(size, dtype=np.uint32)).tolist() == label


@pytest.mark.parametrize("order", ["rising", "falling", "shuffled", "in small pieces"])
def test_a_chain_of_half_a_million_documents_is_one_component(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains are what one step at a time would take hours for."""
    size = 500_000
    chain = np.arange(size, dtype=np.uint32)
    if order == "shuffled":
        np.random.default_rng(0).shuffle(chain)
    one, other = (chain[:-1], chain[1:]) if order != "falling" else (chain[:0:-1], chain[-2::-1])
    if order == "in small pieces":
        monkeypatch.setattr(near, "_UNION_PAIRS", 5000)
    components = Components(size)
    components.join(one, other)
    assert not components.find(np.arange(size, dtype=np.uint32)).any()


def test_keepers_hold_to_what_each_generation_saw() -> None:
    #  generation 0: 0..3, generation 1: 4..6, generation 2: 7..8
    pairs = pairs_of((0, 1), (2, 3), (4, 5), (1, 6), (2, 6), (3, 7), (5, 8), (7, 8))
    gone, stays = keepers(pairs, np.array([0, 4, 7]), 9)
    assert dict(zip(gone.tolist(), stays.tolist(), strict=True)) == {1: 0, 3: 2, 5: 4, 6: 0, 7: 0, 8: 0}


def test_no_pairs_drop_nobody() -> None:
    gone, stays = keepers(np.empty(0, np.uint64), np.array([0, 2]), 4)
    assert not len(gone)
    assert not len(stays)
