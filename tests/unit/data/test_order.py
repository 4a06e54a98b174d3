"""The order of training: a bijection, windows, exact shares, each sequence once in an epoch."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

from forge_ray.config import MixtureConfig
from forge_ray.data.order import Mixture, Order, Permutation
from forge_ray.data.shards import ShardIndex, ShardInfo
from forge_ray.errors import ConfigError, DataError

SEQ_LEN = 16
WEIGHTED = MixtureConfig(weights={"a": 1, "b": 5, "c": 0.25})


def index(sizes: list[int], origins: str = "") -> ShardIndex:
    """An index of shards of so many tokens each."""
    names = origins or "a" * len(sizes)
    rows = [
        ShardInfo(f"train-{i:05d}.tok", f"{i:064x}", 2 * size, size, 1, name)
        for i, (size, name) in enumerate(zip(sizes, names, strict=True))
    ]
    return ShardIndex(tuple(rows), vocab_size=100, end_token=0)


def order(
    sizes: list[int], origins: str = "", *, window_bytes: int = 1 << 30, seed: int = 0, **options: object
) -> Order:
    return Order(index(sizes, origins), seq_len=SEQ_LEN, seed=seed, window_bytes=window_bytes, **options)  # type: ignore[arg-type]


def read(plan: Order, count: int, first: int = 0) -> np.ndarray:
    """What stands at the positions: rows of (stream, shard, sequence)."""
    streams, samples = plan.samples(np.arange(first, first + count))
    return np.stack([streams, *plan.locate(streams, samples)], axis=1)


def drawn(count: int, seed: int = 0) -> list[int]:
    """Sizes of shards, of which some hold no sequence."""
    draw = random.Random(seed)
    return [draw.choice([5, 16, 17, draw.randint(50, 900)]) for _ in range(count)]


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65_537, 100_003])
def test_a_permutation_is_a_bijection(n: int) -> None:
    out = Permutation(n, (0, 0))(np.arange(n))
    assert (np.sort(out) == np.arange(n)).all()


def test_a_permutation_of_a_large_corpus_stays_in_range_and_repeats_nothing() -> None:
    n = 3_000_000_000
    chosen = np.random.default_rng(0).choice(n, 20_000, replace=False)
    out = Permutation(n, (1, 2))(chosen)
    assert out.min() >= 0
    assert out.max() < n
    assert len(np.unique(out)) == len(np.unique(chosen))


def test_a_permutation_mixes() -> None:
    n = 10_000
    out = Permutation(n, (3, 0))(np.arange(n))
    # Of a random permutation: neighbours are n/3 apart on average, with a standard error of 0.24% of n.
    assert abs(np.abs(np.diff(out)).mean() / n - 1 / 3) < 0.012
    assert abs(np.corrcoef(out, np.arange(n))[0, 1]) < 0.05
    assert (out == np.arange(n)).sum() < 10


def test_keys_give_unlike_orders() -> None:
    orders = [Permutation(1000, key)(np.arange(1000)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0, "a"))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("window_bytes", [1, 3000, 1 << 30])
def test_an_epoch_reads_each_sequence_once_and_the_next_in_another_order(window_bytes: int) -> None:
    plan = order(drawn(40), window_bytes=window_bytes)
    epochs = read(plan, 3 * plan.num_sequences)[:, 1:].reshape(3, plan.num_sequences, 2)
    wanted = [(shard, number) for shard, count in enumerate(plan.counts) for number in range(count)]
    assert len(wanted) == plan.num_sequences
    for epoch in epochs:
        assert sorted(map(tuple, epoch.tolist())) == wanted
    for one, other in ((0, 1), (1, 2)):
        assert (epochs[one] == epochs[other]).all(axis=1).mean() < 0.1


@pytest.mark.parametrize("window_bytes", [1, 3000, 9000])
def test_a_window_is_read_to_its_end_before_the_next_begins(window_bytes: int) -> None:
    plan = order(drawn(60), window_bytes=window_bytes)
    shards = read(plan, plan.num_sequences)[:, 1]
    sizes = np.array([shard.size_bytes for shard in plan.index.shards])
    lasts = {int(shard): i for i, shard in enumerate(shards)}
    pending: set[int] = set()
    for i, shard in enumerate(shards.tolist()):
        pending.add(shard)
        assert sizes[list(pending)].sum() <= max(window_bytes, sizes.max())
        pending -= {done for done in pending if lasts[done] == i}
    assert plan.streams[0].max_window_bytes == max(window_bytes, sizes[plan.counts > 0].max())


def test_a_corpus_that_fits_one_window_is_shuffled_as_a_whole() -> None:
    plan = order([16 * 500 + 1] * 4)
    shards = read(plan, 2000)[:, 1]
    for quarter in np.split(shards, 4):
        assert np.bincount(quarter, minlength=4).min() > 90


def test_windows_are_walked_in_the_order_in_which_they_are_read() -> None:
    plan = order(drawn(30), window_bytes=4000)
    stream = plan.streams[0]
    shards = read(plan, 5 * plan.num_sequences)[:, 1]
    walk = stream.windows((0, 0))
    spans = [next(walk) for _ in range(15)]
    assert spans[-1][0][0] > 0
    for (window, first, members), (_, after, _) in itertools.pairwise(spans):
        assert set(shards[first:after].tolist()) == set(members.tolist())
        assert stream.window(first) == stream.window(after - 1) == window


def test_planning_a_large_corpus_does_not_look_at_sequences() -> None:
    """A million sequences in each of 20,000 shards: whatever is O(sequences) would not end."""
    plan = order([16 * 1_000_000 + 1] * 20_000, window_bytes=1 << 30)
    far = 3 * plan.num_sequences + 12_345_678_901
    found = read(plan, 1000, first=far)
    assert len(np.unique(found, axis=0)) == 1000
    assert (read(plan, 10, first=far + 500) == found[500:510]).all()


@pytest.mark.parametrize("mixture", [None, WEIGHTED, MixtureConfig(epochs={"c": 3})])
def test_any_position_can_be_asked_for_alone(mixture: MixtureConfig | None) -> None:
    options = {"window_bytes": 3000, "mixture": mixture, "seed": 4}
    together = read(order(drawn(30), "abc" * 10, **options), 3000)
    alone = order(drawn(30), "abc" * 10, **options)
    for position in random.Random(0).sample(range(3000), 200):
        assert (read(alone, 1, first=position)[0] == together[position]).all()


def test_seeds_give_unlike_orders() -> None:
    one, other = (read(order(drawn(30), window_bytes=3000, seed=seed), 300) for seed in (0, 1))
    assert (one == other).all(axis=1).mean() < 0.1


@pytest.mark.parametrize("sizes", [[16], [5, 16, 10], []])
def test_a_corpus_below_one_sequence_is_refused(sizes: list[int]) -> None:
    with pytest.raises(DataError, match="no whole training sequence") as caught:
        order(sizes)
    assert f"{sum(sizes)} tokens" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ mixture


@pytest.mark.parametrize(
    "weights", [[1.0], [1, 1], [1, 5, 0.25], [1e-6, 1.0, 3e-4], [0.1] * 40, [2**-k for k in range(12)]]
)
def test_any_prefix_has_its_shares_to_within_a_block(weights: list[float]) -> None:
    mixture, n = Mixture(weights, seed=0), 20_000
    streams, samples = mixture(np.arange(n))
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(streams[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(counts - np.arange(1, n + 1)[:, None] * shares).max() <= Mixture.BLOCK
    at_blocks = counts[Mixture.BLOCK - 1 :: Mixture.BLOCK]
    due = np.arange(1, len(at_blocks) + 1)[:, None] * Mixture.BLOCK * shares
    assert np.abs(at_blocks - due).max() <= 0.5 + len(weights) / 2 * shares.max()
    for stream in range(len(weights)):
        assert (samples[streams == stream] == np.arange(counts[-1, stream])).all()
    for prefix in (0, 1, 255, 256, 257, n):
        assert mixture.counts(prefix).tolist() == (counts[prefix - 1] if prefix else 0 * counts[0]).tolist()


def test_shares_do_not_drift_in_a_run_of_any_length() -> None:
    weights = [Fraction(1, 3), Fraction(1, 7), Fraction(11, 21)]
    mixture, far = Mixture([float(weight) for weight in weights], seed=1), 10**15
    for share, count in zip(weights, mixture.counts(far).tolist(), strict=True):
        assert abs(count - share * far) < far / (1 << 38)
    streams, samples = mixture(np.arange(far, far + 1000))
    assert (mixture.counts(far + 1000) - mixture.counts(far) == np.bincount(streams, minlength=3)).all()
    assert samples.min() > far / 8


def test_counts_never_fall() -> None:
    """A block's quotas are differences of counts, so a count that fell would take back what was read."""
    draw = random.Random(0)
    for _ in range(20):
        mixture = Mixture([draw.random() ** 4 + 1e-9 for _ in range(draw.randint(2, 12))], seed=0)
        counts = np.array([mixture._due(n) for n in range(300)])
        assert (counts.sum(axis=1) == np.arange(300)).all()
        assert np.diff(counts, axis=0).min() >= 0


