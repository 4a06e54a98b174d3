"""Bytes at a URI, in a folder and on an object store: whole or not at all, first come first served, useful errors."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError, DiskFullError, NotFoundError, StorageError
from forge_ray.storage import Storage, open_filesystem
from forge_ray.stores import split_uri

# Eight forked children wait at a pipe, then try to create the same 40 names; each prints how often it was the first.
_RACE = """
import os, sys
from forge_ray.storage import Storage
storage, (start, go) = Storage(sys.argv[1]), os.pipe()
children = []
for number in range(8):
    if not (child := os.fork()):
        os.close(go)
        os.read(start, 1)
        won = [n for n in range(40) if storage.create(f"race/{n}", b"%d" % number * 5000)]
        os.write(1, b"%d:%s\\n" % (number, ",".join(map(str, won)).encode()))
        os._exit(0)
    children.append(child)
os.close(start)
os.close(go)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""

# Dies as by the OOM killer, at the moment at which the bytes are on disk but not yet published.
_DIES = """
import os, signal, sys
from forge_ray.storage import Storage
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
os.replace = os.link = die
storage = Storage(sys.argv[1])
getattr(storage, sys.argv[2])("kept/name", b"new" * 1000)
"""


@pytest.fixture
def storage(store_uri: str) -> Storage:
    return Storage(store_uri)


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "store"))


# ---------------------------------------------------------------------------------------------------------- both stores


def test_what_was_written_is_read_listed_and_deleted(storage: Storage) -> None:
    storage.write("a/one", b"1")
    storage.write("a/b/two", b"22")
    storage.write("c", b"")
    assert storage.list("") == ["a/b/two", "a/one", "c"]
    assert storage.list("a") == ["a/b/two", "a/one"]
    assert (storage.read_bytes("a/b/two"), storage.size_bytes("a/b/two"), storage.read_bytes("c")) == (b"22", 2, b"")
    with storage.open_read("a/b/two") as stream:
        assert stream.read(1) == b"2"
    storage.write("a/one", b"other")
    assert storage.read_bytes("a/one") == b"other"
    storage.delete("a/one")
    storage.delete("a/one")
    assert storage.list("") == ["a/b/two", "c"]
    assert abs(storage.modified_s("c") - time.time()) < 60


def test_create_publishes_only_under_a_free_name(storage: Storage) -> None:
    assert storage.create("a/one", b"first")
    assert not storage.create("a/one", b"second")
    assert storage.read_bytes("a/one") == b"first"
    assert storage.list("") == ["a/one"]


