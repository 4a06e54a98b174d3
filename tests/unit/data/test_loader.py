"""Micro-batches: the same samples whoever reads them, from a folder or through the cache, and what is read ahead."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_ray.artifact import Artifact, Workspace
from forge_ray.config import PretrainConfig
from forge_ray.data import cache, loader
from forge_ray.data.cache import ShardCache
from forge_ray.data.loader import ShardReader, SlotLoader
from forge_ray.errors import ConfigError, CorruptError, DataError, StorageError
from forge_ray.train.elastic.slots import assign
from tests.unit.data.corpus import Before, fetched, publish, remote, until

SEQ_LEN = 16
SIZES = [500, 40, 300, 16, 700, 650, 333, 420]
ORIGINS = "abababab"
Open = Callable[..., SlotLoader]


def settings(**changes: Any) -> PretrainConfig:
    """Windows of two or three shards."""
    base = {"steps": 100, "slots": 4, "micro_batch": 2, "seq_len": SEQ_LEN, "window_bytes": 6000, "cache_bytes": 40_000}
    return PretrainConfig(**{**base, "max_workers": 1, **changes})


@pytest.fixture
def open_loader() -> Iterator[Open]:
    """Opens loaders of a corpus, as each worker of a run does; all of them share a cache."""
    opened: list[SlotLoader] = []

    def make(corpus: Artifact, **changes: Any) -> SlotLoader:
        opened.append(SlotLoader.of(settings(**changes), corpus))
        return opened[-1]

    yield make
    for one in opened:
        one.reader.close()


@pytest.fixture
def folder(tmp_path: Path) -> Artifact:
    """A corpus of two sources."""
    return publish(Workspace(str(tmp_path / "store")), SIZES, ORIGINS)


@pytest.fixture
def afar(folder: Artifact, tmp_path: Path) -> Artifact:
    """The same, behind the cache."""
    return remote(folder, tmp_path / "log")


@pytest.mark.parametrize("mixture", [{}, {"weights": {"a": 1, "b": 3}}], ids=["one corpus", "mixture"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_number_of_workers_reads_the_same_samples(
    store_uri: str, open_loader: Open, world_size: int, mixture: dict[str, Any]
) -> None:
    corpus = publish(Workspace(store_uri), SIZES, ORIGINS)
    options = {"slots": 8, "mixture": mixture}
    alone = open_loader(corpus, **options)
    wanted = {(step, slot): alone.slot(step, slot) for step in range(30) for slot in range(8)}
    for rank in range(world_size):
        mine = open_loader(corpus, **options)
        steps = random.Random(rank).sample(range(30), 30)  # whoever resumes starts anywhere
        for step in steps:
            for slot in assign([()] * world_size, 8).slots[rank]:
                assert (mine.slot(step, slot) == wanted.pop((step, slot))).all()
    assert not wanted


def test_a_folder_and_a_store_give_the_same_samples(folder: Artifact, afar: Artifact, open_loader: Open) -> None:
    here, there = open_loader(folder), open_loader(afar)
    for step in range(60):
        assert (here.slot(step, 1) == there.slot(step, 1)).all()


def test_slots_are_the_whole_sequences_of_each_shard_once_an_epoch(afar: Artifact, open_loader: Open) -> None:
    starts, base = [], 0
    for size in SIZES:
        starts += [base + k * SEQ_LEN for k in range((size - 1) // SEQ_LEN)]
        base += size
    reader = open_loader(afar, slots=1, micro_batch=3)
    assert reader.order.num_sequences == len(starts)
    rows = np.concatenate([reader.slot(step, 0) for step in range(len(starts))])
    assert rows.dtype == np.int64
    assert (rows == rows[:, :1] + np.arange(SEQ_LEN + 1)).all()
    for epoch in np.split(rows[:, 0], 3):
        assert sorted(epoch.tolist()) == starts
    assert reader.epochs(len(starts)) == 3.0
    assert reader.epochs_by_source(len(starts)) == {"a": 3.0, "b": 3.0}


def test_micro_batches_and_slots_cut_the_same_batch_alike(afar: Artifact, open_loader: Open) -> None:
    one, other = open_loader(afar, slots=8, micro_batch=1), open_loader(afar, slots=2, micro_batch=4)
    for step in range(20):
        mine = np.concatenate([one.slot(step, slot) for slot in range(8)])
        assert (mine == np.concatenate([other.slot(step, slot) for slot in range(2)])).all()


# --------------------------------------------------------------------------------------------------------- read-ahead


@pytest.fixture
def over(folder: Artifact, tmp_path: Path) -> Iterator[Callable[..., SlotLoader]]:
    """A loader over a watched store."""
    opened: list[SlotLoader] = []

    def make(before: Before = lambda name, target: None, **changes: Any) -> SlotLoader:
        config = settings(slots=1, **changes)
        artifact = remote(folder, tmp_path / "log", before)
        order = loader.plan(config, artifact)
        (tmp_path / "log").unlink(missing_ok=True)  # the index, which is no shard
        place = ShardCache(artifact.workspace, config.cache_bytes, tmp_path / "cached", wait_s=5.0)
        reader = ShardReader(place, order.index, artifact.ref)
        opened.append(SlotLoader(order, reader, micro_batch=2, slots=1, steps=config.steps))
        return opened[-1]

    yield make
    for one in opened:
        one.reader.close()


def windows_of(reader: SlotLoader, count: int) -> list[set[str]]:
    """Digests of the shards of the first windows."""
    walk = reader.order.streams[0].windows((0, 0))
    return [{reader.order.index.shards[shard].sha256 for shard in next(walk)[2]} for _ in range(count)]


def test_the_next_windows_are_fetched_while_the_first_is_read(over: Callable[..., SlotLoader], tmp_path: Path) -> None:
    reader = over(cache_bytes=1 << 20)
    reader.slot(0, 0)
    everything = {shard.sha256 for shard in reader.order.index.shards if shard.tokens > SEQ_LEN}
    until("the read-ahead", lambda: set(os_names(tmp_path / "cached")) >= everything)
    for step in range(reader.order.num_sequences):
        reader.slot(step, 0)
    assert sorted(fetched(tmp_path / "log")) == sorted(everything)


def test_the_cache_stays_in_its_bound_and_old_windows_make_room(
    over: Callable[..., SlotLoader], tmp_path: Path
) -> None:
    need_bytes = sum(over().order.need_bytes(2))
    reader = over(cache_bytes=need_bytes)
    for step in range(2 * reader.order.num_sequences):
        reader.slot(step, 0)
        assert sum((tmp_path / "cached" / name).stat().st_size for name in os_names(tmp_path / "cached")) <= need_bytes
        assert len(reader.reader._opened) <= 2 * max(map(len, windows_of(reader, 4)))
    assert len(fetched(tmp_path / "log")) > len(SIZES)  # the corpus does not fit


def test_nothing_is_fetched_that_the_run_does_not_reach(over: Callable[..., SlotLoader], tmp_path: Path) -> None:
    reader = over(steps=3, cache_bytes=1 << 20)
    for step in range(3):
        reader.slot(step, 0)
    reader.reader.close()
    window, after = windows_of(reader, 2)
    assert set(fetched(tmp_path / "log")) == window
    assert after


def test_steps_go_on_from_the_cache_while_the_store_is_down(
    over: Callable[..., SlotLoader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_FIRST_PAUSE_S", 0.01)
    down: set[str] = set()

    def before(name: str, target: Path) -> None:
        if down:
            raise StorageError("the store is down") from ConnectionResetError("reset")

    reader, wanted = over(before, cache_bytes=20_000), over(cache_bytes=20_000)
    reader.slot(0, 0)
    window, after = windows_of(reader, 2)
    until("two windows", lambda: set(os_names(tmp_path / "cached")) >= window | after)
    down.add("yes")
    in_two_windows = reader.order.streams[0].windows((0, 2)).__next__()[1] // 2
    for step in range(in_two_windows):
        assert (reader.slot(step, 0) == wanted.slot(step, 0)).all()
    threading.Timer(0.3, down.clear).start()
    for step in range(in_two_windows, reader.order.num_sequences):
        assert (reader.slot(step, 0) == wanted.slot(step, 0)).all()


def os_names(folder: Path) -> list[str]:
    """Names of the shards in a cache."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("where", ["folder", "afar"])
