"""The order of training: a bijection, the same for any division, each sequence once in an epoch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.data import shards
from forge_ray.data.loader import Permutation, SlotLoader
from forge_ray.data.shards import Shard
from forge_ray.errors import DataError
from forge_ray.train.slots import owned

SEQ_LEN = 16


def opened(folder: Path, sizes: list[int]) -> list[Shard]:
    """Shards whose tokens count on from one to the next, so that a token tells where it stands."""
    found, base = [], 0
    for i, size in enumerate(sizes):
        path = folder / f"{i}.tok"
        table = pa.table({"id": ["x"], "offset": [0], "length": [size], "source": ["x"], "licence": ["x"]})
        with path.open("wb") as stream:
            shards.write(stream, np.arange(base, base + size, dtype=np.uint32), table, vocab_size=1 << 20, end_token=0)
        found.append(Shard(path))
        base += size
    return found


def loader(folder: Path, sizes: list[int], *, micro_batch: int = 2, slots: int = 4, seed: int = 0) -> SlotLoader:
    return SlotLoader(opened(folder, sizes), seq_len=SEQ_LEN, micro_batch=micro_batch, slots=slots, seed=seed)


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65_537, 100_003])
def test_a_permutation_is_a_bijection(n: int) -> None:
    out = Permutation(n, (0, 0))(np.arange(n))
    assert (np.sort(out) == np.arange(n)).all()


def test_a_permutation_of_a_large_corpus_stays_in_range_and_repeats_nothing() -> None:
    n = 3_000_000_000
    index = np.random.default_rng(0).choice(n, 20_000, replace=False)
    out = Permutation(n, (1, 2))(index)
    assert out.min() >= 0
    assert out.max() < n
    assert len(np.unique(out)) == len(np.unique(index))


def test_a_permutation_mixes() -> None:
    n = 10_000
    out = Permutation(n, (3, 0))(np.arange(n))
    # Of a random permutation: neighbours are n/3 apart on average, with a standard error of 0.24% of n.
    assert abs(np.abs(np.diff(out)).mean() / n - 1 / 3) < 0.012
    assert abs(np.corrcoef(out, np.arange(n))[0, 1]) < 0.05
    assert (out == np.arange(n)).sum() < 10


def test_keys_give_unlike_orders() -> None:
    orders = [Permutation(1000, key)(np.arange(1000)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_number_of_workers_reads_the_same_samples(tmp_path: Path, world_size: int) -> None:
    alone = loader(tmp_path, [500, 40, 300], slots=8)
    wanted = {(step, slot): alone.slot(step, slot) for step in range(12) for slot in range(8)}
    for rank in range(world_size):
        mine = loader(tmp_path, [500, 40, 300], slots=8)
        steps = random.Random(rank).sample(range(12), 12)  # whoever resumes starts anywhere
        for step in steps:
            for slot in owned(rank, world_size, 8):
                assert (mine.slot(step, slot) == wanted.pop((step, slot))).all()
    assert not wanted


def test_an_epoch_reads_each_sequence_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    reader = loader(tmp_path, [16 * 30 + 1, 15, 16 * 18 + 7])
    assert reader.num_sequences == 48
    read = np.concatenate([reader.sequences(step, slot) for step in range(18) for slot in range(4)])
    epochs = read.reshape(3, 48)
    for epoch in epochs:
        assert (np.sort(epoch) == np.arange(48)).all()
    assert (epochs[0] == epochs[1]).sum() < 12
    assert (epochs[1] == epochs[2]).sum() < 12
    assert reader.epochs(18) == 3.0


def test_a_slot_that_spans_two_epochs_takes_from_both(tmp_path: Path) -> None:
    reader = loader(tmp_path, [16 * 7 + 1], micro_batch=3, slots=1)
    read = np.concatenate([reader.sequences(step, 0) for step in range(7)])
    assert all(sorted(read[i : i + 7]) == list(range(7)) for i in (0, 7, 14))


def test_a_slots_rows_are_slices_of_one_shard_each(tmp_path: Path) -> None:
    sizes = [16 * 3 + 1, 16, 16 * 2 + 16]  # the second holds no whole sequence and its successor
    reader = loader(tmp_path, sizes, micro_batch=5, slots=1)
    starts = {0: 0, 1: 16, 2: 32, 3: 65, 4: 81}
    assert reader.num_sequences == len(starts)
    tokens, sequences = reader.slot(0, 0), reader.sequences(0, 0)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [list(range(starts[int(s)], starts[int(s)] + 17)) for s in sequences]


@pytest.mark.parametrize("sizes", [[16], [5, 16, 10], []])
def test_a_corpus_below_one_sequence_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    with pytest.raises(DataError, match="no whole training sequence") as caught:
        loader(tmp_path, sizes)
    assert f"{sum(sizes)} tokens" in str(caught.value)