@pytest.mark.parametrize("mixture", [WEIGHTED, MixtureConfig(epochs={"b": 2.5})])
def test_each_source_is_read_once_before_any_of_it_is_read_twice(mixture: MixtureConfig) -> None:
    plan = order(drawn(45), "abc" * 15, window_bytes=6000, mixture=mixture)
    found = read(plan, 4 * plan.num_sequences)
    for number, (name, count) in enumerate(plan.sources.items()):
        mine = found[found[:, 0] == number, 1:]
        assert {plan.index.shards[shard].origin for shard in mine[:, 0]} == {name}
        for first in range(0, len(mine) - count, count):
            assert len(np.unique(mine[first : first + count], axis=0)) == count


def test_weights_are_shares_of_the_tokens_and_epochs_are_ratios_of_passes() -> None:
    sizes, n = [16 * 100 + 1, 16 * 300 + 1, 16 * 50 + 1], 25 * Mixture.BLOCK
    by_weight = order(sizes, "abc", mixture=WEIGHTED)
    assert by_weight.stream_counts(n).tolist() == [1024, 5120, 256]
    assert by_weight.epochs_by_source(n) == {"a": 10.24, "b": 5120 / 300, "c": 5.12}
    by_epochs = order(sizes, "abc", mixture=MixtureConfig(epochs={"b": 2, "c": 0.5})).epochs_by_source(n)
    assert by_epochs["b"] / by_epochs["a"] == pytest.approx(2, rel=0.01)
    assert by_epochs["c"] / by_epochs["a"] == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("mixture", [None, WEIGHTED])
