"""The node's cache of shards: one fetch for all processes, a bound that holds, and no harm from those that die."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forge_ray import copies
from forge_ray.artifact import Artifact, Workspace
from forge_ray.data import cache
from forge_ray.data.cache import ShardCache
from forge_ray.data.shards import ShardIndex, ShardInfo
from forge_ray.errors import CorruptError, DiskFullError, StorageError
from tests.unit.data.corpus import Before, fetched, publish, remote, until

SIZES = [3000, 3001, 3002, 3003, 3004, 3005]
fork = multiprocessing.get_context("fork")


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    """Six shards of some 13 kB."""
    return publish(Workspace(str(tmp_path / "store")), SIZES)


@pytest.fixture
def rows(corpus: Artifact) -> tuple[ShardInfo, ...]:
    """What the index says of them."""
    return ShardIndex.of(corpus).shards


@pytest.fixture
def make(corpus: Artifact, tmp_path: Path) -> Callable[..., ShardCache]:
    """A cache that holds so many shards."""

    def build(shards: float = 10, before: Before = lambda name, target: None, wait_s: float = 5.0) -> ShardCache:
        room_bytes = int(shards * max(row.size_bytes for row in ShardIndex.of(corpus).shards))
        workspace = remote(corpus, tmp_path / "log", before).workspace
        return ShardCache(workspace, room_bytes, folder=tmp_path / "cached", wait_s=wait_s)

    return build


@pytest.fixture
def started() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Starts functions in processes of their own, which end with the test."""
    processes = []

    def start(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
        processes.append(fork.Process(target=target, args=args, daemon=True))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def names(store: ShardCache) -> set[str]:
    """All that lies in the folder but the lock."""
    return {path.name for path in store.folder.iterdir()} - {copies._SPACE}


def digests(rows: tuple[ShardInfo, ...], *numbers: int) -> set[str]:
    return {rows[number].sha256 for number in numbers}


def take(store: ShardCache, row: ShardInfo) -> None:
    """Opens a shard, looks at it and lets it go."""
    opened = store.open(row.entry, f"tokenize/0:{row.name}", {})
    assert len(opened.shard.tokens) == row.tokens
    opened.close()


def test_a_shard_is_fetched_once_and_then_read_here(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], tmp_path: Path
) -> None:
    store = make()
    for _ in range(3):
        take(store, rows[0])
        take(make(), rows[0])
    assert fetched(tmp_path / "log") == [rows[0].sha256]
    assert names(store) == digests(rows, 0)
    assert (store.folder / rows[0].sha256).stat().st_mode & 0o777 == 0o444


def test_processes_that_want_the_same_shards_share_one_fetch_of_each(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], tmp_path: Path, started: Callable[..., fork.Process]
) -> None:
    store = make(before=lambda name, target: time.sleep(0.05))

    def all_of_them(seed: int) -> None:
        for row in random.Random(seed).sample(rows, len(rows)):
            take(store, row)

    processes = [started(all_of_them, seed) for seed in range(5)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert sorted(fetched(tmp_path / "log")) == sorted(row.sha256 for row in rows)
    assert names(store) == digests(rows, *range(len(rows)))


def test_what_is_there_never_exceeds_the_bound_and_every_shard_is_read(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], started: Callable[..., fork.Process]
) -> None:
    store = make(shards=4)  # for three processes that hold one each

    def many(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            take(store, draw.choice(rows))

    processes = [started(many, seed) for seed in range(3)]
    largest_bytes = 0
    while any(process.is_alive() for process in processes):
        total_bytes = 0
        for name in os.listdir(store.folder):
            try:
                total_bytes += (store.folder / name).stat().st_size
            except FileNotFoundError:
                continue
        largest_bytes = max(largest_bytes, total_bytes)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    # A listing takes time, so it may see a file that comes and one that went: no more than one.
    assert 2 * rows[0].size_bytes < largest_bytes <= store.room_bytes + rows[-1].size_bytes
    assert store.used_bytes() <= store.room_bytes


def test_what_was_used_least_recently_goes_first(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], tmp_path: Path
) -> None:
    store = make(shards=3)
    for number in (0, 1, 2, 0, 3):
        take(store, rows[number])
    assert names(store) == digests(rows, 0, 2, 3)


def test_what_is_wanted_soon_goes_last_and_only_for_a_reader_that_waits(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...]
) -> None:
    store = make(shards=3)
    wanted = {rows[number].sha256: rank for rank, number in enumerate((0, 1, 2))}
    for number in (2, 0, 1):
        assert store.prepare(rows[number].entry, "x", wanted) == 0
    assert store.prepare(rows[3].entry, "x", wanted) > 0
    assert names(store) == digests(rows, 0, 1, 2)
    store.open(rows[3].entry, "x", wanted).close()
    assert names(store) == digests(rows, 0, 1, 3)


