"""Shared parts of the data tests: a workspace, documents in parts, and Ray Data replaced by a plain loop."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifact import Artifact, Manifest, Workspace
from forge_ray.data import curate, ingest, shards
from forge_ray.data.curation import contamination, dedup
from tests.unit.data.small_job import map_rows_here

Rows = list[dict[str, str]]
Task = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(str(tmp_path_factory.mktemp("workspace")))


@pytest.fixture
def plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages' tasks run here, one after the other."""

    for module in (contamination, curate, dedup, ingest, shards):
        monkeypatch.setattr(module, "map_rows", map_rows_here)


@pytest.fixture
def publish(workspace: Workspace) -> Callable[..., Artifact]:
    """Publishes an ingest artifact whose parts hold these rows."""

    def make(parts: dict[str, Rows]) -> Artifact:
        files = []
        listed = []
        for name, rows in parts.items():
            with workspace.new_file(name) as build:
                columns = {key: [row.get(key, "") for row in rows] for key in ingest.SCHEMA_FIELDS}
                pq.write_table(pa.table(columns), build.stream)
            files.append(build.entry)
            num_bytes = sum(len(row["text"].encode()) for row in rows)
            origin = rows[0].get("origin", "") if rows else ""
            listed.append(asdict(ingest.Part(name, name.partition("-")[0], 0, origin, len(rows), num_bytes)))
        files.append(workspace.put_bytes(ingest.PARTS, json.dumps(listed).encode()))
        digest = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
        return workspace.publish(Manifest(stage="ingest", fingerprint=digest, files=tuple(files)))

    return make


@pytest.fixture
def rows() -> Callable[..., Rows]:
    """Documents of seeded words, or of the given texts."""

    def make(count: int = 0, seed: int = 0, texts: list[str] | None = None) -> Rows:
        draw = random.Random(seed)
        words = ["".join(draw.choices("abcdefghijkl", k=draw.randint(2, 7))) for _ in range(80)]
        texts = texts or [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(count)]
        ids = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
        return [
            {"id": ids[i], "group": f"g{i}", "source": f"s{seed}/{i}", "licence": "MIT", "text": text}
            for i, text in enumerate(texts)
        ]

    return make
