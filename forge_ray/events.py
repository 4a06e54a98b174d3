"""The log of a run: append-only JSON records in its folder of the workspace.

Owns how records are kept on stores that cannot append. Does not own what they say.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Sequence
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
        self._changing, self._flushing = threading.Lock(), threading.Lock()
        self._next_segment()

    def _next_segment(self, rows: Sequence[str] = ()) -> None:
        self._name = f"{self._folder}/{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._rows, self._published = list(rows), 0

    def add(self, kind: str, **fields: Any) -> None:
        """Keeps a record; `flush` publishes it. From any thread. `time_s` may be given, of what happened before."""
        row = json.dumps({"time_s": round(time.time(), 3), "event": kind, **fields})
        with self._changing:
            self._rows.append(row)

    def flush(self) -> None:
        """Publishes what was added. From any thread."""
        with self._flushing:
            with self._changing:
                rows, name = list(self._rows), self._name
            if len(rows) > self._published:
                self._storage.write(name, ("\n".join(rows) + "\n").encode())
                self._published = len(rows)
            if len(rows) >= self.SEGMENT_RECORDS:
                with self._changing:
                    self._next_segment(self._rows[len(rows) :])

    @staticmethod
    def read(storage: Storage, run_id: str) -> list[dict[str, Any]]:
        """All records of a run in the order of time."""
        rows = []
        for name in storage.list(f"runs/{run_id}/events"):
            rows += [json.loads(line) for line in storage.read_bytes(name).decode().splitlines()]
        return sorted(rows, key=lambda row: row["time_s"])