@pytest.mark.parametrize("n", [0, 1, 777, 5000])
def test_what_was_read_of_each_source_is_counted(mixture: MixtureConfig | None, n: int) -> None:
    plan = order(drawn(45), "abc" * 15, window_bytes=3000, mixture=mixture)
    origins = [plan.index.shards[shard].origin for shard in read(plan, n)[:, 1]]
    wanted = {name: origins.count(name) / count for name, count in plan.sources.items()}
    assert plan.epochs_by_source(n) == wanted


def test_another_source_changes_when_a_sources_samples_come_but_not_their_order() -> None:
    sizes = drawn(30)
    alone = order(sizes, "a" * 30, window_bytes=3000, mixture=MixtureConfig(weights={"a": 1}))
    beside = order(
        [*sizes, 16 * 50 + 1], "a" * 30 + "b", window_bytes=6000, mixture=MixtureConfig(weights={"a": 1, "b": 1})
    )
    found = read(beside, 2000)
    mine = found[found[:, 0] == 0]
    assert (mine == read(alone, len(mine))).all()


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        (MixtureConfig(weights={"a": 1}), "leaves out sources of the corpus.*got: b, tiny"),
        (MixtureConfig(weights={"a": 1, "b": 1, "tiny": 1, "x": 2}), "does not have.*got: x"),
        (MixtureConfig(epochs={"x": 2, "y": 1}), "does not have.*got: x, y"),
        (MixtureConfig(epochs={"tiny": 2}), "without one whole sequence.*got: tiny"),
    ],
)
def test_a_mixture_that_does_not_fit_the_corpus_is_refused(mixture: MixtureConfig, words: str) -> None:
    rows = [("a", 100), ("b", 100), ("tiny", 10)]
    shards = tuple(ShardInfo(name, "0" * 64, 2 * size, size, 1, name) for name, size in rows)
    with pytest.raises(ConfigError, match="(?s)" + words) as caught:
        Order(ShardIndex(shards, 100, 0), seq_len=SEQ_LEN, seed=0, window_bytes=1000, mixture=mixture)
    assert "wanted: a, b, tiny" in str(caught.value)


@pytest.mark.parametrize("mixture", [None, WEIGHTED])
@pytest.mark.parametrize("per_step", [1, 8, 700])
@pytest.mark.parametrize("window_bytes", [1, 3000, 20_000, 1 << 30])
def test_what_a_step_touches_is_within_what_is_asked_for(
    mixture: MixtureConfig | None, per_step: int, window_bytes: int
) -> None:
    plan = order(drawn(45), "abc" * 15, window_bytes=window_bytes, mixture=mixture)
    need_bytes = sum(plan.need_bytes(per_step))
    sizes = [shard.size_bytes for shard in plan.index.shards]
    for first in range(0, 2 * plan.num_sequences, per_step):
        streams, samples = plan.samples(np.arange(first, first + per_step))
        touched: set[int] = set()
        for number in np.unique(streams):
            mine, stream = samples[streams == number], plan.streams[number]
            last = stream.window(mine.max())
            for window, _, shards in stream.windows(stream.window(mine.min())):
                touched |= set(shards.tolist())
                if window == last:
                    break
        assert sum(sizes[shard] for shard in touched) <= need_bytes
