"""Bytes at a URI: a local folder, or an object store (`s3:// gs:// abfs://`).

Owns publishing (nothing is visible under its name until it is whole), create-if-absent, compare-and-swap, and local
folders. Does not own names or digests (`artifact.py`), requests to object stores (`objects.py`, `stores.py`) or what
their errors mean (`retry.py`).

On a local folder a write goes to a temporary file beside its target, is fsynced, then linked or renamed into place.
On an object store a PUT, or the end of a multipart upload, is atomic by itself: nothing half-written is visible either.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from forge_ray.errors import NotFoundError
from forge_ray.objects import Blob, Condition, Store
from forge_ray.retry import disk_full, is_disk_full, translated
from forge_ray.stores import connect, open_filesystem, split_uri

__all__ = ["Listed", "Storage", "is_local", "open_filesystem", "translated"]

TEMP_PREFIX = ".tmp-"
_LOCK = f"{TEMP_PREFIX}lock"
_COPY_BYTES = 4 << 20
_READ_AHEAD_BYTES = 8 << 20
_YOUNG_S = 60.0


@dataclass(frozen=True)
class Listed:
    """A name and what a listing says about it, at no extra request."""

    name: str
    size_bytes: int
    modified_s: float
    version: str


class Storage:
    """A root URI and the few operations that artifacts need; names are relative, with `/`.

    Instances are cheap and picklable, so that Ray tasks can take them along. Requests to an object store that is busy
    or unreachable are tried again for `retry.BUDGET_S`; what comes out in the end is a `StorageError`.

    Raises:
        ConfigError: The URI carries credentials.
    """

    def __init__(self, uri: str) -> None:
        self.local = _local_root(uri)
        self.uri = str(self.local) if self.local else uri.rstrip("/")
        self._prefix = ""
        if not self.local:
            prefix = split_uri(self.uri)[2]
            self._prefix = f"{prefix}/" if prefix else ""
        self._store: tuple[int, Store] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return Storage, (self.uri,)

    def exists(self, name: str) -> bool:
        """Whether something is published under this name."""
        if self.local:
            with translated(self._at(name)):
                return self._path(name).is_file()
        try:
            self._head(name)
        except NotFoundError:
            return False
        return True

    def size_bytes(self, name: str) -> int:
        """Size of what is published under this name."""
        if not self.local:
            return self._head(name).size_bytes
        with translated(self._at(name)):
            return self._path(name).stat().st_size

    def read_bytes(self, name: str) -> bytes:
        """The whole content.

        Raises:
            NotFoundError: Nothing is published under this name.
        """
        return self.read_versioned(name)[0]

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        """The whole content, and the version that `swap` wants to see. On S3 the same bytes may be the same version.

        Raises:
            NotFoundError: Nothing is published under this name.
        """
        if not self.local:
            return self.store.run(self.store.get(self._key(name)))
        with translated(self._at(name)), self._path(name).open("rb") as stream:
            return stream.read(), _version(stream.fileno())

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, fewer where the content ends.

        Raises:
            NotFoundError: Nothing is published under this name.
        """
        if not self.local:
            return self.store.run(self.store.get(self._key(name), start, length))[0]
        with translated(self._at(name)), self._path(name).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        """A readable, seekable stream of the content; of an object store it reads `_READ_AHEAD_BYTES` at a time.

        A store that goes away in the middle and comes back is read on. If it has another version by then: an error.
        """
        if self.local:
            with translated(self._at(name)):
                opened: IO[bytes] = self._path(name).open("rb")
        else:
            opened = io.BufferedReader(_Ranges(self, name), _READ_AHEAD_BYTES)
        with opened as stream:
            yield stream

    def write(self, name: str, data: bytes) -> None:
        """Publishes these bytes, replacing what was there."""
        if not self.local:
            self.store.run(self.store.put(self._key(name), data))
            return
        with translated(self._at(name)), self._temporary(name) as temp:
            _write_synced(temp, data)
            os.replace(temp, self._path(name))
            _sync_folder(self._path(name).parent)

    def create(self, name: str, data: bytes) -> bool:
        """Publishes these bytes if the name is free; returns False, changing nothing, if it is taken."""
        if not self.local:
            return self._put_if(name, data, "")
        with translated(self._at(name)), self._temporary(name) as temp:
            _write_synced(temp, data)
            return _link_new(temp, self._path(name))

    def swap(self, name: str, data: bytes, version: str) -> bool:
        """Publishes these bytes if the name still has the version that was read; returns False otherwise.

        On a local folder this holds against other swaps, under a lock of the folder; on an object store, any write.
        """
        if not self.local:
            return self._put_if(name, data, version)
        with translated(self._at(name)), self._locked(name):
            try:
                with self._path(name).open("rb") as stream:
                    found = _version(stream.fileno())
            except FileNotFoundError:
                return False
            if found != version:
                return False
            self.write(name, data)
            return True

    def put_file(self, name: str, path: Path, sha256: str = "") -> None:
        """Publishes a local file's bytes if the name is free; a name that is taken is left as it is.

        What is left counts as modified now: it has a new user, and `garbage.py` must grant it the full grace. An object
        is overwritten, so healed, where its size differs, or the SHA-256 that its writer noted is not `sha256`; one
        without a note is another program's. Not covered: bytes that change below the store after they were written; its
        notes say nothing of that, the reader finds it.
        """
        if not self.local:
            with translated(str(path)):
                self._upload(name, path, sha256)
            return
        with translated(self._at(name)):
            target = self._path(name)
            if target.exists():
                with contextlib.suppress(OSError):  # another owner's file, a read-only mount
                    os.utime(target)
                return
            with self._temporary(name) as temp:
                shutil.copyfile(path, temp)
                _sync_file(temp)
                os.chmod(temp, 0o444)
                _link_new(temp, target)

    def fetch(self, name: str, target: Path) -> None:
        """Copies the content to a new local file."""
        if self.local:
            with self.open_read(name) as source, translated(str(target)), target.open("wb") as sink:
                shutil.copyfileobj(source, sink, _COPY_BYTES)
            return
        blob = self._head(name)
        with translated(str(target)), target.open("wb") as sink:
            self.store.run(self.store.fetch(blob, sink.fileno()))

    def list(self, prefix: str) -> list[str]:
        """Names below a folder, sorted; temporary files are left out. A folder that is not there has none."""
        return [listed.name for listed in self.listing(prefix)]

    def listing(self, prefix: str) -> list[Listed]:
        """What `list` names, with size, time and version. Cost: one request for each 1,000 names."""
        if not self.local:
            folder = self._key(f"{prefix.strip('/')}/" if prefix.strip("/") else "")
            blobs = self.store.run(self.store.list(folder))
            rows = (Listed(b.key.removeprefix(self._prefix), b.size_bytes, b.modified_s, b.version) for b in blobs)
            return sorted(rows, key=lambda listed: listed.name)
        found = []
        with translated(self._at(prefix)):
            for path in self._path(prefix).rglob("*"):
                if path.name.startswith(TEMP_PREFIX):
                    continue
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    if path.is_file():
                        stat = path.stat()
                        name = path.relative_to(self.local).as_posix()
                        found.append(Listed(name, stat.st_size, stat.st_mtime, _version(path)))
        return sorted(found, key=lambda listed: listed.name)

    def delete(self, name: str) -> None:
        """Removes a name; one that is not there is no error."""
        if not self.local:
            self.store.run(self.store.delete(self._key(name)))
            return
        with translated(self._at(name)), contextlib.suppress(FileNotFoundError):
            self._path(name).unlink()

    def modified_s(self, name: str) -> float:
        """When the name was published, in seconds since the epoch."""
        if not self.local:
            return self._head(name).modified_s
        with translated(self._at(name)):
            return self._path(name).stat().st_mtime

    def temporaries(self) -> list[Path]:
        """Temporary files that interrupted writers left in a local root; locks, which stay, are none."""
        if not self.local or not self.local.exists():
            return []
        return sorted(path for path in self.local.rglob(f"{TEMP_PREFIX}*") if path.name != _LOCK)

    def local_path(self, name: str) -> Path | None:
        """The file itself where the root is a local folder."""
        return self._path(name) if self.local else None

    @contextlib.contextmanager
    def scratch_file(self) -> Iterator[Path]:
        """A temporary file to build a blob in, on the root's own disk where it is local; removed at the end.

        Of the errors of the block, which may read documents too, only a full disk is taken for the store's.
        """
        with contextlib.ExitStack() as stack:
            with translated(self.uri):
                if self.local:
                    temp = stack.enter_context(self._temporary("scratch"))
                else:
                    temp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="forge-"))) / "scratch"
            try:
                yield temp
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise disk_full(str(temp)) from None

    @property
    def store(self) -> Store:
        """The object store; each process has its own, for a fork cannot share connections."""
        if self._store is None or self._store[0] != os.getpid():
            self._store = os.getpid(), connect(self.uri)
        return self._store[1]

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _head(self, name: str) -> Blob:
        return self.store.run(self.store.head(self._key(name)))

    def _put_if(self, name: str, data: bytes, version: str) -> bool:
        return self.store.run(self.store.put(self._key(name), data, Condition(version)))

    def _upload(self, name: str, path: Path, sha256: str) -> None:
        """Creates where nothing is, so that of two writers one uploads in vain; replaces what is seen to be damaged."""
        try:
            stored = self._head(name)
        except NotFoundError:
            self.store.run(self.store.put_file(self._key(name), path, Condition(), sha256))
            return
        if stored.size_bytes != path.stat().st_size or (sha256 and stored.sha256 != sha256):
            self.store.run(self.store.put_file(self._key(name), path, None, sha256))
        elif time.time() - stored.modified_s > _YOUNG_S:
            self.store.run(self.store.touch(stored))

    def _at(self, name: str) -> str:
        return f"{self.uri}/{name}" if name else self.uri

    def _path(self, name: str) -> Path:
        assert self.local is not None
        return self.local / name

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time swaps in a folder; the lock ends with its holder, however that ends."""
        folder = self._path(name).parent
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        folder = self._path(name).parent
        folder.mkdir(parents=True, exist_ok=True)
        temp = folder / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
        try:
            yield temp
        finally:
            temp.unlink(missing_ok=True)


def is_local(uri: str) -> bool:
    """Whether a URI means a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def _local_root(uri: str) -> Path | None:
    return Path(uri.removeprefix("file://")).expanduser().absolute() if is_local(uri) else None


class _Ranges(io.RawIOBase):
    """An object as a seekable raw stream of ranged reads, all of one version."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._at = storage, 0
        self._blob = storage._head(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._blob.size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._blob.size_bytes - self._at)
        if length <= 0:
            return 0
        store = self._storage.store
        data = store.run(store.read(self._blob, self._at, length))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _version(file: int | Path) -> str:
    """A local file's version. Every write makes a new file, so inode and time differ even where the bytes do not."""
    stat = os.stat(file)
    return f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as sink:
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):
        _sync_file(path)


def _link_new(temp: Path, target: Path) -> bool:
    try:
        os.link(temp, target)
    except FileExistsError:
        return False
    except OSError as error:
        # File systems without hard links (some network shares): rename is not create-only, so look first.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        if target.exists():
            return False
        os.replace(temp, target)
    _sync_folder(target.parent)
    return True
