"""Which files are read together, so that a corpus may grow without its old parts being made again.

The files of every source are cut into units, each read by one task. When files are added, the units that were there
before keep their members, and the new files form units of a new generation behind them; a unit of which a file has
changed or gone is dissolved, and what is left of it is new. So the layout depends on what is stored now and on the
layout before, which the newest artifact of the same configuration holds (`lineage/ingest/...` among the refs).

Owns units, generations and their record (`layout.parquet`). Does not own listing or reading (`formats.py`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from forge_ray.artifact import FileEntry, Workspace, digest_bytes
from forge_ray.config import BotocoreSource, IngestConfig, Source
from forge_ray.data.reading import botocore_docs, formats
from forge_ray.errors import ArtifactError

FILE = "layout.parquet"
UNIT_BYTES = 16 << 20
UNIT_FILES = 4096


@dataclass(frozen=True)
class Unit:
    """Files that one task reads: `rows` are those of the listing (name, key, size, state)."""

    source: int
    generation: int
    rows: tuple[dict[str, Any], ...]

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(row["size"] for row in self.rows)

    def digest(self) -> str:
        """Names its place and the state of its files."""
        rows = [[row["name"], row["size"], row["state"]] for row in self.rows]
        return digest_bytes(json.dumps([self.source, self.generation, rows]).encode())


def origin(source: Source) -> str:
    """What reports and mixtures call a source's documents."""
    if source.name or isinstance(source, BotocoreSource):
        return source.name
    return source.uri.rstrip("/").rpartition("/")[2] or source.uri


def reader(source: Source) -> Any:
    """The module that lists and reads a source."""
    return botocore_docs if isinstance(source, BotocoreSource) else formats


def plan(config: IngestConfig, workspace: Workspace) -> list[Unit]:
    """The units of the sources as they are now, older generations first.

    Raises:
        StorageError: A source does not exist or cannot be listed.
        DataError: A source holds no file of a known kind.
    """
    listings = [reader(source).listing(source) for source in config.sources]
    there = [{row["name"]: row for row in rows} for rows in listings]
    taken = [set[str]() for _ in listings]
    kept: list[Unit] = []
    generation = 0
    for unit in _before(config, workspace):
        generation = max(generation, unit.generation + 1)
        found = [there[unit.source].get(row["name"]) for row in unit.rows]
        if [_state(row) for row in found if row] == [_state(row) for row in unit.rows]:
            rows = tuple(row for row in found if row)  # the listing's, so that each file is held once
            kept.append(Unit(unit.source, unit.generation, rows))
            taken[unit.source].update(row["name"] for row in rows)
    new = [
        Unit(number, generation, rows)
        for number, rows in enumerate(listings)
        for rows in _cut([row for row in rows if row["name"] not in taken[number]])
    ]
    return kept + new


def digest(units: list[Unit]) -> str:
    """Names the whole layout."""
    return digest_bytes("".join(unit.digest() for unit in units).encode())


def lineage(config: IngestConfig) -> str:
    """The ref under which the newest artifact of a configuration is found, whatever its sources held then."""
    return f"lineage/ingest/{digest_bytes(json.dumps(config.fingerprinted(), sort_keys=True).encode())[:16]}"


def store(workspace: Workspace, units: list[Unit]) -> FileEntry:
    """Writes the record of a layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = defaultdict(list)
    for number, unit in enumerate(units):
        for row in unit.rows:
            for name, value in (("unit", number), ("source", unit.source), ("generation", unit.generation)):
                columns[name].append(value)
            for name in ("name", "key", "size", "state"):
                columns[name].append(row[name])
    with workspace.new_file(FILE) as build:
        pq.write_table(pa.table(dict(columns)), build.stream, compression="zstd")
    return build.entry


def _state(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["size"], row["state"]


def _before(config: IngestConfig, workspace: Workspace) -> Iterator[Unit]:
    """The units of the newest artifact of this configuration, one at a time."""
    import numpy as np
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(workspace.resolve(lineage(config)).local_path(FILE))
    except ArtifactError:  # none, or one that is damaged: the layout starts anew, at the cost of time alone
        return
    starts = np.flatnonzero(np.diff(table["unit"].to_numpy(), prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(table)]):
        rows = table.slice(start, end - start).to_pylist()
        yield Unit(rows[0]["source"], rows[0]["generation"], tuple(rows))


def _cut(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], ...]]:
    """Neighbouring files together until `UNIT_BYTES` or `UNIT_FILES`; a larger file is a unit of its own."""
    units: list[list[dict[str, Any]]] = []
    total = 0
    for row in rows:
        if not units or total + row["size"] > UNIT_BYTES or len(units[-1]) >= UNIT_FILES:
            units.append([])
            total = 0
        units[-1].append(row)
        total += row["size"]
    return [tuple(unit) for unit in units]
