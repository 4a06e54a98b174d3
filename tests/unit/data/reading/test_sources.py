"""Listing and opening the files of folders and stores, good and bad."""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray import retry
from forge_ray.config import FilesSource, IngestConfig
from forge_ray.data.reading import formats, sources, unpack
from forge_ray.data.reading.formats import Document
from forge_ray.errors import DataError, StorageError
from forge_ray.stores import Other


def files(uri: str | Path) -> FilesSource:
    return FilesSource(kind="files", uri=str(uri))


def read(uri: str | Path, **config: Any) -> list[str]:
    """What arrives, in order: `key: text` or `key: <kind>`."""
    source = files(uri)
    unit = pickle.loads(pickle.dumps(formats.unit(source, formats.listing(source))))
    return [
        f"{item.key}: {item.text}" if isinstance(item, Document) else f"{Path(item.source).name}: <{item.kind}>"
        for item in formats.read(unit, IngestConfig(**config))
    ]


def test_rows_are_sorted_and_say_size_and_state(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "bb"), ("a.md", "a"), ("sub/c.txt", ""), ("sub.txt", "x"), ("d.png", "no")):
        (tmp_path / name).write_text(text)
    rows = formats.listing(files(tmp_path))
    assert [(row["key"], row["size"]) for row in rows] == [("a.md", 1), ("b.txt", 2), ("sub.txt", 1), ("sub/c.txt", 0)]
    assert rows[1]["state"] == str((tmp_path / "b.txt").stat().st_mtime_ns)
    assert formats.listing(files(f"{tmp_path}/")) == rows
    assert formats.listing(files(f"file://{tmp_path}")) == rows


def test_an_edit_that_keeps_the_size_changes_the_state(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    os.utime(tmp_path / "a.txt", (1000, 1000))
    before = formats.listing(files(tmp_path))
    os.utime(tmp_path / "a.txt", (1000, 1000.5))
    assert formats.listing(files(tmp_path)) != before


def test_a_state_of_a_store_follows_its_content() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/state-bucket/a.txt", b"one")
    before = formats.listing(files("memory://state-bucket"))
    fs.pipe_file("/state-bucket/a.txt", b"two")
    assert formats.listing(files("memory://state-bucket")) != before
    fs.rm("/state-bucket", recursive=True)


@pytest.mark.parametrize("uri", ["/no/such/folder-of-documents", "memory://no-such-bucket/x", "/dev/null/x"])
def test_a_source_that_is_not_there_is_named(uri: str) -> None:
    with pytest.raises(StorageError, match=uri):
        formats.listing(files(uri))


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match="gopher://documents"):
        formats.listing(files("gopher://documents"))


def test_a_folder_without_readable_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=str(tmp_path)) as caught:
        formats.listing(files(tmp_path))
    assert "1 other file" in str(caught.value)


