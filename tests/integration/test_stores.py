"""`Storage` and `Workspace` on real S3, GCS and Azure servers: races, faults, outages, and who may come in."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_ray import garbage, retry, storage, stores
from forge_ray.artifact import Manifest, Workspace
from forge_ray.doctor import _store
from forge_ray.errors import ArtifactError, CorruptError, NotFoundError, StorageError
from forge_ray.storage import Storage
from tests.integration.stores import (
    ELSEWHERE,
    SERVERS,
    Faults,
    Server,
    clean_environment,
    free_ports,
    reach,
    running,
)

ROOT = Path(__file__).parents[2]
BIG_BYTES = (40 << 20) + 12_345  # three parts, the last one short

# Eight forked children wait at a pipe, then do the same at once; each prints one line.
_RACE = """
import importlib, os, sys
from forge_ray.storage import Storage
importlib.import_module({"s3": "s3fs", "gs": "gcsfs.core", "abfs": "adlfs"}[sys.argv[1].partition(":")[0]])
storage, (start, go) = Storage(sys.argv[1]), os.pipe()
def create(number):
    return ",".join(str(n) for n in range(5) if storage.create(f"race/{n}", b"%d" % number * 5000))
def count(number):
    for _ in range(5):
        while True:
            data, version = storage.read_versioned("counter")
            if storage.swap("counter", b"%d" % (int(data) + 1), version):
                break
    return ""
children = []
for number in range(8):
    if not (child := os.fork()):
        os.close(go)
        os.read(start, 1)
        os.write(1, f"{number}:{globals()[sys.argv[2]](number)}\\n".encode())
        os._exit(0)
    children.append(child)
