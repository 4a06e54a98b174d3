"""Bytes at a URI: a local folder, or an object store through fsspec (`s3:// gs:// abfs://`).

Owns publishing (nothing is visible under its name until it is whole), create-if-absent, and turning the many errors of
stores into `StorageError`. Does not own names or digests (`artifact.py`).

On a local folder a write goes to a temporary file beside its target, is fsynced, then linked or renamed into place.
On an object store a PUT is atomic by itself, so nothing half-written is ever visible either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from forge_ray.errors import DiskFullError, NotFoundError, StorageError

TEMP_PREFIX = ".tmp-"
_COPY_BYTES = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Storage:
    """A root URI and the few operations that artifacts need; names are relative, with `/`.

    Instances are cheap and picklable, so that Ray tasks can take them along.
    """

    def __init__(self, uri: str) -> None:
        self.local = _local_root(uri)
        self.uri = str(self.local) if self.local else uri.rstrip("/")
        self._fs: Any = None

    def __reduce__(self) -> tuple[object, ...]:
        return Storage, (self.uri,)

    def exists(self, name: str) -> bool:
        """Whether something is published under this name."""
        with translated(self._at(name)):
            if self.local:
                return self._path(name).is_file()
            try:
                # Unlike exists() and isfile(), this tells a folder from a file and lets an unreachable store raise.
                return bool(self.fs.info(self._at(name))["type"] == "file")
            except FileNotFoundError:
                return False

    def size_bytes(self, name: str) -> int:
        """Size of what is published under this name."""
        with translated(self._at(name)):
            return self._path(name).stat().st_size if self.local else int(self.fs.size(self._at(name)))

    def read_bytes(self, name: str) -> bytes:
        """The whole content.

        Raises:
            NotFoundError: Nothing is published under this name.
        """
        with translated(self._at(name)):
            return self._path(name).read_bytes() if self.local else bytes(self.fs.cat_file(self._at(name)))

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        """A readable stream of the content."""
        with translated(self._at(name)):
            opened = self._path(name).open("rb") if self.local else self.fs.open(self._at(name), "rb")
        with opened as stream:
            yield stream

    def write(self, name: str, data: bytes) -> None:
        """Publishes these bytes, replacing what was there."""
        with translated(self._at(name)):
            if self.local:
                with self._temporary(name) as temp:
                    _write_synced(temp, data)
                    os.replace(temp, self._path(name))
                    _sync_folder(self._path(name).parent)
            else:
                self.fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Publishes these bytes if the name is free; returns False, changing nothing, if it is taken."""
        with translated(self._at(name)):
            if self.local:
                with self._temporary(name) as temp:
                    _write_synced(temp, data)
                    return _link_new(temp, self._path(name))
            try:
                self.fs.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # s3fs reports SeaweedFS's 412 as EINVAL.
                if error.errno == errno.EINVAL and self.fs.exists(self._at(name)):
                    return False
                raise
            return True

    def put_file(self, name: str, path: Path) -> None:
        """Publishes a local file's bytes if the name is free; a name that is taken is left as it is.

        A local file that is left counts as modified now: it has a new user, and `garbage` must grant it the full grace.
        On an object store it keeps its age, and one of another size, so damaged, is overwritten. Not covered: damage
        there that keeps the size is found by whoever reads it, since telling it here would cost a download.
        """
        with translated(self._at(name)):
            if not self.local:
                try:
                    stored_bytes = self.fs.size(self._at(name))
                except FileNotFoundError:
                    stored_bytes = None
                if stored_bytes != path.stat().st_size:
                    self.fs.put_file(str(path), self._at(name))
                return
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
        with self.open_read(name) as source, translated(str(target)), target.open("wb") as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)

    def list(self, prefix: str) -> list[str]:
        """Names below a folder, sorted; temporary files are left out. A folder that is not there has none."""
        with translated(self._at(prefix)):
            if self.local:
                root = self._path(prefix)
                found = (p.relative_to(self.local).as_posix() for p in root.rglob("*") if p.is_file())
                return sorted(name for name in found if not name.rpartition("/")[2].startswith(TEMP_PREFIX))
            root_path = self.fs._strip_protocol(self.uri).rstrip("/") + "/"
            try:
                return sorted(path.removeprefix(root_path) for path in self.fs.find(self._at(prefix)))
            except FileNotFoundError:
                return []

    def delete(self, name: str) -> None:
        """Removes a name; one that is not there is no error."""
        with translated(self._at(name)), contextlib.suppress(FileNotFoundError):
            self._path(name).unlink() if self.local else self.fs.rm_file(self._at(name))

    def modified_s(self, name: str) -> float:
        """When the name was published, in seconds since the epoch."""
        with translated(self._at(name)):
            return self._path(name).stat().st_mtime if self.local else self.fs.modified(self._at(name)).timestamp()

    def temporaries(self) -> list[Path]:
        """Temporary files that interrupted writers left in a local root."""
        return sorted(self.local.rglob(f"{TEMP_PREFIX}*")) if self.local and self.local.exists() else []

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
                if error.errno not in _FULL:
                    raise
                raise _disk_full(str(temp)) from None

    @property
    def fs(self) -> Any:
        """The fsspec filesystem of an object store."""
        if self._fs is None:
            self._fs = open_filesystem(self.uri)[0]
        return self._fs

    def _at(self, name: str) -> str:
        return f"{self.uri}/{name}" if name else self.uri

    def _path(self, name: str) -> Path:
        assert self.local is not None
        return self.local / name

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        folder = self._path(name).parent
        folder.mkdir(parents=True, exist_ok=True)
        temp = folder / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
        try:
            yield temp
        finally:
            temp.unlink(missing_ok=True)


def open_filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI or local path, and the path on it.

    Raises:
        StorageError: The scheme is unknown or its client is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"no store is known for this URI: {error}",
            got=uri,
            wanted="a path, s3://, gs:// or abfs://",
            do="mend the scheme, or install the client that the message names",
        ) from None


def is_local(uri: str) -> bool:
    """Whether a URI means a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def _local_root(uri: str) -> Path | None:
    return Path(uri.removeprefix("file://")).expanduser().absolute() if is_local(uri) else None


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns the errors of a store or disk into `StorageError` and its kin, naming the place."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError("nothing is stored there", got=where, do="check the workspace and the name") from None
    except PermissionError as error:
        raise StorageError(
            "permission denied", got=f"{where}: {error}", do="mend the owner, the mode or the credentials"
        ) from None
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(where) from None
        raise StorageError(
            f"the store did not do it: {error}", got=where, do="check the URI, the network and the credentials"
        ) from error
    except (ValueError, ImportError) as error:
        raise StorageError(f"the store cannot be used: {error}", got=where) from error


def _disk_full(where: str) -> DiskFullError:
    return DiskFullError(
        "no space left; nothing half-written was published",
        got=where,
        do="free space (`forge gc` removes what nothing refers to), then run the same command again",
    )


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