def test_a_file_that_vanishes_after_the_listing_is_no_bad_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    unit = formats.unit(files(tmp_path), formats.listing(files(tmp_path)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(StorageError, match=r"a\.txt") as caught:
        list(formats.read(unit, IngestConfig()))
    assert "still there" in caught.value.do


class _Breaks(io.RawIOBase):
    """A file on a disk that fails."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return max(0, offset)

    def tell(self) -> int:
        return 0

    def readinto(self, buffer: Any) -> int:
        raise OSError(errno.EIO, "disk")


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "a.html",
        "a.jsonl",
        "a.parquet",
        "a.csv",
        "a.zip",
        "a.tar",
        "a.txt.gz",
        "a.jsonl.zst",
        "a.tar.zst",
        "a.tgz",
    ],
)
def test_an_error_of_reading_is_no_bad_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["text"]}), sink)
    (tmp_path / name).write_bytes(sink.getvalue())
    unit = formats.unit(files(tmp_path), formats.listing(files(tmp_path)))
    monkeypatch.setattr(os, "fdopen", lambda fd, *_, **__: os.close(fd) or _Breaks())
    with pytest.raises(StorageError) as caught:
        list(formats.read(unit, IngestConfig()))
    assert caught.value.got == str(tmp_path / name)


def test_what_is_no_regular_file_is_counted_and_never_opened(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("not for training")
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.txt").write_text("good")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.txt"))
        (folder / "file.txt").symlink_to(outside / "secret.txt")
        (folder / "self.txt").symlink_to("self.txt")
        (folder / "dangling.txt").symlink_to("nowhere")
        (folder / "linked").symlink_to(outside)
        (folder / "sub" / "loop").symlink_to(folder)
        (folder / "link-to-no-document").symlink_to(outside / "secret.txt")
        assert read(folder) == [
            "dangling.txt: <unreadable: symbolic link>",
            "file.txt: <unreadable: symbolic link>",
            "good.txt: good",
            "linked: <unreadable: symbolic link>",
            "pipe.txt: <unreadable: not a regular file>",
            "self.txt: <unreadable: symbolic link>",
            "socket.txt: <unreadable: not a regular file>",
            "loop: <unreadable: symbolic link>",
        ]


def test_a_source_that_is_itself_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "file.txt").symlink_to("real/a.txt")
    assert read(tmp_path / "folder") == ["a.txt: a"]
    assert read(tmp_path / "file.txt") == ["file.txt: a"]


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_a_file_has_become_since_it_was_listed_is_not_opened(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    unit = formats.unit(files(tmp_path), formats.listing(files(tmp_path)))
    path.unlink()
    os.mkfifo(path) if what == "pipe" else path.symlink_to("/etc/hostname")
    [item] = formats.read(unit, IngestConfig())
    assert item.kind == unpack.NO_FILE


def test_a_device_is_not_read(tmp_path: Path) -> None:
    """`/dev/zero` never ends."""
    unit = formats.unit(files("/dev/zero"), [{"name": "zero.txt", "key": "zero.txt", "size": 0, "state": ""}])
    [item] = formats.read(unit, IngestConfig())
    assert item.kind == unpack.NO_FILE


def test_files_and_folders_that_the_mode_forbids_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.txt").write_text("b")
    (tmp_path / "closed.txt").write_text("c")
    if os.geteuid() == 0:  # whom no mode forbids anything
        real = {"open": os.open, "scandir": os.scandir}

        def denied(name: str) -> Any:
            def call(path: Any, *args: Any) -> Any:
                if "/closed" in str(path):
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return real[name](path, *args)

            return call

        monkeypatch.setattr(sources.os, "open", denied("open"))
        monkeypatch.setattr(sources.os, "scandir", denied("scandir"))
    else:
        (tmp_path / "closed").chmod(0)
        (tmp_path / "closed.txt").chmod(0)
    found = read(tmp_path)
    assert found == [
        "a.txt: a",
        "closed: <unreadable: permission denied>",
        "closed.txt: <unreadable: permission denied>",
    ]


def test_a_name_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as sink:
        sink.write(b"text")
    rows = formats.listing(files(tmp_path))
    assert [row["key"].encode() for row in rows] == [b"caf\\xe9.txt"]
    assert read(tmp_path) == ["caf\\xe9.txt: <unreadable: name is not UTF-8>"]


def test_empty_files_make_empty_documents_or_none(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.csv", "d.html", "e.txt.gz", "f.txt.zst", "g.jsonl.gz"):
        (tmp_path / name).touch()
    assert read(tmp_path) == ["a.txt: ", "d.html: ", "e.txt.gz: ", "f.txt.zst: "]
    for name in ("h.zip", "i.tar", "j.parquet", "k.pdf", "l.docx"):
        (tmp_path / name).touch()
    assert sum("<unreadable" in line for line in read(tmp_path)) == 5


def test_many_tiny_files_cost_little_each_to_list(tmp_path: Path) -> None:
    """Bytes per row times a million must stay far below a worker's memory; time is linear by construction."""
    count = 1000
    for folder in range(4):
        (tmp_path / f"{folder}").mkdir()
        for i in range(count // 4):
            os.close(os.open(f"{tmp_path}/{folder}/{i:06d}.txt", os.O_CREAT))
    tracemalloc.start()
    rows = formats.listing(files(tmp_path))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count
    assert held / count < 600
    assert peak / count < 800


class _Flaky:
    """A store of which some reads fail, as the clients say it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: list[BaseException]) -> None:
        self.failures, self.asked, real = failures, [], Other._get

        async def get(store: Any, key: str, start: int, length: int | None) -> Any:
            self.asked.append((key, start))
            if len(self.asked) > 1 and self.failures:
                raise self.failures.pop(0)
            return await real(store, key, start, length)

        monkeypatch.setattr(Other, "_get", get)
        monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(sources, "_FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(retry, "BUDGET_S", 0.05)
        monkeypatch.setattr(sources, "_READ_AHEAD_BYTES", 4096)


@pytest.fixture
def bucket() -> Any:
    fs = fsspec.filesystem("memory")
    lines = [f'{{"text": "document {i} {"x" * 50}"}}' for i in range(1000)]
    fs.pipe_file("/flaky-bucket/a.jsonl", "\n".join(lines).encode())
    yield "memory://flaky-bucket"
    fs.rm("/flaky-bucket", recursive=True)


def test_a_store_that_dies_in_the_middle_and_comes_back_gives_each_document_once(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(bucket)
    flaky = _Flaky(monkeypatch, [ConnectionResetError(), TimeoutError(), retry.TruncatedError()] * 5)
    assert read(bucket, retry_s=20.0) == whole
    assert len(whole) == 1000
    assert not flaky.failures
    # It went on where it had stopped.
    assert [start for _, start in flaky.asked].count(0) == 1


def test_a_store_that_does_not_come_back_is_an_error_after_retry_s(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = _Flaky(monkeypatch, [ConnectionResetError() for _ in range(10_000)])
    with pytest.raises(StorageError, match="did not answer"):
        read(bucket, retry_s=0.2)
    assert len(flaky.asked) > 5


def test_what_does_not_pass_is_an_error_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = _Flaky(monkeypatch, [PermissionError("expired")] * 100)
    with pytest.raises(StorageError, match="permission denied"):
        read(bucket)
    assert len(flaky.asked) == 2


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_READ_AHEAD_BYTES", 4096)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/flaky-bucket/a.jsonl", b'{"text": "xxxx"}\n' * 200_000)
    unit = formats.unit(files(bucket), formats.listing(files(bucket)))
    items = formats.read(unit, IngestConfig())
    next(items)
    fs.pipe_file("/flaky-bucket/a.jsonl", fs.cat_file("/flaky-bucket/a.jsonl").replace(b"x", b"y"))
    with pytest.raises(StorageError, match="replaced"):
        list(items)


def test_small_objects_are_fetched_together_and_arrive_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    for i in range(300):
        fs.pipe_file(f"/small-bucket/{i:03d}.txt", f"text {i}".encode())
    fs.pipe_file("/small-bucket/empty.txt", b"")
    flaky = _Flaky(monkeypatch, [])
    found = read("memory://small-bucket")
    assert found == [f"{i:03d}.txt: text {i}" for i in range(300)] + ["empty.txt: "]
    assert len(flaky.asked) == 300
    fs.rm("/small-bucket", recursive=True)
