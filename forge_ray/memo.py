"""What a piece of work gave, remembered in the workspace by the digest of what went in.

```
<workspace>/memo/<stage>/<key>.json    the rows that a task returned, blobs by name, digest and size
```

So a stage that is killed goes on with the pieces that it lacks, and when documents are added only theirs are made. A
memory is only as good as its blobs: one whose blobs are gone or of another size does not count. Owns keys and records;
the work itself is `runtime.map_rows`, deleting what is of no use any more `garbage.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from forge_ray.artifact import FileEntry, Workspace, digest_bytes
from forge_ray.errors import NotFoundError

_FILE = "$file"


@dataclass(frozen=True)
class Memo:
    """The memory of one kind of work.

    Args:
        workspace: Where it is kept.
        stage: Its folder; letters and dashes.
        version: Raise it when the same input would give something else.
        config: What decides the result beside the row, as JSON values.
    """

    workspace: Workspace
    stage: str
    version: int
    config: Mapping[str, Any]

    def key(self, row: Mapping[str, Any]) -> str:
        """The digest of a row and of all else that decides the result: 32 hex digits.

        Of a file its content counts, not its name; fields that begin with `_` are for messages and do not count.
        """
        counted = {name: value for name, value in row.items() if not name.startswith("_")}
        parts = {"stage": self.stage, "version": self.version, "config": self.config, "row": counted}
        return digest_bytes(json.dumps(parts, sort_keys=True, default=lambda entry: entry.sha256).encode())[:32]

    def get(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """What the row gave before, if it is remembered and its blobs are there."""
        try:
            record = json.loads(self.workspace.storage.read_bytes(self._name(row)))
            if digest_bytes(_canonical(record["rows"])) != record["sha256"]:
                return None
            rows = [_revived(item) for item in record["rows"]]
        except (NotFoundError, ValueError, KeyError, TypeError):
            return None
        return rows if all(self.workspace.has_blob(entry) for entry in _entries(rows)) else None

    def put(self, row: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
        """Remembers what a row gave."""
        plain = json.loads(json.dumps(rows, default=_plain))
        record = {"rows": plain, "sha256": digest_bytes(_canonical(plain))}
        self.workspace.storage.write(self._name(row), json.dumps(record).encode())

    def _name(self, row: Mapping[str, Any]) -> str:
        return f"memo/{self.stage}/{self.key(row)}.json"


def _plain(value: Any) -> Any:
    if isinstance(value, FileEntry):
        return {_FILE: [value.name, value.sha256, value.size_bytes]}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _revived(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_FILE}:
            return FileEntry(*value[_FILE])
        return {name: _revived(item) for name, item in value.items()}
    return [_revived(item) for item in value] if isinstance(value, list) else value


def _entries(value: Any) -> list[FileEntry]:
    if isinstance(value, FileEntry):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [entry for item in items for entry in _entries(item)]


def _canonical(rows: Any) -> bytes:
    return json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()
