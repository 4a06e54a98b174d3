"""Near-duplicates: MinHash signatures, cut into bands, and the components that equal bands tie together.

Owns the signature of a document and the union of pairs, generation by generation. Does not own where the hashes lie or
which tasks compare them (`grouping.py`), nor what is done about a duplicate (`dedup.py`).

The signature of a document is, for each of bands x rows hash functions, the smallest hash of its shingles (runs of
words). Two documents agree in one place with a probability equal to the Jaccard similarity s of their sets of shingles,
in a band with s ** rows, in at least one band with 1 - (1 - s ** rows) ** bands.
Source: Broder 1997 (MinHash); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4 (banding).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from forge_ray.config import NearConfig
from forge_ray.data.curation.text import Hashes, Ints, Spans, Texts, finalise, shingles

# 64 Ki hashes of 4 bytes stay in the second-level cache: 20 ns per shingle for 112 functions, 46 in blocks of 8 Ki
# (2026-11-23, AMD EPYC).
_BLOCK = 1 << 16
_UNION_PAIRS = 1 << 20
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def band_hashes(texts: Texts, config: NearConfig) -> tuple[Hashes, NDArray[np.bool_]]:
    """A hash for each band of each document, and which documents hold a word at all.

    A document of fewer words than a shingle is one shingle. Each band's hash is keyed by its number, so bands with
    different numbers do not meet.

    Shapes: the hashes are (documents, bands); those of a document without words mean nothing.

    Cost: for the defaults, 112 multiplications, additions and minima of 32 bits per shingle, about 25 ns together.
    """
    words = texts.words()
    grams, document = _shingles(words, len(texts), config.ngram_words)
    signature = _signature(grams, document, len(texts), config)
    keys = list(_random(config.seed ^ 0x62616E6473, config.rows + config.bands))
    bands = np.empty((len(texts), config.bands), np.uint64)
    for band in range(config.bands):
        total = np.full(len(texts), keys[config.rows + band], np.uint64)
        for row in range(config.rows):
            total = finalise(total ^ (signature[band * config.rows + row] * np.uint64(keys[row] | 1)))
        bands[:, band] = total
    has_words = np.zeros(len(texts), np.bool_)
    has_words[document] = True
    return bands, has_words


def _shingles(words: Spans, num_documents: int, size_words: int) -> tuple[Hashes, Ints]:
    """Every run of so many words, and all words of a shorter document as one run; documents do not fall."""
    grams, document = shingles(words, size_words)
    counts = np.bincount(words.document, minlength=num_documents)
    short = np.flatnonzero((counts > 0) & (counts < size_words))
    if not len(short):
        return grams, document
    first = (np.cumsum(counts) - counts)[short]
    total = np.zeros(len(short), np.uint64)
    for place in range(size_words - 1):
        there = counts[short] > place
        total[there] = finalise(total[there] ^ words.hash[first[there] + place])
    grams, document = np.concatenate([grams, total]), np.concatenate([document, short])
    order = np.argsort(document, kind="stable")
    return grams[order], document[order]


def _signature(grams: Hashes, document: Ints, num_documents: int, config: NearConfig) -> NDArray[np.uint32]:
    """The smallest hash of each function among each document's shingles. Shapes: (bands x rows, documents).

    The functions are x -> a x + b modulo 2 ** 32 with odd a, permutations of the 32-bit numbers; x is already mixed,
    so that its set is a random one whatever the text.
    """
    functions = config.bands * config.rows
    constants = np.fromiter(_random(config.seed, 2 * functions), np.uint64, 2 * functions) >> np.uint64(32)
    factors, terms = constants.astype(np.uint32).reshape(2, functions)
    factors |= np.uint32(1)
    signature = np.full((functions, num_documents), 0xFFFFFFFF, np.uint32)
    x = (grams >> np.uint64(32)).astype(np.uint32)
    buffer = np.empty(min(_BLOCK, len(x)), np.uint32)
    for start in range(0, len(x), _BLOCK):
        block, owners = x[start : start + _BLOCK], document[start : start + _BLOCK]
        hashed = buffer[: len(block)]
        runs = np.flatnonzero(np.diff(owners, prepend=-1))
        # A document that goes on from the block before is there already: minima are merged, and nobody is twice here.
        at = owners[runs]
        for i in range(functions):
            np.multiply(block, factors[i], out=hashed)
            np.add(hashed, terms[i], out=hashed)
            signature[i, at] = np.minimum(signature[i, at], np.minimum.reduceat(hashed, runs))
    return signature


def _random(seed: int, count: int) -> Iterator[int]:
    """SplitMix64 (Steele, Lea and Flood 2014): the same numbers under every version of numpy."""
    state = seed & _MASK
    for _ in range(count):
        state = (state + _GOLDEN) & _MASK
        value = state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        yield value ^ (value >> 31)


class Components:
    """Which documents hang together, as pairs come in; the smallest document names its component.

    Cost: 4 bytes per document, some 30 per pair of the piece of `_UNION_PAIRS` in work.
    """

    def __init__(self, num_documents: int) -> None:
        self._parent = np.arange(num_documents, dtype=np.uint32)  # never larger than the document itself: no cycles

    def find(self, documents: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """The name of each document's component.

        All of them are moved up at once, and the next step goes from where the last one led: chains of a million
        documents, of which the pairs of one piece can make one, take twenty steps.
        """
        parent = self._parent
        found = parent[documents]
        while True:
            further = parent[found]
            if np.array_equal(further, found):
                return found
            parent[documents] = found = further

    def join(self, one: NDArray[np.uint32], other: NDArray[np.uint32]) -> None:
        """Joins the components of the documents of each pair.

        Every name that a pair shows to be not the smallest is hung below the smallest that its pairs show, all at
        once; what is left after that is found out in another round. The number of names falls in each round, in
        practice by more than half.
        """
        for start in range(0, len(one), _UNION_PAIRS):
            a, b = one[start : start + _UNION_PAIRS], other[start : start + _UNION_PAIRS]
            while len(a):
                a, b = self.find(a), self.find(b)
                apart = a != b
                a, b = a[apart], b[apart]
                np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))


def keepers(pairs: Hashes, generation_starts: Ints, num_documents: int) -> tuple[Ints, Ints]:
    """Who is dropped for whom, when of each component one document stays.

    A component counts as it was in the generation of a document: what later generations join does not matter to it.
    So the first document of a component stays, and one of generation g whose component held an earlier one then goes.

    Args:
        pairs: Documents tied together, `later << 32 | earlier`, sorted.
        generation_starts: The first document of each generation, rising.
        num_documents: How many there are.

    Returns:
        The documents that go, rising, and for each the one that stays.
    """
    components = Components(num_documents)
    gone, stays = [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
    bounds = np.searchsorted(pairs, generation_starts.astype(np.uint64) << np.uint64(32))
    for first, start, end in zip(generation_starts, bounds, [*bounds[1:], len(pairs)]):
        if start == end:
            continue
        later = (pairs[start:end] >> np.uint64(32)).astype(np.uint32)
        earlier = (pairs[start:end] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        components.join(later, earlier)
        new = np.unique(np.concatenate([later, earlier[earlier >= first]]))
        name = components.find(new)
        gone.append(new[name != new])
        stays.append(name[name != new])
    return np.concatenate(gone).astype(np.int64), np.concatenate(stays).astype(np.int64)
