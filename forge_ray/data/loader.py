"""Micro-batches for training: what slot s of step t reads is a pure function of (seed, t, s).

Owns reading what `order.py` says, and reading ahead: threads get the next windows' shards ready while this one trains.
Does not own where shards come from (`cache.py`).

There is no state but the step: whoever computes a slot, on any number of workers, after any restart, reads the same
tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from forge_ray.artifact import Artifact, FileEntry
from forge_ray.config import PretrainConfig
from forge_ray.data.cache import LocalShards, Opened, Place, ShardCache
from forge_ray.data.order import Order
from forge_ray.data.shards import ShardIndex
from forge_ray.errors import ConfigError, CorruptError, ForgeError

if TYPE_CHECKING:
    import pyarrow as pa  # a forking process must not import it: it starts a thread

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_JOIN_S = 5.0
_BLOCK = 256
Span = tuple[tuple[int, int], tuple[int, int]]


def plan(config: PretrainConfig, corpus: Artifact) -> Order:
    """The order of a run over a corpus. Cost: the index is read, no shard.

    Raises:
        ConfigError: The mixture does not fit the corpus or repeats it too often, or the cache is too small for the
            windows.
        DataError: The corpus holds no whole sequence.
    """
    order = Order(
        ShardIndex.of(corpus),
        seq_len=config.seq_len,
        seed=config.seed,
        window_bytes=config.window_bytes,
        mixture=config.mixture,
    )
    epochs = order.epochs_by_source(config.steps * config.slots * config.micro_batch)
    most, name = max((number, name) for name, number in epochs.items())
    if most > config.mixture.max_epochs:
        raise ConfigError(
            "the run would read its documents again and again, long after anything is learned from them",
            got=f"{name} {most:.1f} times in {config.steps} steps",
            wanted=f"at most pretrain.mixture.max_epochs {config.mixture.max_epochs:g}",
            do=f"lower pretrain.steps to {int(config.steps * config.mixture.max_epochs / most)}, add documents, or "
            "raise pretrain.mixture.max_epochs",
        )
    if corpus.workspace.storage.local is None:
        windows_bytes, beyond_bytes = order.need_bytes(config.slots * config.micro_batch)
        if windows_bytes + beyond_bytes > config.cache_bytes:
            raise ConfigError(
                "pretrain.cache_bytes does not hold what is read at one time",
                got=f"{config.cache_bytes} bytes",
                wanted=f"{windows_bytes + beyond_bytes} bytes: {windows_bytes} for two windows of each stream, "
                f"{beyond_bytes} for a step's sequences beyond them",
                do="raise pretrain.cache_bytes, or lower pretrain.window_bytes; a window holds one shard at least "
                "(tokenize.shard_tokens)",
            )
    return order


def place(config: PretrainConfig, corpus: Artifact) -> Place:
    """Where a run reads its shards: in the workspace's folder, or in this machine's cache of its store."""
    if corpus.workspace.storage.local is not None:
        return LocalShards(corpus.workspace)
    return ShardCache(corpus.workspace, config.cache_bytes, wait_s=config.store_wait_s)


class ShardReader:
    """The shards that this process has mapped, and the threads that get the next ones ready while it trains.

    Args:
        place: Where shards come from.
        index: The shards; they are named by their number in it.
        ref: The artifact, for messages.
        num_threads: Shards that this process fetches or verifies at once. Those of the other processes come on top.
    """

    def __init__(self, place: Place, index: ShardIndex, ref: str, num_threads: int = 2) -> None:
        self._place, self._index, self._ref = place, index, ref
        self.room_bytes, self.waited_s = place.room_bytes, 0.0
        self._opened: dict[int, Opened] = {}
        self._tokens: dict[int, np.ndarray] = {}
        self._wanted: dict[str, int] = {}
        self._todo: list[int] = []
        self._ready: set[int] = set()
        self._changed, self._stopped = threading.Condition(), threading.Event()
        self._threads = [
            threading.Thread(target=self._read_ahead, name="forge-shards", daemon=True) for _ in range(num_threads)
        ]

    def tokens(self, number: int) -> np.ndarray:
        """A shard's tokens. What is in no focus stays mapped until the next one."""
        tokens = self._tokens.get(number)
        if tokens is None:
            began_s = time.monotonic()
            opened = self._opened[number] = self._place.open(*self._named(number), self._wanted)
            self.waited_s += time.monotonic() - began_s
            # Slicing a plain array takes 0.2 microseconds, a memmap 5 (2026-11).
            tokens = self._tokens[number] = opened.shard.tokens.view(np.ndarray)
        return tokens

    def table(self, number: int) -> pa.Table:
        """A shard's documents; see `Shard.table`."""
        self.tokens(number)
        return self._opened[number].shard.table()

    def focus(self, current: Sequence[int], ahead: Sequence[int]) -> None:
        """Says what is read now and what comes next, in order: the rest is let go, this is made ready meanwhile."""
        for number in set(self._opened) - set(current):
            del self._tokens[number]
            self._opened.pop(number).close()
        with self._changed:
            numbers = [*current, *ahead]
            self._wanted = {self._index.shards[number].sha256: rank for rank, number in enumerate(numbers)}
            self._ready &= set(numbers)
            self._todo = [number for number in numbers if number not in self._ready]
            self._changed.notify_all()
        if not self._threads[0].is_alive() and not self._stopped.is_set():
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """Ends the threads and lets go of all files; a fetch that takes long ends by itself, or with the process."""
        self._stopped.set()
        with self._changed:
            self._todo = []
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=_JOIN_S)
        for opened in self._opened.values():
            opened.close()
        self._opened, self._tokens = {}, {}

    def _named(self, number: int) -> tuple[FileEntry, str]:
        entry = self._index.shards[number].entry
        return entry, f"{self._ref}:{entry.name}"

    def _read_ahead(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while (number := self._next()) is not None:
            try:
                again_s = self._place.prepare(*self._named(number), self._wanted)
                pause_s = _FIRST_PAUSE_S
            except CorruptError:
                again_s = 0.0  # whoever reads it finds out by himself, and is told
            except ForgeError:
                again_s, pause_s = pause_s, min(2 * pause_s, _LONGEST_PAUSE_S)
            if again_s:
                with self._changed:
                    self._put_back(number)
                self._stopped.wait(again_s)

    def _next(self) -> int | None:
        """The next shard to make ready, taken off the list; none at the end."""
        with self._changed:
            while not self._todo:
                if self._stopped.is_set():
                    return None
                self._changed.wait()
            number = self._todo.pop(0)
            self._ready.add(number)
            return number

    def _put_back(self, number: int) -> None:
        """Another try after those that are on the list now, if it is still wanted."""
        self._ready.discard(number)
        if self._index.shards[number].sha256 in self._wanted and not self._stopped.is_set():
            self._todo.append(number)


class SlotLoader:
    """Reads the micro-batch of a slot.

    Args:
        order: What stands where.
        reader: Gives a shard's tokens.
        micro_batch: Sequences in a slot.
        slots: Slots in a step.
        steps: Where the run ends, so that nothing is read ahead of need; none for no end.
    """

    def __init__(
        self, order: Order, reader: ShardReader, *, micro_batch: int, slots: int, steps: int | None = None
    ) -> None:
        self.order, self.reader, self.micro_batch, self.slots = order, reader, micro_batch, slots
        self._ends = None if steps is None else order.stream_counts(steps * slots * micro_batch)
        self._spans: list[Span] = []
        self._block = lru_cache(maxsize=64)(self._locate)

    @staticmethod
    def of(config: PretrainConfig, corpus: Artifact) -> SlotLoader:
        """The loader of a run's worker; raises what `plan` does."""
        order = plan(config, corpus)
        reader = ShardReader(place(config, corpus), order.index, corpus.ref)
        return SlotLoader(order, reader, micro_batch=config.micro_batch, slots=config.slots, steps=config.steps)

    def slot(self, step: int, slot: int) -> np.ndarray:
        """The slot's tokens: int64 of shape (micro_batch, seq_len + 1); inputs are [:, :-1], targets [:, 1:].

        Raises:
            CorruptError: A shard does not verify.
            StorageError: The store was waited for in vain.
        """
        seq_len = self.order.seq_len
        first = (step * self.slots + slot) * self.micro_batch
        streams, samples, shards, sequences = self._at(first)
        self._focus(first, streams, samples)
        out = np.empty((self.micro_batch, seq_len + 1), dtype=np.int64)
        for row, (shard, sequence) in enumerate(zip(shards.tolist(), sequences.tolist(), strict=True)):
            start = sequence * seq_len
            out[row] = self.reader.tokens(shard)[start : start + seq_len + 1]
        return out

    def epochs(self, steps: int) -> float:
        """How often the corpus is read in so many steps."""
        return steps * self.slots * self.micro_batch / self.order.num_sequences

    def epochs_by_source(self, steps: int) -> dict[str, float]:
        """How often each source is read in so many steps."""
        return self.order.epochs_by_source(steps * self.slots * self.micro_batch)

    def _at(self, first: int) -> np.ndarray:
        """Stream, sample, shard and sequence of a slot's positions: int64 of shape (4, micro_batch).

        Looked up for many positions at a time: numpy takes as long for eight as for hundreds.
        """
        last = first + self.micro_batch - 1
        blocks = range(first // _BLOCK, last // _BLOCK + 1)
        found = np.concatenate([self._block(block) for block in blocks], axis=1)
        return found[:, first - blocks[0] * _BLOCK :][:, : self.micro_batch]

    def _locate(self, block: int) -> np.ndarray:
        streams, samples = self.order.samples(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        return np.stack([streams, samples, *self.order.locate(streams, samples)])

    def _focus(self, first: int, streams: np.ndarray, samples: np.ndarray) -> None:
        """Tells the reader when the windows that are read change."""
        spans = self._spans or [
            (stream.window(count), stream.window(count))
            for stream, count in zip(self.order.streams, self.order.stream_counts(first).tolist(), strict=True)
        ]
        spans = list(spans)
        for number in np.unique(streams):
            mine, stream = samples[streams == number], self.order.streams[number]
            spans[number] = (stream.window(mine.min()), stream.window(mine.max()))
        if spans == self._spans:
            return
        self._spans = spans
        self.reader.focus(*self._windows(spans))

    def _windows(self, spans: list[Span]) -> tuple[list[int], list[int]]:
        """Shards of the windows of these spans, and those after them as far as there is room; one window at least."""
        sizes_bytes = [shard.size_bytes for shard in self.order.index.shards]
        ahead, current, comings = {}, {}, []
        for number, (stream, (oldest, newest)) in enumerate(zip(self.order.streams, spans, strict=True)):
            windows = stream.windows(oldest)
            for window, _, shards in windows:
                current |= dict.fromkeys(shards.tolist())
                if window == newest:
                    break
            comings.append((number, windows))
        used_bytes = sum(sizes_bytes[shard] for shard in current)
        readable = sum(len(stream.shards) for stream in self.order.streams)
        while comings and len(current) + len(ahead) < readable:
            for number, windows in list(comings):
                _, sample, shards = next(windows)
                if self._ends is not None and sample >= self._ends[number]:
                    comings.remove((number, windows))
                    continue
                new = [shard for shard in shards.tolist() if shard not in current and shard not in ahead]
                ahead |= dict.fromkeys(new)
                used_bytes += sum(sizes_bytes[shard] for shard in new)
            if used_bytes >= self.reader.room_bytes:
                break
        return list(current), list(ahead)
