"""Token shards on this machine: a cache of bounded size between an object store and the training processes.

Owns when a shard is fetched or waited for. Does not own how copies are fetched, verified, bounded and shared by the
processes of a machine (`copies.py`), nor when and in which order shards are read (`loader.py`, `order.py`). Local
workspaces are read where they lie.

All worker processes of a machine, of one run or several, share the folder `shards`, which has a bound of its own
(`pretrain.cache_bytes`): a shard that is mapped is never removed, and what this run needs soon goes last.

Shards are fetched by plain threads, not by Ray Data, which was measured (`bench/loader.py --quick --ray`, 80 shards of
1 MB from SeaweedFS on loopback, 2 busy cores, 2026-11-23): threads 107 and 184 MB/s at 0.3 to 0.4 CPU seconds, Ray Data
4.6 and 34 MB/s at 2.2 to 7.1, first shard after 0.3 to 14 s; and its bytes would still have to be written and verified.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from forge_ray.artifact import FileEntry, Workspace, cache_folder
from forge_ray.copies import POLL_S, Copies, Entry, Fetched
from forge_ray.data.shards import Shard
from forge_ray.errors import DiskFullError, StorageError
from forge_ray.retry import Meaning, meaning
from forge_ray.telemetry import say

WAIT_S = 600.0
_FULL_POLL_S = 0.5
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


class ShardCache(Copies):
    """Copies of an object store's shards, shared by the processes of this node.

    Args:
        workspace: Where they come from.
        cache_bytes: What all copies together may take.
        folder: Where they are kept.
        wait_s: How long a store that does not answer is waited for by a reader that can do nothing else.
    """

    limit_name = "pretrain.cache_bytes"

    def __init__(
        self, workspace: Workspace, cache_bytes: int, folder: Path | None = None, wait_s: float = WAIT_S
    ) -> None:
        super().__init__(workspace, cache_bytes, folder or cache_folder("shards"))
        self.room_bytes, self._wait_s = cache_bytes, wait_s
        self._damages: dict[str, int] = {}

    def prepare(self, entry: FileEntry, shown: str, wanted: Mapping[str, int]) -> float:
        """Fetches it, if there is room without removing what is wanted."""
        if (self.folder / entry.sha256).exists():
            pin = self.pin(entry)
            if pin is not None:
                os.close(pin)
                return 0.0
        found = self.fetch(entry, shown, wanted, urgent=False)
        return {Fetched.DONE: 0.0, Fetched.BUSY: POLL_S, Fetched.FULL: _FULL_POLL_S}[found]

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
            pin = self.pin(entry)
            if pin is not None:
                return Opened(Shard(path), pin)
            try:
                found = self.fetch(entry, shown, wanted, urgent=True)
            except DiskFullError:
                raise
            except StorageError as error:
                if meaning(error) in (Meaning.DENIED, Meaning.NO_BUCKET) or not patience.wait():
                    raise
                say(f"  the store does not answer, {shown} is waited for: {error.what}")
                continue
            if found is Fetched.FULL and not patience.wait(_FULL_POLL_S):
                raise StorageError(
                    "the shard cache has no room: processes of this machine use all that lies in it",
                    got=f"{self.folder}: {self.used_bytes()} bytes",
                    wanted=f"{entry.size_bytes} more within pretrain.cache_bytes {self.room_bytes}",
                    do="raise pretrain.cache_bytes, or train fewer models on this machine at once",
                )
            if found is Fetched.BUSY:
                time.sleep(POLL_S)
        raise self.origin.damaged(entry, shown, "it is damaged again and again on this machine's disk")

    def _verified(self, pin: int, entry: Entry) -> bool:
        good = super()._verified(pin, entry)
        if not good:
            self._damages[entry.sha256] = self._damages.get(entry.sha256, 0) + 1
        return good


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
