"""The files of a source: folders and object stores (`http_list.py` has lists of addresses).

Owns listing them at no request for each, what may be opened in a folder, and reading a file through a store that goes
away in the middle and comes back. Does not own what a request to a store is (`stores.py`) or what its errors mean
(`retry.py`).

In a folder only regular files are read. Symbolic links are not followed, whether to files or folders: whoever may
write one into a folder of documents could have `/etc` or a neighbour's home trained on, and a loop would have no end.
They are counted as skipped, like pipes, sockets, devices and what the mode forbids; name the target as a source of its
own. Only the source's own path may be, or lead through, a link.

A row of a listing is `{name, key, size, state}`; a `state` that begins with `!` is the kind of the skip that is due.
Cost, 2026-11, 80,000 files on a memory disk: 5 µs of CPU time and 300 bytes for each file of a folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from forge_ray.config import FilesSource, HttpSource, IngestConfig
from forge_ray.data.reading.documents import SUFFIXES, format_of
from forge_ray.data.reading.unpack import NO_FILE, Unreadable
from forge_ray.errors import DataError, StorageError
from forge_ray.retry import Meaning, as_storage_error, meaning
from forge_ray.storage import is_local, open_filesystem
from forge_ray.stores import Other, connect, split_uri

LINK, FORBIDDEN, NAME = "unreadable: symbolic link", "unreadable: permission denied", "unreadable: name is not UTF-8"
_T = TypeVar("_T")
_READ_AHEAD_BYTES = 8 << 20
_AT_ONCE = 32
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 8.0


@dataclass(frozen=True)
class File:
    """One file to read: `open` gives a buffered stream that can seek, unless `problem` says why it must not be."""

    key: str
    shown: str
    size_bytes: int
    open: Callable[[], contextlib.AbstractContextManager[Any]]
    problem: str = ""
    detail: str = ""
    content_type: str = ""
    charset: str = ""
    codec: str = ""
    name: str = ""
    """What tells its format, if that is not the key."""


def listing(source: FilesSource | HttpSource) -> list[dict[str, Any]]:
    """The source's files in the order of their names: name, key (its place below the source), size, state.

    Raises:
        StorageError: The source does not exist or cannot be listed.
        DataError: It holds no file of a known format.
    """
    if isinstance(source, HttpSource):
        from forge_ray.data.reading import http_list

        return http_list.listing(source)
    rows, others = _local_rows(source.uri) if is_local(source.uri) else _stored_rows(source.uri)
    if not rows:
        raise DataError(
            "the corpus is empty: the source holds no file that can be read",
            got=f"{source.uri} ({others} other files)",
            wanted=" ".join(SUFFIXES),
            do="point ingest.sources at the folder of the documents",
        )
    rows.sort(key=lambda row: row["name"])
    return rows


def unit(source: FilesSource | HttpSource, rows: Any) -> dict[str, Any]:
    """Some rows of a listing, with what `files` needs to read them; of plain values."""
    columns = (("names", "name"), ("keys", "key"), ("sizes", "size"), ("states", "state"))
    return {"source": source.model_dump_json(), **{many: [row[one] for row in rows] for many, one in columns}}


def described(unit: dict[str, Any]) -> FilesSource | HttpSource:
    """The source of a unit."""
    kind = HttpSource if json.loads(unit["source"])["kind"] == "http" else FilesSource
    return kind.model_validate_json(unit["source"])


def files(source: FilesSource | HttpSource, unit: dict[str, Any], config: IngestConfig) -> Iterator[File]:
    """The files of a unit, in its order. Each must be read before the next is asked for."""
    rows = list(zip(unit["names"], unit["keys"], unit["sizes"], unit["states"], strict=True))
    if isinstance(source, HttpSource):
        from forge_ray.data.reading import http_list

        yield from http_list.files(source, rows, config)
    elif is_local(source.uri):
        yield from _local_files(source.uri, rows)
    else:
        yield from _stored_files(source.uri, rows, config.retry_s)


def persist(action: Callable[[], _T], where: str, retry_s: float) -> _T:
    """What `action` gives, tried again with growing pauses while its store or server does not answer.

    Raises:
        StorageError: It failed for a reason that does not pass, or for `retry_s`.
    """
    began, pause_s = time.monotonic(), _FIRST_PAUSE_S
    while True:
        try:
            return action()
        except Unreadable:
            raise
        except Exception as error:
            waited_s = time.monotonic() - began
            if meaning(error) is not Meaning.PASSING or waited_s + pause_s > retry_s:
                if isinstance(error, StorageError):
                    raise
                raise as_storage_error(error, where, waited_s) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def refused(problem: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """An `open` of what must not be opened."""

    def open_() -> contextlib.AbstractContextManager[Any]:
        raise Unreadable(problem)

    return open_


# Folders.


def _local_rows(uri: str) -> tuple[list[dict[str, Any]], int]:
    root = open_filesystem(uri)[1]
    try:
        about = os.stat(root)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_source(uri) from None
    except OSError as error:
        raise _unlisted(uri, error) from error
    if not stat.S_ISDIR(about.st_mode):
        name = os.path.basename(root)
        found = [_row(name, about.st_size, _state(about))] if format_of(name) else []
        return found, 1 - len(found)
    try:
        os.scandir(root).close()
    except OSError as error:
        raise _unlisted(uri, error) from error
    rows, others, folders = [], 0, [""]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(f"{root}/{folder}")
        except OSError as error:
            rows.append(_row(folder.rstrip("/"), 0, f"!{_problem(error)}"))
            continue
        with entries:
            for entry in entries:
                key = folder + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{key}/")
                elif format_of(entry.name) or _links_to_folder(entry):
                    rows.append(_local_row(entry, key))
                else:
                    others += 1
    return rows, others


def _links_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself
        return False


def _local_row(entry: os.DirEntry[str], key: str) -> dict[str, Any]:
    try:
        key.encode()
    except UnicodeEncodeError:
        return _row(os.fsencode(key).decode("utf-8", "backslashreplace"), 0, f"!{NAME}")
    if entry.is_symlink():
        return _row(key, 0, f"!{LINK}")
    try:
        about = entry.stat(follow_symlinks=False)
    except OSError as error:
        return _row(key, 0, f"!{_problem(error)}")
    return _row(key, about.st_size, _state(about))


def _row(name: str, size: int, state: str) -> dict[str, Any]:
    return {"name": name, "key": name, "size": size, "state": state}


def _state(about: os.stat_result) -> str:
    return str(about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else f"!{NO_FILE}"


def _problem(error: OSError) -> str:
    return FORBIDDEN if error.errno in (errno.EACCES, errno.EPERM) else "unreadable: cannot be listed"


def _local_files(uri: str, rows: list[tuple[str, str, int, str]]) -> Iterator[File]:
    root = open_filesystem(uri)[1]
    single = not os.path.isdir(root)
    for name, key, size, state in rows:
        path = root if single else f"{root.rstrip('/')}/{name}"
        problem = state[1:] if state.startswith("!") else ""
        yield File(key, path, size, refused(problem) if problem else _Opener(path, follow=single), problem)


@dataclass(frozen=True)
class _Opener:
    """Opens a local file if it is a regular one; whatever it has become since it was listed, this does not hang."""

    path: str
    follow: bool

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if self.follow else os.O_NOFOLLOW)
        try:
            if not stat.S_ISREG(os.stat(self.path, follow_symlinks=self.follow).st_mode):
                raise Unreadable(NO_FILE)  # a device may act on being opened
            fd = os.open(self.path, flags)
        except PermissionError as error:
            raise Unreadable(FORBIDDEN, str(error.strerror)) from None
        except OSError as error:
            raise _unread(self.path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Unreadable(NO_FILE)
        except BaseException:
            os.close(fd)
            raise
        return io.BufferedReader(_Guarded(os.fdopen(fd, "rb", buffering=0), self.path), 1 << 20)


class _Guarded(io.RawIOBase):
    """A file whose errors of reading are `StorageError`, so that parsers' `OSError` can only mean torn content."""

    def __init__(self, stream: Any, source: str) -> None:
        self._stream, self._source = stream, source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except OSError as error:
            raise _unread(self._source, error) from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(self._stream.seek(offset, whence))
        except OSError as error:
            if error.errno == errno.EINVAL:  # before the start: a parser's mistake, or a file shorter than its format
                raise
            raise _unread(self._source, error) from error

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._stream.close()
        super().close()


