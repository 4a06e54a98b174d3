"""The log of a run: append-only JSON records in its folder of the workspace.

Owns how records are kept on stores that cannot append. Does not own what they say.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from forge_ray.storage import Storage


class Events:
    """Appends JSON records to `runs/<run id>/events/`, one file for each process that writes.

    Each record has a wall-clock `time_s`. A process rewrites its own segment of the log as a whole, so that it works on
    object stores, which cannot append; segments are closed at `SEGMENT_RECORDS`.
    """

    SEGMENT_RECORDS = 1000

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._folder = storage, f"runs/{run_id}/events"
        self._rows: list[str] = []
        self._next_segment()

    def _next_segment(self) -> None:
        self._name = f"{self._folder}/{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._rows = []

    def add(self, kind: str, **fields: Any) -> None:
        """Keeps a record; `flush` publishes it."""
        self._rows.append(json.dumps({"time_s": round(time.time(), 3), "event": kind, **fields}))

    def flush(self) -> None:
        """Publishes what was added."""
        if self._rows:
            self._storage.write(self._name, ("\n".join(self._rows) + "\n").encode())
        if len(self._rows) >= self.SEGMENT_RECORDS:
            self._next_segment()

    @staticmethod
    def read(storage: Storage, run_id: str) -> list[dict[str, Any]]:
        """All records of a run in the order of time."""
        rows = []
        for name in storage.list(f"runs/{run_id}/events"):
            rows += [json.loads(line) for line in storage.read_bytes(name).decode().splitlines()]
        return sorted(rows, key=lambda row: row["time_s"])
