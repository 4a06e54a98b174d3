"""What nothing in a workspace refers to any more, and deleting it.

Owns which blobs are in use, which memories (`memo.py`) and leftovers of killed writers are of no use, and the grace
that keeps what a running stage may still want. What is deleted on purpose is `data/account/erase.py`.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from forge_ray.artifact import ACTIVE_S, Manifest, Workspace
from forge_ray.errors import NotFoundError
from forge_ray.storage import Listed

GRACE_S = 3600.0
_READERS = 16
_REMEMBERED = re.compile(rb'"([0-9a-f]{64})", \d')  # a digest and a size, as `memo.py` writes a file


def find(workspace: Workspace, grace_s: float = GRACE_S, now: Callable[[], float] = time.time) -> list[tuple[str, int]]:
    """Blobs that no manifest refers to, memories of them, and leftovers of interrupted writers, as (name, bytes).

    A running stage stores its blobs before its manifest. So what is younger than `grace_s` stays, and so does all that
    is not older than the oldest running stage: the oldest `runs/<run id>/active` of less than `ACTIVE_S`. While one
    runs, what a memory refers to stays too, for the stage may go by it.
    Not covered: a stage that runs for longer than `ACTIVE_S` has the grace alone; one that begins while this is found
    and deleted may lose what it has just remembered, and says so when it is read.

    Raises:
        CorruptError: A manifest cannot be read, so what it refers to is not known; nothing may be deleted then.

    Cost: reads every manifest and every memory, 16 at a time.
    """
    # Markers before manifests: a stage removes its marker only when its manifest can be seen.
    running = active(workspace, now)
    kept = in_use(workspace)
    memories = list(_memories(workspace))
    before_s = _before_s(running, grace_s, now)
    for memory in memories if running else ():
        kept |= memory.digests
    blobs = workspace.storage.listing("blobs")
    gone = {row.name: row.size_bytes for row in blobs if _digest(row) not in kept and row.modified_s < before_s}
    left = {_digest(row) for row in blobs if row.name not in gone}
    idle = [(memory.name, memory.size_bytes) for memory in memories if not memory.digests <= left]
    return [*gone.items(), *_old_leftovers(workspace, before_s), *idle]


def leftovers(workspace: Workspace, now: Callable[[], float] = time.time) -> list[tuple[str, int]]:
    """Of what `find` gives, the temporary files alone."""
    return _old_leftovers(workspace, _before_s(active(workspace, now), GRACE_S, now))


def delete(workspace: Workspace, garbage: list[tuple[str, int]]) -> None:
    """Deletes what `find` listed."""
    for name, _ in garbage:
        workspace.storage.delete(name)


def in_use(workspace: Workspace, but: Collection[str] = ()) -> set[str]:
    """The digests that manifests refer to, of artifacts and of checkpoints.

    Args:
        workspace: Where they lie.
        but: Names of manifests that do not count.

    Raises:
        CorruptError: A manifest cannot be read.
    """
    storage = workspace.storage
    checkpoints = [name for name in storage.list("runs") if "/checkpoints/" in name]
    used: set[str] = set()
    for name in [*checkpoints, *storage.list("artifacts")]:
        if name.endswith(".json") and name not in but:
            with contextlib.suppress(NotFoundError):  # an old checkpoint, released in the meantime
                manifest = Manifest.from_json(storage.read_bytes(name), f"{workspace.uri}/{name}")
                used |= {entry.sha256 for entry in manifest.files}
    return used


def active(workspace: Workspace, now: Callable[[], float] = time.time) -> dict[str, float]:
    """The markers of stages that run now, or were killed within the time that a marker counts; when each was set."""
    return {
        row.name: row.modified_s
        for row in workspace.storage.listing("runs")
        if row.name.endswith("/active") and row.name.count("/") == 2 and now() - row.modified_s < ACTIVE_S
    }


@dataclass(frozen=True)
class _Memory:
    name: str
    size_bytes: int
    digests: frozenset[str]


def _memories(workspace: Workspace) -> Iterator[_Memory]:
    def read(name: str) -> _Memory | None:
        try:
            data = workspace.storage.read_bytes(name)
        except NotFoundError:
            return None
        return _Memory(name, len(data), frozenset(digest.decode() for digest in _REMEMBERED.findall(data)))

    with ThreadPoolExecutor(_READERS) as pool:  # a store answers in tens of milliseconds, and there may be thousands
        yield from filter(None, pool.map(read, workspace.storage.list("memo")))


def _before_s(running: dict[str, float], grace_s: float, now: Callable[[], float]) -> float:
    """What was written before this, and is of no use, goes."""
    return min([now() - grace_s, *running.values()])


def _old_leftovers(workspace: Workspace, before_s: float) -> list[tuple[str, int]]:
    found = []
    for path in workspace.storage.temporaries():
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            if path.is_file() and stat.st_mtime < before_s:
                found.append((path.relative_to(workspace.uri).as_posix(), stat.st_size))
    return found


def _digest(row: Listed) -> str:
    return row.name.rpartition("/")[2]