# Object stores.


def _stored_rows(uri: str) -> tuple[list[dict[str, Any]], int]:
    store, prefix = _store(uri)
    folder = f"{prefix}/" if prefix else ""
    blobs = store.run(store.list(folder))
    if not blobs and prefix:
        # One request finds a file of that very name, and tells a missing bucket.
        parent = prefix.rpartition("/")[0]
        blobs = [blob for blob in store.run(store.list(prefix)) if blob.key == prefix]
        folder = f"{parent}/" if parent else ""
    if not blobs:
        raise _no_source(uri)
    found, others = [], 0
    for blob in blobs:
        key = blob.key.removeprefix(folder)
        if format_of(key):
            found.append(_row(key, blob.size_bytes, blob.version))
        else:
            others += 1
    return found, others


def _store(uri: str) -> tuple[Any, str]:
    return connect(uri), split_uri(uri)[2]


def _stored_files(uri: str, rows: list[tuple[str, str, int, str]], retry_s: float) -> Iterator[File]:
    store, prefix = _store(uri)
    single = len(rows) == 1 and prefix.rpartition("/")[2] == rows[0][0]
    folder = prefix[: -len(rows[0][0])] if single else f"{prefix}/" if prefix else ""
    if single:  # or a folder that holds one file of its own name
        with contextlib.suppress(StorageError):
            if not any(blob.key == prefix for blob in store.run(store.list(prefix))):
                folder = f"{prefix}/"
    for batch in _batches(rows):
        ahead = _fetched(store, [(folder + name, size) for name, _, size, _ in batch], retry_s)
        for (name, key, size, state), data in zip(batch, ahead, strict=True):
            where = store.where(folder + name)
            raw = _Ranges(store, folder + name, size, state, retry_s, data)
            yield File(key, where, size, lambda raw=raw: io.BufferedReader(raw, _READ_AHEAD_BYTES))


