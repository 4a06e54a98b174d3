"""Copies of an object store's blobs on this machine: folders of bounded size that all its processes share.

```
<folder>/<sha256>           a copy, verified on arrival; whoever needs it under its name holds a shared lock on it
        /.tmp-<sha256>      one on its way; renamed once it is whole and its digest is right
        /.claim-<sha256>-N  locked by the process that fetches it, for as long; N bytes are reserved
        /.space             locked while room is made and given away
```

Owns what lies in such a folder, for how long, and how it gets there. Does not own requests to stores (`Storage.fetch`,
which tries again for a while by itself) nor what copies are for: `data/cache.py` has shards for training, `Held` here
serves everything else.

A blob is fetched once for all processes of a machine. State is in files and locks alone, and the kernel drops a dead
process's locks: what it leaves is a file that the next one removes. The sum of all copies, those on their way included,
stays within the bound. Room is made by removing what was used least recently and nobody has locked. A copy is verified
when it arrives and again by each user that has not seen that very file verified; damage is fetched once more before it
is an error.

Not covered: a folder on a file system without `flock`; several machines that share one folder over NFS.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path, PosixPath
from typing import Protocol

from forge_ray.errors import CorruptError, DiskFullError
from forge_ray.storage import translated

LIMIT_BYTES, LIMIT_DISK_FRAC = 20 << 30, 0.25
POLL_S = 0.05
_TMP, _CLAIM, _SPACE = ".tmp-", ".claim-", ".space"


class Entry(Protocol):
    """What is said of a blob; `artifact.FileEntry` is one."""

    @property
    def sha256(self) -> str:
        """Its digest, and its copy's name."""

    @property
    def size_bytes(self) -> int:
        """Its size."""


class Origin(Protocol):
    """Where blobs come from; `artifact.Workspace` is one. `shown` is what messages call a blob."""

    def fetch_blob(self, entry: Entry, shown: str, target: Path) -> None:
        """Writes the blob's bytes, not yet verified, to a new local file."""

    def damaged(self, entry: Entry, shown: str, why: str) -> CorruptError:
        """The error of a blob whose bytes are not those of its digest."""


class Fetched(Enum):
    """What became of a wish for a copy."""

    DONE = 0
    BUSY = 1
    """Another process is fetching it."""
    FULL = 2


