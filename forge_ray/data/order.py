"""The order of training as arithmetic: which sequence stands at which position of the run, planned from the index.

Owns the permutation, the windows, and the mixture of sources. Reads no shard: `loader.py` does.

A run is a line of positions; sample i of slot s at step t stands at `(t * slots + s) * micro_batch + i`. What stands
there is a pure function of (seed, position) for a corpus and a mixture, with random access:

- A sequence is `seq_len + 1` neighbouring tokens of a shard (inputs and their successors), at multiples of `seq_len`;
  the tail of a shard that fills no sequence is not read.
- A stream is what a source gives: epoch after epoch of its sequences, each read once before any is read twice. In an
  epoch the shards come in a permutation of their own; neighbours form windows of about `window_bytes`; the sequences of
  a window are permuted. So a reader needs the shards of one window at a time, and knows which come next. A source that
  fits in one window is shuffled as a whole.
- Without a mixture all shards are one stream. With one, each source is a stream, whose windows are its share of
  `window_bytes`, and `Mixture` says which stream gives position p, and which sample of it.

A source's stream depends on its own shards, its name and the seed alone: another source beside it changes when its
samples come, not their order.

Cost: planning an epoch is O(shards): 8 ms for 20,000. A look-up is a few binary searches: 0.16 ms for the eight
sequences of a slot out of one stream, 0.34 ms out of three (2026-11, Zen 4, one thread).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from forge_ray.config import MixtureConfig
from forge_ray.data.curation.text import finalise
from forge_ray.data.shards import ShardIndex
from forge_ray.errors import ConfigError, DataError

_WEIGHT_STEPS = 1 << 40


class Permutation:
    """A pseudo-random permutation of range(n) with random access and no table: a keyed Feistel network, cycle-walking.

    Cost: four rounds of integer arithmetic for each look-up, repeated 1 to 4 times.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002), section 4.
    """

    _ROUNDS = 4

    def __init__(self, n: int, key: tuple[object, ...]) -> None:
        self.n = n
        self._half_bits = np.uint64(max(1, -(-max(1, (n - 1).bit_length()) // 2)))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        seed = hashlib.sha256(repr(key).encode()).digest()
        self._keys = [
            np.uint64(int.from_bytes(hashlib.sha256(seed + bytes([r])).digest()[:8], "little"))
            for r in range(self._ROUNDS)
        ]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Where each index goes; shape and order are kept."""
        out = self._once(np.asarray(index, dtype=np.uint64))
        while (outside := out >= np.uint64(self.n)).any():
            out[outside] = self._once(out[outside])
        return out.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half_bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (finalise(right + key) & self._mask)
        return (left << self._half_bits) | right