os.close(start)
os.close(go)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="session", params=list(SERVERS))
def server(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    """A running store of each kind, and the URI of its bucket."""
    with running(request.param, "forge-test") as found:
        yield found


@pytest.fixture
def store(server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An empty root on it."""
    reach(server[0], monkeypatch)
    return Storage(f"{server[1]}/{uuid.uuid4().hex}")


@pytest.fixture
def proxied(server: tuple[Server, str]) -> Server:
    """The store itself, to be hurt."""
    return server[0]


@pytest.fixture
def big(tmp_path: Path) -> tuple[Path, str]:
    """A file of several parts and its SHA-256."""
    path = tmp_path / "big"
    path.write_bytes(random.Random(7).randbytes(BIG_BYTES))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _race(store: Storage, what: str) -> list[str]:
    environment = clean_environment() | {n: v for n, v in os.environ.items() if n.startswith(ELSEWHERE)}
    words = [sys.executable, "-c", _RACE, store.uri, what]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


# -------------------------------------------------------------------------------------------------------- one operation


def test_names_are_listed_in_pages_with_size_time_and_version(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a/{number:02d}" for number in range(16)] + ["ab/other", "b/ä %25#?+&=~.txt"]
    for number, name in enumerate(names):
        store.write(name, b"x" * number)
    monkeypatch.setattr(stores, "_PAGE", 5)
    assert store.list("") == sorted(names)
    assert store.list("a") == names[:16]
    assert store.list("nothing") == []
    for listed in store.listing("b") + store.listing("a")[:2]:
        data, version = store.read_versioned(listed.name)
        assert (listed.size_bytes, listed.version) == (len(data), version)
        assert abs(listed.modified_s - time.time()) < 60
        assert listed.modified_s == pytest.approx(store.modified_s(listed.name), abs=1)


def test_a_deleted_name_is_gone_from_reads_and_listings_at_once(store: Storage) -> None:
    store.write("a/one", b"1")
    _, version = store.read_versioned("a/one")
    assert store.list("a") == ["a/one"]
    store.delete("a/one")
    store.delete("a/one")
    assert store.list("a") == []
    assert not store.exists("a/one")
    readings = [store.read_bytes, store.size_bytes, store.modified_s, lambda n: store.read_range(n, 0, 1)]
    for reading in [*readings, lambda n: store.open_read(n).__enter__()]:
        with pytest.raises(NotFoundError) as caught:
            reading("a/one")
        assert caught.value.got == f"{store.uri}/a/one"
    assert not store.swap("a/one", b"2", version)
    assert not store.exists("a/one")


def test_ranges_are_what_was_asked_for_and_no_more_is_read(store: Storage, proxied: Server) -> None:
    data = random.Random(1).randbytes(3 << 20)
    store.write("blob", data)
    for start, length in (
        (0, 10),
        (1 << 20, 1 << 20),
        (len(data) - 5, 100),
        (len(data), 10),
        (len(data) + 9, 1),
        (5, 0),
    ):
        assert store.read_range("blob", start, length) == data[start : start + length]
    with store.open_read("blob") as stream:
        stream.seek(-4, os.SEEK_END)
        assert stream.read() == data[-4:]
        stream.seek(1000)
        assert stream.read(7) == data[1000:1007]
    store.write("empty", b"")
    assert store.read_range("empty", 0, 10) == store.read_bytes("empty") == b""


def test_a_large_file_travels_in_parts_and_arrives_whole(
    store: Storage, big: tuple[Path, str], proxied: Server
) -> None:
    path, sha256 = big
    with proxied.proxy.injecting(Faults()) as seen:
        store.put_file("blobs/big", path, sha256)
    assert sum(method in ("PUT", "POST") for method, _, _ in seen) >= 4
    assert store.size_bytes("blobs/big") == BIG_BYTES
    store.fetch("blobs/big", path.with_name("copy"))
    assert _sha256(path.with_name("copy")) == sha256
    with store.open_read("blobs/big") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == sha256


def test_a_blob_that_is_there_is_not_sent_again_and_a_damaged_one_is_healed(
    store: Storage, tmp_path: Path, proxied: Server
) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"right" * 1000)
    sha256 = _sha256(path)
    store.put_file("blob", path, sha256)
    with proxied.proxy.injecting(Faults()) as seen:
        store.put_file("blob", path, sha256)
    assert [method for method, _, _ in seen] in (["HEAD"], ["GET"])
    for wrong in (b"wrong" * 1000, b"short"):
        store.write("blob", wrong)
        store.put_file("blob", path, sha256)
        assert store.read_bytes("blob") == path.read_bytes()


def test_a_blob_that_is_stored_again_is_young_again_under_its_readers(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "blob"
    path.write_bytes(random.Random(2).randbytes(200_000))
    store.put_file("blob", path, _sha256(path))
    before = store.modified_s("blob")
    monkeypatch.setattr(storage, "_YOUNG_S", -1.0)
    monkeypatch.setattr(storage, "_READ_AHEAD_BYTES", 1000)
    with store.open_read("blob") as stream:
        first = stream.read(5000)
        time.sleep(1.1)  # S3 and Azure count whole seconds
        store.put_file("blob", path, _sha256(path))
        assert store.modified_s("blob") > before
        assert first + stream.read() == path.read_bytes()
    with _no_upload(monkeypatch):
        store.put_file("blob", path, _sha256(path))  # its note of the SHA-256 has survived
    assert store.read_bytes("blob") == path.read_bytes()


@contextlib.contextmanager
def _no_upload(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is uploaded inside the block."""

    def refuse(*args: object) -> None:
        raise AssertionError("uploaded again")

    with monkeypatch.context() as patch:
        patch.setattr("forge_ray.objects.Store.put_file", refuse)
        yield


def test_a_reader_whose_object_is_replaced_is_told_so(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_READ_AHEAD_BYTES", 1000)
    store.write("blob", b"a" * 5000)
    with store.open_read("blob") as stream:
        assert stream.read(1000) == b"a" * 1000
        store.write("blob", b"b" * 5000)
        with pytest.raises(StorageError, match="replaced while it was read"):
            stream.read()


def test_a_store_works_on_in_a_fork_and_in_many_threads(store: Storage) -> None:
    store.write("a", b"1")
    if not (child := os.fork()):
        os._exit(0 if store.read_bytes("a") == b"1" and pickle.loads(pickle.dumps(store)).list("") == ["a"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(store.read_bytes("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"1"] * 8


# ---------------------------------------------------------------------------------------------------------------- races


@pytest.mark.parametrize("lost_frac", [0.0, 0.3])
def test_of_eight_racing_creators_one_wins_each_name(store: Storage, proxied: Server, lost_frac: float) -> None:
    with proxied.proxy.injecting(Faults(lost_frac=lost_frac, seed=3, only=lambda m, _: m in ("PUT", "POST"))) as seen:
        lines = _race(store, "create")
    winners = {name: line.partition(":")[0] for line in lines for name in line.partition(":")[2].split(",") if name}
    assert sum(len(line.partition(":")[2].split(",")) for line in lines if line.partition(":")[2]) == 5
    assert {name: store.read_bytes(f"race/{name}") for name in "01234"} == {
        name: winners[name].encode() * 5000 for name in "01234"
    }
    assert bool(lost_frac) == any(fault for _, _, fault in seen)


def test_swaps_of_eight_processes_lose_no_update(store: Storage, proxied: Server) -> None:
    store.create("counter", b"0")
    with proxied.proxy.injecting(Faults(unavailable_frac=0.05, reset_frac=0.05, seed=4)):
        _race(store, "count")
    assert store.read_bytes("counter") == b"40"


def test_an_outdated_version_swaps_nothing(store: Storage) -> None:
    store.write("ref", b"one")
    _, version = store.read_versioned("ref")
    assert store.swap("ref", b"two", version)
    assert not store.swap("ref", b"three", version)
    assert store.read_bytes("ref") == b"two"


# --------------------------------------------------------------------------------------------------------------- faults


def test_busy_resetting_and_truncating_stores_are_asked_again(
    store: Storage, big: tuple[Path, str], proxied: Server
) -> None:
    path, sha256 = big
    faults = Faults(unavailable_frac=0.15, reset_frac=0.1, lost_frac=0.1, cut_frac=0.15, seed=5)
    with proxied.proxy.injecting(faults) as seen:
        store.put_file("big", path, sha256)
        store.fetch("big", path.with_name("copy"))
        for number in range(10):
            assert store.create(f"small/{number}", b"%d" % number * 3000)
            assert not store.create(f"small/{number}", b"other")
        version = store.read_versioned("small/0")[1]
        assert store.swap("small/0", b"swapped", version)
        assert store.list("small") == [f"small/{number}" for number in range(10)]
        store.delete("small/9")
    assert _sha256(path.with_name("copy")) == sha256
    assert store.read_bytes("small/8") == b"8" * 3000
    assert store.read_bytes("small/0") == b"swapped"
    assert not store.exists("small/9")
    assert {fault for _, _, fault in seen} == {"", "unavailable", "reset", "lost", "cut"}


def test_a_store_that_stays_away_is_given_up_in_time_and_leaves_nothing(
    store: Storage, big: tuple[Path, str], proxied: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "BUDGET_S", 1.5)
    store.write("kept", b"old")
    attempts = [
        lambda: store.read_bytes("kept"),
        lambda: store.write("kept", b"new"),
        lambda: store.create("new", b"new"),
        lambda: store.list(""),
    ]
    with proxied.proxy.injecting(Faults(unavailable_frac=1.0)):
        for attempt in attempts:
            began = time.monotonic()
            with pytest.raises(StorageError) as caught:
                attempt()
            assert time.monotonic() - began < 6
            assert caught.value.got.startswith(store.uri)
            assert "run the same command again" in caught.value.do
    bodies = iter(range(100))
    breaks = Faults(unavailable_frac=1.0, only=lambda method, _: method in ("PUT", "POST") and next(bodies) >= 2)
    with proxied.proxy.injecting(breaks), pytest.raises(StorageError):
        store.put_file("big", *big)
    assert store.list("") == ["kept"]
    assert store.read_bytes("kept") == b"old"
    if proxied.scheme == "s3":
        uploads = store.store.run(store.store.fs._call_s3("list_multipart_uploads", Bucket="forge-test"))
        assert not [upload for upload in uploads.get("Uploads", []) if upload["Key"].startswith(store._prefix)]


def test_a_store_killed_in_the_middle_of_a_read_is_read_on_when_it_is_back(
    store: Storage, big: tuple[Path, str], proxied: Server
) -> None:
    path, sha256 = big
    store.put_file("big", path, sha256)
    digest = hashlib.sha256()
    time.sleep(proxied.settles_s)
    with store.open_read("big") as stream:
        digest.update(stream.read(10 << 20))
        proxied.kill()
        back = threading.Timer(1.0, proxied.start)
        back.start()
        while data := stream.read(1 << 20):
            digest.update(data)
        back.join()
    assert digest.hexdigest() == sha256


def test_a_store_killed_in_the_middle_of_a_write_gets_all_of_it_when_it_is_back(
    store: Storage, big: tuple[Path, str], proxied: Server
) -> None:
    path, sha256 = big
    time.sleep(proxied.settles_s)
    seen_parts = iter(range(1000))

    def second_part(method: str, _: str) -> bool:
        if method in ("PUT", "POST") and next(seen_parts) == 2:
            proxied.kill()
            threading.Timer(0.5, proxied.start).start()
        return False

    with proxied.proxy.injecting(Faults(only=second_part)):
        store.put_file("big", path, sha256)
    assert proxied.process is not None
    store.fetch("big", path.with_name("copy"))
    assert _sha256(path.with_name("copy")) == sha256
    assert store.list("") == ["big"]


# ----------------------------------------------------------------------------------------------------------- who may in


def test_refused_credentials_are_an_error_at_once(store: Storage, proxied: Server) -> None:
    store.write("a", b"1")
    for attempt in (lambda: store.read_bytes("a"), lambda: store.create("b", b""), lambda: store.list("")):
        began = time.monotonic()
        with proxied.proxy.injecting(Faults(denied_frac=1.0)) as seen, pytest.raises(StorageError) as caught:
            attempt()
        assert "permission denied" in caught.value.what
        assert "credentials" in caught.value.do
        assert len(seen) == 1
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("wrong", ["key", "none"])
def test_wrong_or_missing_credentials_are_named(
    store: Storage, proxied: Server, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    if proxied.scheme == "gs":
        pytest.skip("the emulator lets everybody in")
    store.write("a", b"1")
    if proxied.scheme == "s3":
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv(names[1], "not-the-secret") if wrong == "key" else [monkeypatch.delenv(n) for n in names]
    else:
        text = proxied.environment["AZURE_STORAGE_CONNECTION_STRING"]
        other = text.replace("AccountKey=", "AccountKey=AAAA")
        name = "AZURE_STORAGE_CONNECTION_STRING"
        monkeypatch.setenv(name, other) if wrong == "key" else monkeypatch.delenv(name)
    began = time.monotonic()
    type(store.store.fs).clear_instance_cache()
    try:
        with pytest.raises(StorageError) as caught:
            Storage(store.uri).read_bytes("a")
        assert time.monotonic() - began < 10
        assert store.uri in caught.value.got
        assert "forge doctor" in caught.value.do
        assert "not-the-secret" not in str(caught.value)
    finally:
        type(store.store.fs).clear_instance_cache()


def test_a_bucket_that_is_not_there_is_said_so(store: Storage) -> None:
    missing = Storage(store.uri.replace("forge-test", "forge-nowhere", 1))
    for attempt in (lambda: missing.list(""), lambda: missing.write("a", b""), lambda: missing.create("a", b"")):
        with pytest.raises(StorageError, match="does not exist"):
            attempt()


def test_nobody_at_the_endpoint_is_an_error_within_the_budget(
    store: Storage, proxied: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in proxied.environment.items():
        monkeypatch.setenv(name, value.replace(f":{proxied.proxy.port}", f":{free_ports(1)[0]}"))
    monkeypatch.setattr(retry, "BUDGET_S", 1.0)
    type(store.store.fs).clear_instance_cache()
    try:
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            Storage(store.uri).read_bytes("a")
        assert time.monotonic() - began < 6
        assert "check the network and the endpoint" in caught.value.do
    finally:
        type(store.store.fs).clear_instance_cache()


def test_doctor_says_what_it_finds_and_no_secret(store: Storage, proxied: Server) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}[proxied.scheme]
    check = _store(proxied.scheme, package)
    assert check.ok
    wanted = {"s3": "key from AWS_ACCESS_KEY_ID", "gs": "emulator", "abfs": "AZURE_STORAGE_CONNECTION_STRING"}
    assert wanted[proxied.scheme] in check.found
    assert (proxied.scheme == "abfs") or f"127.0.0.1:{proxied.proxy.port}" in check.found
    assert "secret" not in check.found
    assert "AccountKey" not in check.found


# ------------------------------------------------------------------------------------------------------------ workspace


def _published(workspace: Workspace, data: bytes, fingerprint: str = "0123456789abcdef") -> Manifest:
    entry = workspace.put_bytes("part/one.txt", data)
    return Manifest(stage="ingest", fingerprint=fingerprint, files=(entry,))


def test_a_workspace_goes_all_the_way_round(store: Storage, tmp_path: Path) -> None:
    workspace = Workspace(store.uri)
    artifact = workspace.publish(_published(workspace, b"content"))
    again = pickle.loads(pickle.dumps(workspace))
    assert again.publish(artifact.manifest).manifest == artifact.manifest
    assert [again.resolve(name).ref for name in ("ingest", "0123", artifact.ref)] == [artifact.ref] * 3
    assert again.get(artifact.ref).read_bytes("part/one.txt") == b"content"
    folder = again.get(artifact.ref).materialize(tmp_path / "folder")
    assert (folder / "part/one.txt").read_bytes() == b"content"
    loose = workspace.put_bytes("loose", b"nobody refers to it")
    found = garbage.find(workspace, grace_s=-5.0)
    assert [(name.rpartition("/")[2], size) for name, size in found] == [(loose.sha256, loose.size_bytes)]
    garbage.delete(workspace, found)
    assert garbage.find(workspace, grace_s=-5.0) == []
    assert Workspace(store.uri).get(artifact.ref).read_bytes("part/one.txt") == b"content"


def test_a_damaged_remote_blob_is_found_and_healed(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(store.uri)
    artifact = workspace.publish(_published(workspace, b"content"))
    (blob,) = store.list("blobs")
    store.write(blob, b"c0ntent")
    with pytest.raises(CorruptError) as caught:
        Workspace(store.uri).get(artifact.ref).read_bytes("part/one.txt")
    assert blob in caught.value.got
    workspace.put_bytes("part/one.txt", b"content")
    assert Workspace(store.uri).get(artifact.ref).read_bytes("part/one.txt") == b"content"


def test_a_ref_moves_only_from_what_its_mover_saw(store: Storage) -> None:
    workspace = Workspace(store.uri)
    assert workspace.set_ref("legal/production", "export/1", expected="") == ""
    assert workspace.set_ref("legal/production", "export/2", expected="export/1") == "export/1"
    with pytest.raises(ArtifactError) as caught:
        workspace.set_ref("legal/production", "export/3", expected="export/1")
    assert "export/2" in caught.value.got
    assert workspace.set_ref("legal/production", "export/4") == "export/2"
    assert store.read_bytes("refs/legal/production") == b"export/4"
