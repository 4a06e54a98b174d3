"""Shards on this machine: a node-wide cache of bounded size in front of an object store.

```
<cache folder>/shards/<sha256>           a shard, verified on arrival; whoever has it mapped holds a shared lock on it
                     /.tmp-<sha256>      a shard on its way; renamed once it is whole and its digest is right
                     /.claim-<sha256>-N  locked by the process that fetches it, for as long; N bytes are reserved
                     /.space             locked while room is made and given away
```

Owns what lies in that folder, for how long, and how it gets there. Does not own when and in which order shards are read
(`loader.py`, `order.py`), nor requests to stores (`Storage.fetch`, which tries again for a while by itself).

All worker processes of a node, of one run or several, share the folder: a shard is fetched once for all of them. State
is in files and locks alone, and the kernel drops a dead process's locks: what it leaves is a file that the next one
removes. The sum of all shards, those on their way included, stays within `cache_bytes`. Room is made by removing what
was used least recently and nobody has mapped; what this run needs soon goes last.

A shard is verified when it arrives and again by each process that maps it, unless that process has seen that very file
verified. Damage on arrival is fetched once more before it is an error. Local workspaces are read where they lie.

Shards are fetched by plain threads, not by Ray Data, which was measured (`bench/loader.py --quick --ray`, 80 shards of
1 MB from SeaweedFS on loopback, 2 busy cores, 2026-11-23): threads 107 and 184 MB/s at 0.3 to 0.4 CPU seconds, Ray Data
4.6 and 34 MB/s at 2.2 to 7.1, first shard after 0.3 to 14 s; and its bytes would still have to be written and verified.

Not covered: a cache folder on a file system without `flock`; several nodes that share one cache folder over NFS.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from forge_ray.artifact import FileEntry, Workspace, _blob, _rebuild_hint, cache_folder, digest_file
from forge_ray.data.shards import Shard
from forge_ray.errors import CorruptError, DiskFullError, NotFoundError, StorageError
from forge_ray.retry import Meaning, meaning
from forge_ray.storage import translated
from forge_ray.telemetry import say

WAIT_S = 600.0
_TMP, _CLAIM, _SPACE = ".tmp-", ".claim-", ".space"
_POLL_S, _FULL_POLL_S = 0.05, 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_DAMAGES = 3


@dataclass
class Opened:
    """A shard that is mapped; no process removes its file until `close`."""

    shard: Shard
    pin: int | None = None

    def close(self) -> None:
        """Lets go of the file."""
        if self.pin is not None:
            os.close(self.pin)
            self.pin = None


class Place(Protocol):
    """Where shards come from. `wanted` ranks the digests that this run needs soon: the lower, the sooner."""

    room_bytes: int

    def prepare(self, entry: FileEntry, shown: str, wanted: Mapping[str, int]) -> float:
        """Makes the shard ready to be opened; 0 if it is, else seconds after which to ask again."""

    def open(self, entry: FileEntry, shown: str, wanted: Mapping[str, int]) -> Opened:
        """Opens the shard, however long it takes to have it."""


class LocalShards:
    """The shards of a workspace in a local folder, where they lie, each verified when it is first used."""

    room_bytes = 0

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def prepare(self, entry: FileEntry, shown: str, wanted: Mapping[str, int]) -> float:
        """Verifies it, which also brings it into the page cache."""
        self._workspace.verified(entry, shown)
        return 0.0

    def open(self, entry: FileEntry, shown: str, wanted: Mapping[str, int]) -> Opened:
        """Maps it."""
        return Opened(Shard(self._workspace.verified(entry, shown)))


class _Fetched(Enum):
    DONE = 0
    BUSY = 1
    FULL = 2


class ShardCache:
    """Copies of an object store's shards, shared by the processes of this node.

    Args:
        workspace: Where they come from.
        cache_bytes: What all copies together may take.
        folder: Where they are kept.
        wait_s: How long a store that does not answer is waited for by a reader that can do nothing else.
    """

    def __init__(
        self, workspace: Workspace, cache_bytes: int, folder: Path | None = None, wait_s: float = WAIT_S
    ) -> None:
        self._workspace, self.room_bytes, self._wait_s = workspace, cache_bytes, wait_s
        self.folder = folder or cache_folder("shards")
        with translated(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._damages: dict[str, int] = {}

    def prepare(self, entry: FileEntry, shown: str, wanted: Mapping[str, int]) -> float:
        """Fetches it, if there is room without removing what is wanted."""
        if (self.folder / entry.sha256).exists():
            pin = self._pin(entry)
            if pin is not None:
                os.close(pin)
                return 0.0
        found = self._fetch(entry, shown, wanted, urgent=False)
        return {_Fetched.DONE: 0.0, _Fetched.BUSY: _POLL_S, _Fetched.FULL: _FULL_POLL_S}[found]

    def open(self, entry: FileEntry, shown: str, wanted: Mapping[str, int]) -> Opened:
        """Maps it, fetched if need be.

        Raises:
            CorruptError: What arrives is damaged, twice, or the store does not have it.
            DiskFullError: The disk is full.
            StorageError: The store, or room in the cache, was waited for in vain.
        """
        path, patience = self.folder / entry.sha256, _Patience(self._wait_s)
        known = self._damages.get(entry.sha256, 0)
        while self._damages.get(entry.sha256, 0) < known + _DAMAGES:
            pin = self._pin(entry)
            if pin is not None:
                return Opened(Shard(path), pin)
            try:
                found = self._fetch(entry, shown, wanted, urgent=True)
            except DiskFullError:
                raise
            except StorageError as error:
                if meaning(error) in (Meaning.DENIED, Meaning.NO_BUCKET) or not patience.wait():
                    raise
                say(f"  the store does not answer, {shown} is waited for: {error.what}")
                continue
            if found is _Fetched.FULL and not patience.wait(_FULL_POLL_S):
                raise StorageError(
                    "the shard cache has no room: processes of this machine use all that lies in it",
                    got=f"{self.folder}: {self._used_bytes()} bytes",
                    wanted=f"{entry.size_bytes} more within pretrain.cache_bytes {self.room_bytes}",
                    do="raise pretrain.cache_bytes, or train fewer models on this machine at once",
                )
            if found is _Fetched.BUSY:
                time.sleep(_POLL_S)
        raise self._damaged(entry, shown, "it is damaged again and again on this machine's disk")

    # ------------------------------------------------------------------------------------------------- one shard

    def _pin(self, entry: FileEntry) -> int | None:
        """A descriptor that keeps the verified file from being removed; none if it is not there (any more)."""
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
                    os.utime(pin, ns=(time.time_ns(), os.fstat(pin).st_mtime_ns))
            finally:
                if not keep:
                    os.close(pin)
            return pin if keep else None

    def _verified(self, pin: int, entry: FileEntry) -> bool:
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
            self._damages[entry.sha256] = self._damages.get(entry.sha256, 0) + 1
            (self.folder / entry.sha256).unlink(missing_ok=True)
        return good

    def _fetch(self, entry: FileEntry, shown: str, wanted: Mapping[str, int], *, urgent: bool) -> _Fetched:
        """Brings a shard from the store, unless another process is at it or there is no room."""
        with self._claim(entry, wanted, urgent) as claimed:
            if claimed is not _Fetched.DONE:
                return claimed
            path, temp = self.folder / entry.sha256, self.folder / f"{_TMP}{entry.sha256}"
            if path.exists():
                return _Fetched.DONE
            try:
                for _ in range(2):
                    self._download(entry, shown, temp)
                    if temp.stat().st_size == entry.size_bytes and digest_file(temp) == entry.sha256:
                        break
                else:
                    raise self._damaged(entry, shown, "what the store sends, twice, has another SHA-256")
                with translated(str(path)):
                    self._seen[entry.sha256] = self._settle(temp, path)
            finally:
                temp.unlink(missing_ok=True)
            return _Fetched.DONE

    def _download(self, entry: FileEntry, shown: str, temp: Path) -> None:
        try:
            self._workspace.storage.fetch(_blob(entry.sha256), temp)
        except NotFoundError:
            where = f"{shown} ({self._workspace.uri}/{_blob(entry.sha256)})"
            raise self._workspace.missing(entry, where, shown) from None
        except DiskFullError:
            raise DiskFullError(
                "no space left for a shard",
                got=f"{self.folder}, which holds {self._used_bytes()} of pretrain.cache_bytes {self.room_bytes}",
                wanted=f"{entry.size_bytes} bytes",
                do="free space, lower pretrain.cache_bytes, or set XDG_CACHE_HOME to a folder on a larger disk",
            ) from None

    def _settle(self, temp: Path, path: Path) -> tuple[int, int, int]:
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

    def _damaged(self, entry: FileEntry, shown: str, why: str) -> CorruptError:
        return CorruptError(
            "a token shard is damaged or missing",
            got=f"{shown} ({self._workspace.uri}/{_blob(entry.sha256)}): {why}",
            wanted=f"sha256 {entry.sha256[:16]}…, {entry.size_bytes} bytes",
            do=_rebuild_hint(shown),
        )

    # ------------------------------------------------------------------------------------------------------ room

    @contextlib.contextmanager
    def _claim(self, entry: FileEntry, wanted: Mapping[str, int], urgent: bool) -> Iterator[_Fetched]:
        """The right to fetch a shard, with room reserved for it; DONE means that it is given."""
        path = self.folder / f"{_CLAIM}{entry.sha256}-{entry.size_bytes}"
        claim = None
        try:
            with self._space():
                claim = _lock_new(path)
                found = _Fetched.BUSY if claim is None else _Fetched.DONE
                # Another process may have brought it since the caller looked.
                if claim is not None and not (self.folder / entry.sha256).exists():
                    found = _Fetched.DONE if self._make_room(entry, wanted, urgent) else _Fetched.FULL
            yield found
        finally:
            if claim is not None:
                path.unlink(missing_ok=True)
                os.close(claim)

    @contextlib.contextmanager
    def _space(self) -> Iterator[None]:
        with translated(str(self.folder)):
            descriptor = os.open(self.folder / _SPACE, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _make_room(self, entry: FileEntry, wanted: Mapping[str, int], urgent: bool) -> bool:
        """Whether the claimed shard fits within the bound, after removing what has to go. Under the space lock."""
        shards, reserved_bytes = self._survey()
        used_bytes = reserved_bytes + sum(stat.st_size for stat in shards.values())
        for name in sorted(shards, key=lambda name: (name in wanted, -wanted.get(name, 0), shards[name].st_atime_ns)):
            if used_bytes <= self.room_bytes:
                break
            if (urgent or name not in wanted) and _remove_unused(self.folder / name):
                used_bytes -= shards[name].st_size
        return used_bytes <= self.room_bytes

    def _survey(self) -> tuple[dict[str, os.stat_result], int]:
        """The shards there, and the bytes reserved for those on their way; leftovers of dead processes are removed."""
        shards, temporaries, reserved = {}, [], {}
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
                        shards[file.name] = file.stat()
        for name in temporaries:
            if name.removeprefix(_TMP) not in reserved:
                (self.folder / name).unlink(missing_ok=True)
        return shards, sum(size for digest, size in reserved.items() if digest not in shards)

    def _used_bytes(self) -> int:
        with self._space():
            shards, reserved_bytes = self._survey()
        return reserved_bytes + sum(stat.st_size for stat in shards.values())


class _Patience:
    """Growing pauses until a time is over, which starts with the first of them."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._pause_s = limit_s, _FIRST_PAUSE_S
        self._began_s: float | None = None

    def wait(self, longest_s: float = _LONGEST_PAUSE_S) -> bool:
        """Pauses; False, without a pause, once the time is over."""
        now_s = time.monotonic()
        self._began_s = self._began_s or now_s
        left_s = self._began_s + self._limit_s - now_s
        if left_s <= 0:
            return False
        time.sleep(min(self._pause_s, longest_s, left_s))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


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
