"""The order of training as arithmetic: which tokens slot s of step t reads is a pure function of (seed, t, s).

Owns the permutation and the cutting of shards into sequences. There is no loader state but the step: whoever computes a
slot, on any number of workers, after any restart, reads the same tokens.

A sequence is `seq_len + 1` neighbouring tokens of a shard (inputs and their successors), at multiples of `seq_len`; the
tail of a shard that fills no sequence is not read. Every epoch is a new keyed permutation of all sequences, so each is
read once before any is read twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from forge_ray.data.shards import Shard
from forge_ray.errors import DataError


class Permutation:
    """A pseudo-random permutation of range(n) with random access and no table: a keyed Feistel network, cycle-walking.

    Cost: four rounds of integer arithmetic for each look-up, repeated 1 to 4 times.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002), section 4.
    """

    _ROUNDS = 4

    def __init__(self, n: int, key: tuple[int, ...]) -> None:
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
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): each input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SlotLoader:
    """Reads the micro-batch of a slot.

    Args:
        shards: Opened shards, in the order of the manifest.
        seq_len: Tokens of a sequence.
        micro_batch: Sequences in a slot.
        slots: Slots in a step.
        seed: Key of the order.

    Raises:
        DataError: The shards hold less than one sequence.
    """

    def __init__(self, shards: Sequence[Shard], *, seq_len: int, micro_batch: int, slots: int, seed: int) -> None:
        self.shards, self.seq_len, self.micro_batch, self.slots, self.seed = shards, seq_len, micro_batch, slots, seed
        counts = [max(0, (shard.header.num_tokens - 1) // seq_len) for shard in shards]
        self._starts = np.cumsum([0, *counts])
        self.num_sequences = int(self._starts[-1])
        if not self.num_sequences:
            raise DataError(
                "the corpus is too small: it holds no whole training sequence",
                got=f"{sum(shard.header.num_tokens for shard in shards)} tokens",
                wanted=f"more than pretrain.seq_len {seq_len}",
                do="add documents or lower pretrain.seq_len",
            )
        self._permutation = lru_cache(maxsize=2)(lambda epoch: Permutation(self.num_sequences, (seed, epoch)))

    def sequences(self, step: int, slot: int) -> np.ndarray:
        """Indices of the slot's sequences: int64 of shape (micro_batch,)."""
        position = (step * self.slots + slot) * self.micro_batch + np.arange(self.micro_batch, dtype=np.int64)
        epochs, index = np.divmod(position, self.num_sequences)
        out = np.empty_like(index)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._permutation(int(epoch))(index[chosen])
        return out

    def slot(self, step: int, slot: int) -> np.ndarray:
        """The slot's tokens: int64 of shape (micro_batch, seq_len + 1); inputs are [:, :-1], targets [:, 1:]."""
        rows = []
        for sequence in self.sequences(step, slot):
            shard = int(np.searchsorted(self._starts, sequence, side="right")) - 1
            start = int(sequence - self._starts[shard]) * self.seq_len
            rows.append(self.shards[shard].tokens[start : start + self.seq_len + 1])
        return np.stack(rows).astype(np.int64)

    def epochs(self, steps: int) -> float:
        """How often the corpus is read in so many steps."""
        return steps * self.slots * self.micro_batch / self.num_sequences