class Copies:
    """One folder of copies.

    Args:
        origin: Where they come from.
        limit_bytes: What all copies together may take; none for `default_limit_bytes`.
        folder: Where they are kept.
    """

    limit_name = "cache_bytes"
    """The field of the configuration that is the bound."""

    def __init__(self, origin: Origin, limit_bytes: int | None, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        with translated(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            self.limit_bytes = limit_bytes or default_limit_bytes(folder)
        self._seen: dict[str, tuple[int, int, int]] = {}

    # -------------------------------------------------------------------------------------------------- one copy

    def pin(self, entry: Entry) -> int | None:
        """A descriptor that keeps the verified copy under its name; none if it is not there (any more)."""
        path = self.folder / entry.sha256
        with translated(str(path)):
            try:
                pin = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            keep = False
            try:
                fcntl.flock(pin, fcntl.LOCK_SH)
                keep = _is(path, pin) and self._verified(pin, entry)
                if keep:
                    # What was used last is what this says; the time of modification tells whether it is the same file.
                    with contextlib.suppress(PermissionError):  # another user's copy
                        os.utime(pin, ns=(time.time_ns(), os.fstat(pin).st_mtime_ns))
            finally:
                if not keep:
                    os.close(pin)
            return pin if keep else None

    def _verified(self, pin: int, entry: Entry) -> bool:
        """Whether the file has the right bytes; a damaged one is removed."""
        state = _version(pin)
        if self._seen.get(entry.sha256) == state:
            return True
        with open(os.dup(pin), "rb") as stream:
            stream.seek(0)
            good = state[1] == entry.size_bytes and hashlib.file_digest(stream, "sha256").hexdigest() == entry.sha256
        if good:
            self._seen[entry.sha256] = state
        else:
            (self.folder / entry.sha256).unlink(missing_ok=True)
        return good

    def fetch(self, entry: Entry, shown: str, wanted: Mapping[str, int], *, urgent: bool) -> Fetched:
        """Brings a copy from the store, unless another process is at it or there is no room.

        Args:
            entry: The blob.
            shown: What messages call it.
            wanted: Digests that are needed soon, the lower the sooner: these are removed last.
            urgent: Whether room may be made by removing what is wanted.

        Raises:
            CorruptError: What arrives is damaged, twice.
            DiskFullError: The disk is full.
            NotFoundError, StorageError: The store does not have it, or does not answer.
        """
        with self._claim(entry, wanted, urgent) as claimed:
            if claimed is not Fetched.DONE:
                return claimed
            path, temp = self.folder / entry.sha256, self.folder / f"{_TMP}{entry.sha256}"
            if path.exists():
                return Fetched.DONE
            try:
                self._download(entry, shown, temp)
                with translated(str(path)):
                    self._seen[entry.sha256] = _settle(temp, path)
            finally:
                temp.unlink(missing_ok=True)
            return Fetched.DONE

    def _download(self, entry: Entry, shown: str, temp: Path) -> None:
        """Fetches and verifies, and once more what is damaged."""
        found = ""
        for _ in range(2):
            try:
                self.origin.fetch_blob(entry, shown, temp)
            except DiskFullError:
                raise DiskFullError(
                    "no space left for a copy of what the store has",
                    got=f"{self.folder}, which holds {self.used_bytes()} bytes of {self.limit_name} {self.limit_bytes}",
                    wanted=f"{entry.size_bytes} bytes",
                    do=f"free space, lower {self.limit_name}, or set XDG_CACHE_HOME to a folder on a larger disk",
                ) from None
            with temp.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found == entry.sha256 and temp.stat().st_size == entry.size_bytes:
                return
        size = temp.stat().st_size
        raise self.origin.damaged(entry, shown, f"the store sends, twice, sha256 {found[:16]}…, {size} bytes")

    # ------------------------------------------------------------------------------------------------------ room

    @contextlib.contextmanager
    def _claim(self, entry: Entry, wanted: Mapping[str, int], urgent: bool) -> Iterator[Fetched]:
        """The right to fetch a copy, with room reserved for it; DONE means that it is given."""
        path = self.folder / f"{_CLAIM}{entry.sha256}-{entry.size_bytes}"
        claim = None
        try:
            with self._space():
                claim = _lock_new(path)
                found = Fetched.BUSY if claim is None else Fetched.DONE
                # Another process may have brought it since the caller looked.
                if claim is not None and not (self.folder / entry.sha256).exists():
                    found = Fetched.DONE if self._make_room(wanted, urgent) else Fetched.FULL
            yield found
        finally:
            if claim is not None:
                path.unlink(missing_ok=True)
                os.close(claim)

    @contextlib.contextmanager
    def _space(self) -> Iterator[None]:
        with translated(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)  # a cache may be deleted at any time
            descriptor = os.open(self.folder / _SPACE, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _make_room(self, wanted: Mapping[str, int], urgent: bool) -> bool:
        """Whether all that is claimed fits within the bound, after removing what has to go. Under the space lock."""
        copies, reserved_bytes = self._survey()
        used_bytes = reserved_bytes + sum(stat.st_size for stat in copies.values())
        for name in sorted(copies, key=lambda name: (name in wanted, -wanted.get(name, 0), copies[name].st_atime_ns)):
            if used_bytes <= self.limit_bytes:
                break
            if (urgent or name not in wanted) and _remove_unused(self.folder / name):
                used_bytes -= copies[name].st_size
        return used_bytes <= self.limit_bytes

    def _survey(self) -> tuple[dict[str, os.stat_result], int]:
        """The copies there, and the bytes reserved for those on their way; leftovers of dead processes are removed."""
        copies, temporaries, reserved = {}, [], {}
        with os.scandir(self.folder) as found:
            for file in found:
                with contextlib.suppress(FileNotFoundError):
                    if file.name.startswith(_CLAIM):
                        digest, _, size = file.name.removeprefix(_CLAIM).rpartition("-")
                        if _remove_unused(Path(file.path)):
                            continue
                        reserved[digest] = int(size)
                    elif file.name.startswith(_TMP):
                        temporaries.append(file.name)
                    elif file.name != _SPACE:
                        copies[file.name] = file.stat()
        for name in temporaries:
            if name.removeprefix(_TMP) not in reserved:
                (self.folder / name).unlink(missing_ok=True)
        return copies, sum(size for digest, size in reserved.items() if digest not in copies)

    def used_bytes(self) -> int:
        """What lies there or is on its way."""
        with self._space():
            copies, reserved_bytes = self._survey()
        return reserved_bytes + sum(stat.st_size for stat in copies.values())


class HeldPath(PosixPath):
    """The path of a copy that keeps its name for as long as this object lives.

    A file that was opened or mapped outlives its name, so it is needed until then. What is derived from it (`str`,
    `/`, a pickled one) holds nothing.
    """


class Held(Copies):
    """Copies for all who read a file by its name and are done with it soon: parts, ledgers, checkpoints, reports.

    What is in use is never removed; where nothing else is left to remove, what is needed is fetched beyond the bound,
    and the next fetch goes below it again: to refuse would stop a task that holds one file and wants another.
    """

    def hold(self, entry: Entry, shown: str) -> Path:
        """A verified copy, fetched if need be.

        Raises:
            CorruptError: What arrives is damaged, twice.
            DiskFullError: The disk is full.
            NotFoundError, StorageError: The store does not have it, or does not answer.

        Cost: a fetch looks at every copy, 6 to 9 microseconds each (20,000 of them, 2 busy cores, 2026-11-24).
        """
        while (pin := self.pin(entry)) is None:
            if self.fetch(entry, shown, {}, urgent=True) is Fetched.BUSY:
                time.sleep(POLL_S)
        held = HeldPath(self.folder / entry.sha256)
        weakref.finalize(held, os.close, pin).atexit = False  # the kernel does it then
        return held

    def _make_room(self, wanted: Mapping[str, int], urgent: bool) -> bool:
        super()._make_room(wanted, urgent)
        return True


def default_limit_bytes(folder: Path) -> int:
    """What copies may take where nothing is configured: 20 GiB, or a quarter of the disk if that is less."""
    disk = os.statvfs(folder)
    return min(LIMIT_BYTES, int(disk.f_blocks * disk.f_frsize * LIMIT_DISK_FRAC))


def _settle(temp: Path, path: Path) -> tuple[int, int, int]:
    """Gives a verified file its name, and says which file it is."""
    # Synced before it has its name: after a power failure it is whole or not there.
    descriptor = os.open(temp, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.fchmod(descriptor, 0o444)
        os.replace(temp, path)
        return _version(descriptor)
    finally:
        os.close(descriptor)


def _version(descriptor: int) -> tuple[int, int, int]:
    """What tells whether a file is the one that was verified; being read or mapped changes none of it."""
    stat = os.fstat(descriptor)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is(path: Path, descriptor: int) -> bool:
    """Whether the descriptor is of the file that has this name now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock_new(path: Path) -> int | None:
    """Creates a file and locks it for this descriptor; none if somebody else has it locked."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not _is(path, descriptor):  # its owner removed it in between
        os.close(descriptor)
        return None
    return descriptor


def _remove_unused(path: Path) -> bool:
    """Removes a file that nobody has locked; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
