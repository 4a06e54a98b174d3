"""This machine's copies of blobs: bounded, shared by processes, and there for as long as somebody needs their names."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from forge_ray import copies
from forge_ray.artifact import FileEntry, Workspace, cache_folder
from forge_ray.copies import Held
from forge_ray.errors import CorruptError, StorageError
from tests.unit.data.corpus import Before, RemoteFolder, fetched, until

fork = multiprocessing.get_context("fork")
SIZE = 1000


@pytest.fixture
def entries(tmp_path: Path) -> list[FileEntry]:
    """Eight blobs of a thousand bytes."""
    store = Workspace(str(tmp_path / "store"))
    return [store.put_bytes(f"{n}", bytes([n]) * SIZE) for n in range(8)]


@pytest.fixture
def make(tmp_path: Path, entries: list[FileEntry]) -> Callable[..., Held]:
    """Copies of that store within so many blobs."""

    def build(blobs: float = 3, before: Before = lambda name, target: None) -> Held:
        return Held(_remote(tmp_path, before), int(blobs * SIZE), tmp_path / "copies")

    return build


def _remote(tmp_path: Path, before: Before = lambda name, target: None) -> Workspace:
    workspace = Workspace(str(tmp_path / "store"), cache_bytes=3 * SIZE)
    workspace.storage = RemoteFolder(tmp_path / "store", tmp_path / "log", before)
    return workspace


def names(held: Held) -> set[str]:
    return {path.name for path in held.folder.iterdir()} - {copies._SPACE}


def digests(entries: list[FileEntry], *numbers: int) -> set[str]:
    return {entries[n].sha256 for n in numbers}


def test_what_was_used_least_recently_goes(make: Callable[..., Held], entries: list[FileEntry], tmp_path: Path) -> None:
    held = make()
    for n in (0, 1, 2, 0, 3):
        assert held.hold(entries[n], "x").read_bytes() == bytes([n]) * SIZE
    assert names(held) == digests(entries, 0, 2, 3)
    held.hold(entries[1], "x")
    assert names(held) == digests(entries, 0, 1, 3)
    assert fetched(tmp_path / "log") == [entries[n].sha256 for n in (0, 1, 2, 3, 1)]


def test_a_path_that_was_handed_out_stays_until_it_is_dropped(
    make: Callable[..., Held], entries: list[FileEntry]
) -> None:
    held = make()
    path = held.hold(entries[0], "x")
    for n in range(1, 8):
        make().hold(entries[n], "x")  # somebody else's
    assert path.read_bytes() == bytes(SIZE)
    assert names(held) == digests(entries, 0, 6, 7)
    del path
    for n in (1, 2, 3):
        held.hold(entries[n], "x")
    assert names(held) == digests(entries, 1, 2, 3)


def test_a_path_of_a_killed_process_is_let_go(
    make: Callable[..., Held], entries: list[FileEntry], tmp_path: Path
) -> None:
    held = make(blobs=1)

    def keep() -> None:
        path = held.hold(entries[0], "x")
        (tmp_path / "kept").touch()
        time.sleep(60)
        del path

    process = fork.Process(target=keep, daemon=True)
    process.start()
    until("the pin", (tmp_path / "kept").exists)
    held.hold(entries[1], "x")
    assert names(held) == digests(entries, 0, 1)
    process.kill()
    process.join()
    held.hold(entries[2], "x")
    assert names(held) == digests(entries, 2)


def test_an_open_file_is_read_to_its_end_though_its_name_is_gone(
    make: Callable[..., Held], entries: list[FileEntry]
) -> None:
    held = make(blobs=1)
    with held.hold(entries[0], "x").open("rb") as stream:
        held.hold(entries[1], "x")
        assert names(held) == digests(entries, 1)
        assert stream.read() == bytes(SIZE)


def test_what_is_larger_than_the_bound_is_had_and_goes_next(
    make: Callable[..., Held], entries: list[FileEntry]
) -> None:
    """To refuse would end a task that needs two files at once; the bound is kept again as soon as they are let go."""
    held = make(blobs=0.5)
    paths = [held.hold(entry, "x") for entry in entries[:3]]
    assert [path.read_bytes() for path in paths] == [bytes([n]) * SIZE for n in range(3)]
    paths.clear()
    held.hold(entries[3], "x")
    assert names(held) == digests(entries, 3)


def test_processes_fetch_a_blob_once_and_none_loses_what_it_reads(
    make: Callable[..., Held], entries: list[FileEntry], tmp_path: Path
) -> None:
    """Six processes read eight blobs where there is room for three; each compares what it opens by name."""

    def read(seed: int) -> None:
        mine = make()
        for turn in range(40):
            n = (turn * (seed + 1)) % 8
            path = mine.hold(entries[n], "x")
            time.sleep(0.001)
            assert path.read_bytes() == bytes([n]) * SIZE

    processes = [fork.Process(target=read, args=(seed,), daemon=True) for seed in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    # What was beyond the bound while all of it was read goes with the next fetch.
    make().hold(next(entry for entry in entries if entry.sha256 not in names(make())), "x")
    assert len(names(make())) <= 3

    shutil.rmtree(tmp_path / "copies")
    (tmp_path / "log").unlink()
    slow = [make(before=lambda name, target: time.sleep(0.1)) for _ in range(6)]
    threads = [threading.Thread(target=held.hold, args=(entries[0], "x")) for held in slow]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(fetched(tmp_path / "log")) == {entries[0].sha256: 1}


def test_a_workspace_hands_out_bounded_copies_and_its_pickle_keeps_the_bound(
    entries: list[FileEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    workspace = _remote(tmp_path)
    for entry in entries:
        assert len(workspace.verified(entry, "x").read_bytes()) == SIZE
    assert len([p for p in cache_folder("blobs").iterdir() if not p.name.startswith(".")]) == 3
    assert pickle.loads(pickle.dumps(Workspace("memory://x", 7))).cache_bytes == 7
    path = workspace.verified(entries[0], "x")
    assert pickle.loads(pickle.dumps(path)) == path
    shutil.rmtree(cache_folder("blobs"))  # as anybody may, at any time
    assert workspace.verified(entries[0], "x").read_bytes() == bytes(SIZE)


def test_a_damaged_copy_is_fetched_again_and_a_damaged_blob_named(
    make: Callable[..., Held], entries: list[FileEntry], tmp_path: Path
) -> None:
    held = make()
    held.hold(entries[0], "x")
    copy = held.folder / entries[0].sha256
    copy.chmod(0o644)
    copy.write_bytes(b"\1" * SIZE)
    assert held.hold(entries[0], "x").read_bytes() == bytes(SIZE)
    blob = tmp_path / "store" / "blobs" / entries[1].sha256[:2] / entries[1].sha256
    blob.chmod(0o644)
    blob.write_bytes(b"\0" * SIZE)
    with pytest.raises(CorruptError, match="ingest/1:part") as caught:
        held.hold(entries[1], "ingest/1:part")
    assert entries[1].sha256 in caught.value.got
    blob.unlink()
    with pytest.raises(CorruptError, match="missing"):
        held.hold(entries[1], "ingest/1:part")
    assert names(held) == digests(entries, 0)


def test_a_store_that_does_not_answer_is_an_error_and_leaves_nothing(
    make: Callable[..., Held], entries: list[FileEntry]
) -> None:
    def down(name: str, target: Path) -> None:
        target.write_bytes(b"half")
        raise StorageError("no answer")

    held = make(before=down)
    with pytest.raises(StorageError, match="no answer"):
        held.hold(entries[0], "x")
    assert names(held) == set()


def test_no_descriptor_is_left_behind(make: Callable[..., Held], entries: list[FileEntry]) -> None:
    held = make()
    held.hold(entries[0], "x")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for entry in entries:
            held.hold(entry, "x")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_default_bound_is_a_part_of_the_disk(tmp_path: Path) -> None:
    disk = shutil.disk_usage(tmp_path).total
    assert copies.default_limit_bytes(tmp_path) == min(20 << 30, disk // 4)
