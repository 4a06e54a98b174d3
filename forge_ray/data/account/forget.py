"""Tombstones: documents that no build may hold again.

```
<workspace>/tombstones/<document id>.json    id, key, origin, source, when, why, who
```

Owns the record of what is to be forgotten. `ingest` leaves these documents out of the next build; what they are called
is found by `builds.py`, who has seen them by `explain.py`, and the bytes of earlier builds are deleted by `erase.py`.

A tombstone holds for every source of the workspace: a source that is renamed or moved as a whole does not bring the
document back, and neither does a second source with the same file. Not covered: a document that has changed, or lies
elsewhere below its source, is another document with another id. Records are told by their number in their file, so a
record that is taken out of a file changes the ids of those behind it. So delete at the source too, and forget before.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from forge_ray.artifact import Workspace
from forge_ray.data.account import ledger
from forge_ray.errors import DataError

FOLDER = "tombstones"
ERASURES = "erasures"
_READERS = 16


def tombstones(workspace: Workspace) -> list[dict[str, Any]]:
    """All that is to be forgotten, in the order of the ids."""
    with ThreadPoolExecutor(_READERS) as pool:  # a store answers in tens of milliseconds, and there may be thousands
        return [json.loads(data) for data in pool.map(workspace.storage.read_bytes, workspace.storage.list(FOLDER))]


def by_file(stones: Iterable[Mapping[str, Any]], keys: Container[str]) -> dict[str, list[str]]:
    """For each of these files that holds a document with a tombstone, the ids of those documents."""
    found: dict[str, list[str]] = {}
    for stone in stones:
        for key in _prefixes(stone["key"]):
            if key in keys:
                found.setdefault(key, []).append(stone["id"])
    return found


def bury(workspace: Workspace, rows: Sequence[Mapping[str, Any]], why: str) -> list[dict[str, Any]]:
    """Writes tombstones, each once; one that stands already is left as it is.

    Args:
        rows: The documents' rows of the ledger.
        why: The reason, for the record.

    Returns:
        The tombstones that stand now, in the order of the rows.

    Raises:
        DataError: A row is of something that was skipped, so of no document; nothing is written then.
    """
    for row in rows:
        if row["fate"] == ledger.SKIPPED:
            raise DataError(
                "this was skipped, so no build holds it and there is nothing to forget",
                got=f"{row['source']}: {row['reason']}",
                do="delete it at the source, or leave it: while it is like that it is skipped again",
            )
    when, who = datetime.now(UTC).isoformat(timespec="seconds"), user()
    stones = []
    for row in rows:
        stone = {name: row[name] for name in ("id", "key", "origin", "source")} | {"when": when, "why": why, "who": who}
        name = f"{FOLDER}/{row['id']}.json"
        new = workspace.storage.create(name, json.dumps(stone, indent=1).encode())
        stones.append(stone if new else json.loads(workspace.storage.read_bytes(name)))
    return stones


def erasures_of(workspace: Workspace, ids: set[str]) -> list[dict[str, Any]]:
    """The records of erasures of these documents, each with its own name as `record`."""
    records = [
        json.loads(workspace.storage.read_bytes(name)) | {"record": name}
        for name in workspace.storage.list(ERASURES)
        if name.endswith(".json")
    ]
    return [record for record in records if ids & {row["id"] for row in record["documents"]}]


def user() -> str:
    """Who runs this process, as far as the system says."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return "unknown"


def _prefixes(key: str) -> Iterator[str]:
    """A document's key begins with its file's, followed by the place in it."""
    yield key
    for end, mark in enumerate(key):
        if mark in "#!/":
            yield key[:end]