def test_a_damaged_shard_is_named_when_it_is_reached_and_not_before(
    request: pytest.FixtureRequest, folder: Artifact, open_loader: Open, where: str
) -> None:
    corpus: Artifact = request.getfixturevalue(where)
    order = loader.plan(settings(window_bytes=1), folder)
    walk = order.streams[0].windows((0, 0))
    _, (_, first, (shard, *_)) = next(walk), next(walk)
    row = order.index.shards[shard]
    blob = Path(folder.workspace.uri) / "blobs" / row.sha256[:2] / row.sha256
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    reader = open_loader(corpus, window_bytes=1, slots=1, micro_batch=1)
    for step in range(first):
        reader.slot(step, 0)
    with pytest.raises(CorruptError) as caught:
        reader.slot(first, 0)
    assert f"{corpus.ref}:{row.name}" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- plan


def test_a_cache_that_does_not_hold_two_windows_is_refused_with_the_numbers(afar: Artifact, folder: Artifact) -> None:
    need_bytes = sum(loader.plan(settings(), afar).need_bytes(8))
    assert loader.plan(settings(cache_bytes=need_bytes), afar)
    with pytest.raises(ConfigError, match=r"pretrain\.cache_bytes") as caught:
        loader.plan(settings(cache_bytes=need_bytes - 1), afar)
    assert f"{need_bytes - 1} bytes" in str(caught.value)
    assert f"{need_bytes} bytes" in str(caught.value)
    assert loader.plan(settings(cache_bytes=1), folder)  # nothing is copied


def test_a_run_that_would_repeat_its_documents_for_nothing_is_refused_with_how_long_it_may_be(tmp_path: Path) -> None:
    artifact = publish(Workspace(str(tmp_path)), [100, 160])
    told = settings(steps=100_000)
    (number,) = loader.plan(told.replace(mixture={"max_epochs": 1e9}), artifact).epochs_by_source(1).values()
    samples = told.slots * told.micro_batch
    enough = int(40 / (number * samples))
    assert loader.plan(told.replace(steps=enough), artifact)
    with pytest.raises(ConfigError, match="again and again") as caught:
        loader.plan(told, artifact)
    assert f"to {enough}" in str(caught.value.as_dict())


def test_sources_that_are_not_there_are_refused_before_a_shard_is_read(afar: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"(?s)got: c.*wanted: a, b"):
        loader.plan(settings(mixture={"epochs": {"c": 2}}), afar)


def test_a_corpus_below_one_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no whole training sequence"):
        loader.plan(settings(), publish(Workspace(str(tmp_path)), [10, 16]))