def test_a_mapped_shard_is_never_removed(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], started: Callable[..., fork.Process], tmp_path: Path
) -> None:
    store = make(shards=2, wait_s=0.1)

    def hold() -> None:
        opened = store.open(rows[0].entry, "x", {})
        (tmp_path / "held").touch()
        time.sleep(60)
        opened.close()

    other = started(hold)
    until("the pin", (tmp_path / "held").exists)
    mine = store.open(rows[1].entry, "x", {})
    assert store.prepare(rows[2].entry, "x", {}) > 0
    with pytest.raises(StorageError, match="no room") as caught:
        store.open(rows[2].entry, "x", {})
    assert f"cache_bytes {store.room_bytes}" in str(caught.value)
    mine.close()
    take(store, rows[2])
    assert names(store) == digests(rows, 0, 2)
    other.kill()  # and with it goes its pin
    other.join()
    take(store, rows[3])
    take(store, rows[4])
    assert names(store) == digests(rows, 3, 4)


def test_a_reader_waits_for_room_that_another_gives(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...]
) -> None:
    store = make(shards=1)
    held = store.open(rows[0].entry, "x", {})
    threading.Timer(0.2, held.close).start()
    take(store, rows[1])
    assert names(store) == digests(rows, 1)


def test_a_fetch_that_is_killed_is_done_by_the_next(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], started: Callable[..., fork.Process], tmp_path: Path
) -> None:
    def half(name: str, target: Path) -> bool:
        target.write_bytes(b"x" * 6000)
        (tmp_path / "half").touch()
        time.sleep(60)
        return True

    broken, store = make(shards=1.5, before=half), make(shards=1.5)
    process = started(lambda: broken.open(rows[0].entry, "x", {}))
    until("half a shard", (tmp_path / "half").exists)
    assert store.prepare(rows[0].entry, "x", {}) > 0  # it is on its way
    assert store.used_bytes() == rows[0].size_bytes  # reserved as a whole
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    take(store, rows[1])  # whoever comes next clears away what is left
    assert names(store) == digests(rows, 1)
    take(store, rows[0])
    assert names(store) == digests(rows, 0)


def test_damage_on_arrival_is_fetched_again(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], tmp_path: Path
) -> None:
    answers = iter([b"x" * rows[0].size_bytes])

    def once(name: str, target: Path) -> bool:
        data = next(answers, None)
        return data is not None and bool(target.write_bytes(data))

    take(make(before=once), rows[0])
    assert fetched(tmp_path / "log") == [rows[0].sha256] * 2


@pytest.mark.parametrize("how", ["flipped", "short", "empty", "missing"])
def test_damage_in_the_store_names_the_file_and_leaves_nothing(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], corpus: Artifact, how: str
) -> None:
    digest = rows[2].sha256
    blob = Path(corpus.workspace.uri) / "blobs" / digest[:2] / digest
    data = bytearray(blob.read_bytes())
    blob.unlink()
    data[5000] ^= 1
    if how != "missing":
        blob.write_bytes({"flipped": data, "short": data[:5000], "empty": b""}[how])
    store = make()
    with pytest.raises(CorruptError, match=r"tokenize/0:train-00002\.tok") as caught:
        take(store, rows[2])
    assert f"blobs/{digest[:2]}/{digest}" in str(caught.value)
    assert caught.value.do
    assert names(store) == set()


def test_damage_on_this_disk_is_found_when_mapped_and_fetched_again(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], tmp_path: Path
) -> None:
    for mine in (make(), make()):  # the process that saw it whole, and one that did not
        take(mine, rows[0])
        path = mine.folder / rows[0].sha256
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
        take(mine, rows[0])
    assert fetched(tmp_path / "log") == [rows[0].sha256] * 3


def test_a_store_that_is_down_for_a_while_is_waited_for(
    make: Callable[..., ShardCache], rows: tuple[ShardInfo, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_FIRST_PAUSE_S", 0.01)
    failures = iter(range(4))

    def down(name: str, target: Path) -> None:
        if next(failures, None) is not None:
            raise StorageError("no answer") from ConnectionResetError("reset")

    take(make(before=down), rows[0])
    assert next(failures, None) is None


@pytest.mark.parametrize(("cause", "least_s"), [(ConnectionResetError("reset"), 0.3), (PermissionError("403"), 0.0)])
def test_a_store_that_stays_down_or_refuses_ends_the_wait(
    make: Callable[..., ShardCache],
    rows: tuple[ShardInfo, ...],
    monkeypatch: pytest.MonkeyPatch,
    cause: Exception,
    least_s: float,
) -> None:
    monkeypatch.setattr(cache, "_FIRST_PAUSE_S", 0.05)
    tried = []

    def down(name: str, target: Path) -> None:
        tried.append(name)
        raise StorageError("no answer") from cause

    store = make(before=down, wait_s=0.3)
    began = time.monotonic()
    with pytest.raises(StorageError, match="no answer"):
        store.open(rows[0].entry, "x", {})
    assert time.monotonic() - began >= least_s
    assert (len(tried) > 1) == (least_s > 0)
    assert names(store) == set()


def test_a_full_disk_says_what_to_do_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    big = remote(publish(Workspace(str(tmp_path / "big")), [40_000, 40_000]), tmp_path / "log")
    rows = ShardIndex.of(big).shards
    store = ShardCache(big.workspace, 1 << 30, folder=small_disk / "cached")
    held = store.open(rows[0].entry, "x", {})
    with pytest.raises(DiskFullError, match="XDG_CACHE_HOME") as caught:
        store.open(rows[1].entry, "x", {})
    assert str(small_disk) in str(caught.value)
    held.close()
    assert names(store) == digests(rows, 0)