def _batches(rows: list[tuple[str, str, int, str]]) -> Iterator[list[tuple[str, str, int, str]]]:
    """Neighbours that are small are fetched at the same time: a tiny file costs a round trip, not bandwidth."""
    batch: list[tuple[str, str, int, str]] = []
    held = 0
    for row in rows:
        if batch and (held + row[2] > _READ_AHEAD_BYTES or len(batch) >= 8 * _AT_ONCE):
            yield batch
            batch, held = [], 0
        batch.append(row)
        held += row[2]
    if batch:
        yield batch


def _fetched(store: Any, wanted: list[tuple[str, int]], retry_s: float) -> list[tuple[bytes, str] | None]:
    """Contents and versions of a batch of small files; None for one that is read by ranges instead."""
    if len(wanted) == 1 and wanted[0][1] > _READ_AHEAD_BYTES:
        return [None]

    async def fetch() -> list[tuple[bytes, str]]:
        free = asyncio.Semaphore(_AT_ONCE)

        async def one(key: str, size: int) -> tuple[bytes, str]:
            async with free:
                return await store.get(key, 0, size) if size else (b"", "")  # type: ignore[no-any-return]

        return await asyncio.gather(*(one(key, size) for key, size in wanted))

    return list(persist(lambda: store.run(fetch()), store.where(wanted[0][0]), retry_s))


class _Ranges(io.RawIOBase):
    """An object as it was listed, by ranged reads; where the store went away, the next range is where it stopped."""

    def __init__(
        self, store: Any, key: str, size: int, state: str, retry_s: float, data: tuple[bytes, str] | None
    ) -> None:
        self._store, self._key, self._size, self._state, self._retry_s = store, key, size, state, retry_s
        self._data, self._at = data, 0
        if isinstance(store, Other):
            self._state = ""  # its listings name another version than its reads do: the first read counts

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        data, version = self._range(length)
        self._state = self._state or version
        if version != self._state or not data:
            raise StorageError(
                "a file of a source was replaced since it was listed",
                got=self._store.where(self._key),
                do="run the same command again, once nothing writes there",
            )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _range(self, length: int) -> tuple[bytes, str]:
        if self._data is not None:
            return self._data[0][self._at : self._at + length], self._data[1]
        where = self._store.where(self._key)
        return persist(lambda: self._store.run(self._store.get(self._key, self._at, length)), where, self._retry_s)


def _no_source(uri: str) -> StorageError:
    return StorageError("a source does not exist", got=uri, wanted="a file or folder", do="mend ingest.sources")


def _unlisted(uri: str, error: Exception) -> StorageError:
    return StorageError(
        f"a source cannot be listed: {error}", got=uri, do="check the URI, the network and the credentials"
    )


def _unread(path: str, error: Exception) -> StorageError:
    return StorageError(
        f"a file of a source cannot be read: {type(error).__name__}: {str(error)[:300]}",
        got=path,
        do="check that it is still there, its mode, and the disk or network; then run again",
    )