class Mixture:
    """Which of several streams gives each position, and which of its samples that is.

    After any prefix each stream has given its share to within one block. The shares of whole blocks are those of
    Webster's method of apportionment: the k-th sample of a stream of weight w is due at time (k + 1/2) / w, and the
    first n that are due stand in the first n positions. Being a divisor method it never takes back a seat as n grows,
    so a block's quotas are differences of two such counts, in whole numbers: no error adds up over a long run. Inside a
    block the streams stand in a permutation of their own.

    Source: Balinski and Young, Fair Representation (1982), appendix A, on divisor methods.
    Cost: a block is laid out once, about 0.2 ms for ten streams.
    """

    BLOCK = 256

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(Fraction(weight) for weight in weights)
        self._weights = [max(1, round(Fraction(weight) / total * _WEIGHT_STEPS)) for weight in weights]
        self._total, self._seed = sum(self._weights), seed
        self._block = lru_cache(maxsize=16)(self._lay_out)

    def counts(self, num_positions: int) -> np.ndarray:
        """How many of the first positions each stream has: int64 of shape (streams,)."""
        blocks, rest = divmod(num_positions, self.BLOCK)
        counts = np.array(self._due(blocks * self.BLOCK), dtype=np.int64)
        if rest:
            counts += np.bincount(self._block(blocks)[0][:rest], minlength=len(counts))
        return counts

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each position, and the number of the sample within it."""
        streams, samples = np.empty_like(positions), np.empty_like(positions)
        blocks, offsets = np.divmod(positions, self.BLOCK)
        for block in np.unique(blocks):
            chosen = blocks == block
            table = self._block(int(block))
            streams[chosen], samples[chosen] = table[0][offsets[chosen]], table[1][offsets[chosen]]
        return streams, samples

    def _due(self, n: int) -> list[int]:
        """Samples of each stream among the first n that are due; equal times go by the stream's number."""
        counts = [(2 * n * w + self._total) // (2 * self._total) for w in self._weights]
        over = sum(counts) - n
        step = -1 if over > 0 else 1
        # The rounded counts are off by at most half a seat each: give or take single seats in the order of their time.
        heap = [self._seat(stream, count, step) for stream, count in enumerate(counts)]
        heapq.heapify(heap)
        for _ in range(abs(over)):
            stream = abs(heap[0][1])
            counts[stream] += step
            heapq.heapreplace(heap, self._seat(stream, counts[stream], step))
        return counts

    def _seat(self, stream: int, count: int, step: int) -> tuple[Fraction, int]:
        """When the next sample (step 1) is due, or, negated, the last one that was (step -1)."""
        return step * Fraction(2 * count + step, self._weights[stream]), step * stream

    def _lay_out(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        first, after = (np.array(self._due(n * self.BLOCK), dtype=np.int64) for n in (block, block + 1))
        streams = np.repeat(np.arange(len(first)), after - first)
        streams = streams[Permutation(self.BLOCK, (self._seed, "block", block))(np.arange(self.BLOCK))]
        samples = np.empty_like(streams)
        for stream in range(len(first)):
            chosen = streams == stream
            samples[chosen] = np.arange(first[stream], after[stream])
        return streams, samples


@dataclass(frozen=True)
class _Epoch:
    """One pass over a stream: its shards in their order, where each starts in sequences, and where windows start."""

    order: np.ndarray
    starts: np.ndarray
    windows: np.ndarray

    def window(self, number: int) -> slice:
        """The places in `order` of a window's shards."""
        return slice(int(self.windows[number]), int(self.windows[number + 1]))

    def first_sequence(self, window: int) -> int:
        """Number within the epoch of a window's first sequence."""
        return int(self.starts[self.windows[window]])


class Stream:
    """The endless sequence of a source's samples.

    Args:
        key: What the permutations are keyed with, beside epoch and window.
        shards: Numbers of its shards in the index.
        sizes_bytes: Their sizes.
        counts: Their sequences; none is zero.
        window_bytes: Aim of a window; one shard at least.
    """

    def __init__(
        self,
        key: tuple[object, ...],
        shards: np.ndarray,
        sizes_bytes: np.ndarray,
        counts: np.ndarray,
        window_bytes: int,
    ) -> None:
        self.shards, self._sizes_bytes, self._counts, self._key = shards, sizes_bytes, counts, key
        self.num_sequences, self.size_bytes = int(counts.sum()), int(sizes_bytes.sum())
        self._window_bytes = max(window_bytes, int(sizes_bytes.max()))
        self.max_window_bytes = min(self._window_bytes, self.size_bytes)
        self.max_sequence_bytes = int((-(-sizes_bytes // counts)).max())
        self._epoch = lru_cache(maxsize=4)(self._plan)
        self._permutation = lru_cache(maxsize=8)(self._keyed)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each sample, and the number of its sequence in that shard."""
        epochs, within = np.divmod(samples, self.num_sequences)
        shards, sequences = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            places = np.searchsorted(epoch.starts, within, side="right") - 1
            windows = np.searchsorted(epoch.windows, places, side="right") - 1
            for window in np.unique(windows[epochs == number]):
                chosen = (epochs == number) & (windows == window)
                first = epoch.first_sequence(int(window))
                there = first + self._permutation(int(number), int(window))(within[chosen] - first)
                place = np.searchsorted(epoch.starts, there, side="right") - 1
                shards[chosen], sequences[chosen] = self.shards[epoch.order[place]], there - epoch.starts[place]
        return shards, sequences

    def window(self, sample: int) -> tuple[int, int]:
        """Epoch and window of a sample."""
        number, within = divmod(int(sample), self.num_sequences)
        epoch = self._epoch(number)
        place = np.searchsorted(epoch.starts, within, side="right") - 1
        return number, int(np.searchsorted(epoch.windows, place, side="right")) - 1

    def windows(self, first: tuple[int, int]) -> Iterator[tuple[tuple[int, int], int, np.ndarray]]:
        """From a window on, without end: (epoch, window), the number of its first sample, its shards."""
        number, window = first
        while True:
            epoch = self._epoch(number)
            sample = number * self.num_sequences + epoch.first_sequence(window)
            yield (number, window), sample, self.shards[epoch.order[epoch.window(window)]]
            window += 1
            if window + 1 == len(epoch.windows):
                number, window = number + 1, 0

    def _plan(self, number: int) -> _Epoch:
        order = Permutation(len(self.shards), (*self._key, "shards", number))(np.arange(len(self.shards)))
        ends_bytes = np.concatenate([[0], np.cumsum(self._sizes_bytes[order])])
        windows = [0]
        while windows[-1] < len(order):
            limit = ends_bytes[windows[-1]] + self._window_bytes
            windows.append(int(np.searchsorted(ends_bytes, limit, side="right")) - 1)
        return _Epoch(order, np.concatenate([[0], np.cumsum(self._counts[order])]), np.array(windows))

    def _keyed(self, number: int, window: int) -> Permutation:
        epoch = self._epoch(number)
        count = epoch.first_sequence(window + 1) - epoch.first_sequence(window)
        return Permutation(count, (*self._key, "window", number, window))


class Order:
    """What stands at every position of a run.

    Args:
        index: The shards.
        seq_len: Tokens of a sequence.
        seed: Key of the order.
        window_bytes: Shards that are shuffled together.
        mixture: Weights or epochs by source.

    Raises:
        DataError: The shards hold less than one sequence.
        ConfigError: The mixture names a source that there is not, or leaves one out.
    """

    def __init__(
        self, index: ShardIndex, *, seq_len: int, seed: int, window_bytes: int, mixture: MixtureConfig | None = None
    ) -> None:
        self.index, self.seq_len = index, seq_len
        tokens = np.array([shard.tokens for shard in index.shards], dtype=np.int64)
        self.counts = np.maximum(0, (tokens - 1) // seq_len)
        self.num_sequences = int(self.counts.sum())
        if not self.num_sequences:
            raise DataError(
                "the corpus is too small: it holds no whole training sequence",
                got=f"{int(tokens.sum())} tokens",
                wanted=f"more than pretrain.seq_len {seq_len}",
                do="add documents or lower pretrain.seq_len",
            )
        self._origins = np.array([shard.origin for shard in index.shards])
        self.sources: dict[str, int] = {
            str(name): int(self.counts[self._origins == name].sum()) for name in np.unique(self._origins)
        }
        shares = self._shares(mixture or MixtureConfig())
        self.mixture = Mixture(list(shares.values()), seed) if shares else None
        self.streams = [self._stream(name, int(window_bytes * share), seed) for name, share in shares.items()] or [
            self._stream(None, window_bytes, seed)
        ]

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each position, and the number of the sample within it."""
        return self.mixture(positions) if self.mixture else (np.zeros_like(positions), positions)

    def locate(self, streams: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each sample of each stream, and the number of its sequence in that shard."""
        shards, sequences = np.empty_like(samples), np.empty_like(samples)
        for stream in np.unique(streams):
            chosen = streams == stream
            shards[chosen], sequences[chosen] = self.streams[stream].locate(samples[chosen])
        return shards, sequences

    def stream_counts(self, num_positions: int) -> np.ndarray:
        """How many samples of each stream the first positions hold."""
        return self.mixture.counts(num_positions) if self.mixture else np.array([num_positions])

    def epochs_by_source(self, num_positions: int) -> dict[str, float]:
        """How often the first positions read each source."""
        read = dict.fromkeys(self.sources, 0)
        for stream, count in zip(self.streams, self.stream_counts(num_positions).tolist(), strict=True):
            for name, number in self._read(stream, count).items():
                read[name] += number
        return {name: read[name] / count for name, count in self.sources.items() if count}

    def need_bytes(self, positions_per_step: int) -> tuple[int, int]:
        """Disk that all readers of a step need: (two windows of each stream, what one step may read beyond them).

        A step that is shorter than any window touches two. A longer one touches whole windows between its first and
        its last, which hold no more than it reads. A source that is smaller than that needs its own size.
        """
        windows_bytes = beyond_bytes = 0
        for stream, count in zip(self.streams, self._per_step(positions_per_step), strict=True):
            two_bytes = min(stream.size_bytes, 2 * stream.max_window_bytes)
            windows_bytes += two_bytes
            beyond_bytes += min(stream.size_bytes - two_bytes, count * stream.max_sequence_bytes)
        return windows_bytes, beyond_bytes

    def _per_step(self, positions: int) -> list[int]:
        if not self.mixture:
            return [positions]
        # Within a block a stream may run ahead of its share by no more than the block.
        return [min(positions, int(count) + Mixture.BLOCK) for count in self.mixture.counts(positions)]

    def _read(self, stream: Stream, count: int) -> dict[str, int]:
        """Sequences by source among a stream's first samples."""
        if self.mixture:
            return {str(self._origins[stream.shards[0]]): count}
        epochs, rest = divmod(count, stream.num_sequences)
        read = {name: epochs * number for name, number in self.sources.items()}
        for (_, _), first, shards in stream.windows((epochs, 0)):
            left = epochs * stream.num_sequences + rest - first
            if left <= 0:
                return read
            numbers = self.counts[shards]
            if left < int(numbers.sum()):  # the window in which the reading stops
                shards, numbers = np.unique(stream.locate(np.arange(first, first + left))[0], return_counts=True)
            for name, number in zip(self._origins[shards], numbers, strict=True):
                read[str(name)] += int(number)
        raise AssertionError("a stream has no end")

    def _shares(self, mixture: MixtureConfig) -> Mapping[str, float]:
        """Each stream's share of the positions; none without a mixture."""
        named = mixture.weights or mixture.epochs
        if not named:
            return {}
        self._check_names(mixture)
        readable = {name: count for name, count in self.sources.items() if count}
        weights = mixture.weights or {name: mixture.epochs.get(name, 1.0) * count for name, count in readable.items()}
        total = sum(weights[name] for name in readable)
        return {name: weights[name] / total for name in readable}

    def _check_names(self, mixture: MixtureConfig) -> None:
        field, named = ("weights", mixture.weights) if mixture.weights else ("epochs", mixture.epochs)
        unknown = sorted(set(named) - set(self.sources))
        missing = sorted(set(self.sources) - set(named)) if mixture.weights else []
        empty = sorted(name for name in set(named) & set(self.sources) if not self.sources[name])
        for names, why in (
            (unknown, "names sources that the corpus does not have"),
            (missing, "leaves out sources of the corpus"),
            (empty, f"names sources without one whole sequence of {self.seq_len} tokens"),
        ):
            if names:
                raise ConfigError(
                    f"pretrain.mixture.{field} {why}",
                    got=", ".join(names),
                    wanted=f"{', '.join(name or '(no name)' for name in self.sources)}",
                    do="use the names that ingest.sources gives; weights name all of them, epochs some",
                )

    def _stream(self, name: str | None, window_bytes: int, seed: int) -> Stream:
        mine = self.counts > 0 if name is None else (self.counts > 0) & (self._origins == name)
        shards = np.flatnonzero(mine)
        sizes_bytes = np.array([self.index.shards[i].size_bytes for i in shards], dtype=np.int64)
        key = (seed,) if name is None else (seed, "source", name)
        return Stream(key, shards, sizes_bytes, self.counts[shards], window_bytes)