def test_put_file_keeps_what_is_there_and_leaves_its_source(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for content in (b"first", b"other"):
        source.write_bytes(content)
        storage.put_file("a/one", source)
    assert source.read_bytes() == b"other"
    storage.fetch("a/one", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"first"


def test_a_folder_does_not_exist_as_a_name(storage: Storage) -> None:
    storage.write("a/one", b"1")
    assert storage.exists("a/one")
    assert not storage.exists("a")
    assert not storage.exists("a/two")
    assert storage.list("b") == []


def test_what_is_missing_is_not_found_and_names_the_place(storage: Storage, tmp_path: Path) -> None:
    readings = [
        storage.read_bytes,
        storage.size_bytes,
        storage.modified_s,
        lambda n: storage.fetch(n, tmp_path / "x"),
        lambda n: storage.open_read(n).__enter__(),
    ]
    for reading in readings:
        with pytest.raises(NotFoundError) as caught:
            reading("no/such")
        assert caught.value.got == f"{storage.uri}/no/such"
    assert not (tmp_path / "x").exists()


def test_a_storage_travels_to_other_processes(storage: Storage) -> None:
    storage.write("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


def test_an_error_while_a_blob_is_built_passes_through_and_leaves_nothing(storage: Storage) -> None:
    paths = []

    def build(error: Exception) -> None:
        with storage.scratch_file() as path:
            path.write_bytes(b"half")
            paths.append(path)
            raise error

    for error in (ValueError("not a document"), FileNotFoundError(errno.ENOENT, "no such document")):
        with pytest.raises(type(error), match="document"):
            build(error)
    assert [path for path in paths if path.exists()] == []
    assert storage.list("") == []
    assert storage.temporaries() == []


@pytest.mark.parametrize("uri", ["nosuchscheme://bucket/x", "s4://bucket"])
def test_an_unknown_scheme_is_refused_with_what_is_known(uri: str) -> None:
    for use in (lambda s: s.exists("a"), lambda s: s.write("a", b""), lambda s: s.list("")):
        with pytest.raises(StorageError) as caught:
            use(Storage(uri))
        assert caught.value.got == uri
        assert "s3://" in caught.value.wanted


# ---------------------------------------------------------------------------------------------------------- a folder


def test_of_eight_racing_processes_exactly_one_creates_each_name(folder: Storage) -> None:
    words = [sys.executable, "-c", _RACE, folder.uri]
    raced = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    winner = {}
    for line in raced.stdout.splitlines():
        number, _, names = line.partition(":")
        for name in filter(None, names.split(",")):
            assert winner.setdefault(name, number) == number
    assert len(winner) == 40
    for name, number in winner.items():
        assert folder.read_bytes(f"race/{name}") == number.encode() * 5000
    assert folder.temporaries() == []


@pytest.mark.parametrize("verb", ["write", "create"])
def test_a_writer_that_is_killed_leaves_nothing_visible(folder: Storage, verb: str) -> None:
    if verb == "write":
        folder.write("kept/name", b"old")
    died = subprocess.run([sys.executable, "-c", _DIES, folder.uri, verb], capture_output=True, timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert [path.stat().st_size for path in folder.temporaries()] == [3000]
    assert folder.list("") == (["kept/name"] if verb == "write" else [])
    assert verb == "create" or folder.read_bytes("kept/name") == b"old"
    assert folder.create("kept/name", b"again") == (verb == "create")


def test_published_files_cannot_be_written_by_mistake(folder: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"1")
    folder.put_file("blob", tmp_path / "source")
    assert not folder.local_path("blob").stat().st_mode & 0o222


@pytest.mark.parametrize("store_uri", ["object store"], indirect=True)
def test_a_blob_of_another_size_on_an_object_store_is_overwritten(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"whole")
    storage.write("blob", b"who")
    storage.put_file("blob", tmp_path / "source")
    assert storage.read_bytes("blob") == b"whole"


def test_storing_a_blob_again_makes_it_young_again(folder: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"1")
    folder.put_file("blob", tmp_path / "source")
    os.utime(folder.local_path("blob"), (1, 1))
    folder.put_file("blob", tmp_path / "source")
    assert time.time() - folder.modified_s("blob") < 60


def test_file_uris_and_paths_are_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage(f"file://{tmp_path}/ws").write("a", b"1")
    monkeypatch.chdir(tmp_path)
    assert Storage("ws").read_bytes("a") == b"1"
    assert Storage("ws").uri == str(tmp_path / "ws")


def test_without_hard_links_a_taken_name_is_still_refused(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    assert folder.create("a", b"first")
    assert not folder.create("a", b"second")
    assert folder.read_bytes("a") == b"first"
    assert folder.temporaries() == []


@pytest.mark.parametrize("blocked", ["file in the way", "read-only"])
def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path, blocked: str) -> None:
    if blocked == "read-only":
        tmp_path.chmod(0o500)
        if os.access(tmp_path, os.W_OK):
            pytest.skip("root may write anywhere")
    else:
        (tmp_path / "store").write_bytes(b"a file")
    storage = Storage(str(tmp_path / "store"))
    with pytest.raises(StorageError) as caught:
        storage.write("a/b", b"1")
    assert str(tmp_path / "store") in caught.value.got
    assert caught.value.do


# -------------------------------------------------------------------------------------------------------- a full disk


def _fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as sink, contextlib.suppress(OSError):
        while True:
            sink.write(bytes(4096))


def test_a_disk_that_is_full_publishes_nothing_and_goes_on_once_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    storage = Storage(str(small_disk / "store"))
    storage.write("kept", b"old")
    _fill(small_disk)
    (tmp_path / "big").write_bytes(bytes(100_000))
    attempts = [
        lambda: storage.write("kept", bytes(100_000)),
        lambda: storage.create("new", bytes(100_000)),
        lambda: storage.put_file("blob", tmp_path / "big"),
        lambda: _build(storage, 100_000),
        lambda: storage.fetch("kept", small_disk / "copy"),
    ]
    for attempt in attempts:
        with pytest.raises(DiskFullError) as caught:
            attempt()
        assert str(small_disk) in caught.value.got
        assert "forge gc" in caught.value.do
    assert storage.list("") == ["kept"]
    assert storage.read_bytes("kept") == b"old"
    assert storage.temporaries() == []
    (small_disk / "filler").unlink()
    assert storage.create("new", bytes(100_000))


def _build(storage: Storage, num_bytes: int) -> None:
    with storage.scratch_file() as path, path.open("wb") as sink:
        sink.write(bytes(num_bytes))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("verb", ["write", "create", "put_file"])
def test_a_write_that_runs_out_of_space_leaves_no_trace(
    folder: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, code: int
) -> None:
    def full(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "source").write_bytes(b"new")
    folder.write("taken", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        getattr(folder, verb)("fresh", tmp_path / "source" if verb == "put_file" else b"new")
    with pytest.raises(DiskFullError):
        folder.write("taken", b"new")
    monkeypatch.undo()
    assert folder.list("") == ["taken"]
    assert folder.read_bytes("taken") == b"old"
    assert folder.temporaries() == []


# ------------------------------------------------------------------------------------------- versions, ranges, listings


def test_a_swap_wants_the_version_that_was_read(storage: Storage) -> None:
    storage.write("ref", b"one")
    data, version = storage.read_versioned("ref")
    assert data == b"one"
    assert storage.swap("ref", b"two", version)
    assert not storage.swap("ref", b"three", version)
    assert not storage.swap("none", b"three", version)
    assert storage.read_bytes("ref") == b"two"
    assert storage.list("") == ["ref"]


def test_swaps_of_many_processes_lose_no_update(folder: Storage) -> None:
    folder.create("refs/counter", b"0")
    done = subprocess.run([sys.executable, "-c", _COUNT, folder.uri], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert folder.read_bytes("refs/counter") == b"120"
    assert (folder.list(""), folder.temporaries()) == (["refs/counter"], [])


_COUNT = """
import os, sys
from forge_ray.storage import Storage
storage, children = Storage(sys.argv[1]), []
for number in range(6):
    if not (child := os.fork()):
        for _ in range(20):
            while True:
                data, version = storage.read_versioned("refs/counter")
                if storage.swap("refs/counter", b"%d" % (int(data) + 1), version):
                    break
        os._exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_ranges_end_where_the_content_ends(storage: Storage) -> None:
    storage.write("a", b"0123456789")
    found = [storage.read_range("a", start, length) for start, length in ((0, 3), (8, 9), (10, 1), (3, 0))]
    assert found == [b"012", b"89", b"", b""]
    with storage.open_read("a") as stream:
        stream.seek(-3, os.SEEK_END)
        assert stream.read() == b"789"


def test_a_listing_says_what_a_look_at_each_name_would(storage: Storage) -> None:
    storage.write("a/one", b"1")
    storage.write("a/two", b"22")
    listed = storage.listing("a")
    assert [(row.name, row.size_bytes) for row in listed] == [("a/one", 1), ("a/two", 2)]
    assert [row.version for row in listed] == [storage.read_versioned(row.name)[1] for row in listed]
    assert [row.modified_s for row in listed] == [storage.modified_s(row.name) for row in listed]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hidden@bucket/x",
        "s3://hidden@bucket",
        "gs://hidden@bucket/x",
        "abfs://user:hidden@account.dfs.core.windows.net/x",
        "abfs://container@account.dfs.core.windows.net/x?sig=hidden",
        "https://user:hidden@host/list",
    ],
)
def test_a_uri_with_credentials_is_refused_and_not_shown(uri: str) -> None:
    for use in (Storage, open_filesystem):
        with pytest.raises(ConfigError) as caught:
            use(uri)
        assert "hidden@" not in str(caught.value)
        assert "sig=" not in str(caught.value)
        assert "environment" in caught.value.do


def test_a_container_may_name_its_account() -> None:
    assert split_uri("abfs://data@acme.dfs.core.windows.net/a/b/") == ("abfs", "data", "a/b")
    assert split_uri("s3://bucket") == ("s3", "bucket", "")
    assert Storage("gs://bucket/a/").uri == "gs://bucket/a"


def test_a_uri_without_a_bucket_is_refused() -> None:
    with pytest.raises(StorageError) as caught:
        Storage("s3:///x").read_bytes("a")
    assert "bucket" in caught.value.what
