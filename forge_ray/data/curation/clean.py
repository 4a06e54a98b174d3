"""The first pass of curation: what is done to each document by itself, part by part.

Owns the order of these steps, batches of bounded bytes, and what they leave: the cleaned part, a row of the ledger for
each document (its fate so far) and the features that documents are compared by. The steps are the modules beside it:
`normalize.py`, `language.py`, `quality.py`, `privacy.py`; the comparison is `dedup.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Workspace
from forge_ray.config import CurateConfig
from forge_ray.data.account import ledger
from forge_ray.data.curation import dedup
from forge_ray.data.ingest import SCHEMA_FIELDS

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_DOCUMENTS = 512
_BATCH_BYTES = 8 << 20


def settled_by(config: CurateConfig) -> dict[str, Any]:
    """What decides the result of the first pass; of the steps across documents, what their features depend on."""
    settled = {name: value for name, value in config.fingerprinted().items() if name != "decontaminate"}
    settled["lines"] = {name: settled["lines"][name] for name in ("enabled", "min_chars")}
    return settled | {"compares": compares(config)}


def compares(config: CurateConfig) -> bool:
    """Whether a step across documents is switched on."""
    return config.exact.enabled or config.near.enabled or config.lines.enabled or config.decontaminate.enabled


@dataclass
class _Fates:
    """What became of the documents of a batch so far; lists have an entry for each."""

    texts: list[str]
    language: list[str]
    step: list[str | None] = field(default_factory=list)
    reason: list[str | None] = field(default_factory=list)
    detail: list[str | None] = field(default_factory=list)
    found: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.texts)
        self.step, self.reason, self.detail = [None] * count, [None] * count, [None] * count
        self.found = [{} for _ in range(count)]

    def alive(self) -> list[int]:
        """The documents that no step has dropped."""
        return [i for i, step in enumerate(self.step) if step is None]

    def drop(self, i: int, step: str, reason: str, detail: str = "") -> None:
        """Takes a document out."""
        self.step[i], self.reason[i], self.detail[i] = step, reason, detail


class Cleaner:
    """The Ray task of the first pass: a part into its cleaned part, fates and features."""

    __name__ = "clean"

    def __init__(self, config: CurateConfig, documents_ref: str, workspace: Workspace) -> None:
        self.config, self.documents_ref, self.workspace = config, documents_ref, workspace

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        chosen = steps(self.config)
        path = self.workspace.verified(row["entry"], f"{self.documents_ref}:{row['_part']}")
        seconds: Counter[str] = Counter()
        found: Counter[str] = Counter()
        kept = 0
        with ExitStack() as stack:
            clean = stack.enter_context(self.workspace.new_file("clean"))
            fates = stack.enter_context(self.workspace.new_file("fates"))
            features = stack.enter_context(self.workspace.new_file("features")) if compares(self.config) else None
            writers: list[Any] = []
            for batch in _batches(path):
                done = _run_steps(chosen, batch, seconds)
                alive = done.alive()
                kept += len(alive)
                tables = [_cleaned(batch, done, alive), _fates(batch, done, row["split"])]
                if features:
                    began = time.perf_counter()
                    tables.append(dedup.features([done.texts[i] for i in alive], self.config))
                    seconds["features"] += time.perf_counter() - began
                if not writers:
                    writers = [
                        pq.ParquetWriter(clean.stream, tables[0].schema, compression="zstd"),
                        pq.ParquetWriter(fates.stream, tables[1].schema, compression="zstd"),
                        *([pa.ipc.new_stream(features.stream, tables[2].schema)] if features else []),
                    ]
                for writer, table in zip(writers, tables, strict=True):
                    writer.write_table(table)
                for counts in done.found:
                    found.update(counts)
            for writer in writers:
                writer.close()
        return [
            {
                "clean": clean.entry,
                "fates": fates.entry,
                "features": features and features.entry,
                "documents": kept,
                "found": dict(found),
                "seconds": dict(seconds),
            }
        ]


def _batches(path: Path) -> Iterator[pa.Table]:
    """A part in batches of bounded bytes: documents may be megabytes each."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH_DOCUMENTS):
        sizes = pc.binary_length(batch["text"]).to_pylist()
        start = total = 0
        for end, size in enumerate(sizes):
            if total and total + size > _BATCH_BYTES:
                yield pa.Table.from_batches([batch.slice(start, end - start)])
                start, total = end, 0
            total += size
        yield pa.Table.from_batches([batch.slice(start)])


Step = Callable[[_Fates, "pa.Table"], None]


def _run_steps(chosen: Sequence[tuple[str, Step]], batch: pa.Table, seconds: Counter[str]) -> _Fates:
    done = _Fates(batch["text"].to_pylist(), batch["language"].to_pylist())
    for name, step in chosen:
        began = time.perf_counter()
        step(done, batch)
        seconds[name] += time.perf_counter() - began
    return done


def steps(config: CurateConfig) -> list[tuple[str, Step]]:
    """The steps that are switched on, in order."""
    every: list[tuple[str, bool, Callable[[CurateConfig], Step]]] = [
        ("licences", bool(config.licences.allow), _licences),
        ("normalize", config.normalize.enabled, _normalize),
        ("language", config.language.enabled, _language),
        ("quality", config.quality.enabled, _quality),
        ("privacy", config.privacy.enabled, _privacy),
    ]
    return [(name, make(config)) for name, enabled, make in every if enabled]


def _licences(config: CurateConfig) -> Step:
    allowed = {licence.casefold() for licence in config.licences.allow}

    def step(done: _Fates, batch: pa.Table) -> None:
        for i, licence in enumerate(batch["licence"].to_pylist()):
            if licence.casefold() not in allowed:
                done.drop(i, "licences", "licence_not_allowed", licence)

    return step


def _normalize(config: CurateConfig) -> Step:
    from forge_ray.data.curation.normalize import normalize

    def step(done: _Fates, batch: pa.Table) -> None:
        alive = done.alive()
        for i, text in zip(alive, normalize([done.texts[i] for i in alive], config.normalize), strict=True):
            done.texts[i] = text
            if not text.strip():
                done.drop(i, "normalize", "nothing_left")

    return step


def _language(config: CurateConfig) -> Step:
    from forge_ray.data.curation.language import identify, judge

    def step(done: _Fates, batch: pa.Table) -> None:
        alive = done.alive()
        for i, found in zip(alive, identify([done.texts[i] for i in alive]), strict=True):
            done.language[i] = done.language[i] or found[0]
            if verdict := judge(found, config.language):
                done.drop(i, "language", verdict.reason, verdict.detail)

    return step


def _quality(config: CurateConfig) -> Step:
    from forge_ray.data.curation.quality import judge

    def step(done: _Fates, batch: pa.Table) -> None:
        alive = done.alive()
        for i, verdict in zip(alive, judge([done.texts[i] for i in alive], config.quality), strict=True):
            if verdict is not None:
                done.drop(i, "quality", verdict.reason, verdict.detail)

    return step


def _privacy(config: CurateConfig) -> Step:
    from forge_ray.data.pii.privacy import Scrubber

    scrubber = Scrubber(config.privacy)

    def step(done: _Fates, batch: pa.Table) -> None:
        alive = done.alive()
        for i, scrubbed in zip(alive, scrubber.scrub([done.texts[i] for i in alive]), strict=True):
            done.texts[i], done.found[i] = scrubbed.text, scrubbed.found
            if scrubbed.drop:
                done.drop(i, "privacy", f"holds_{scrubbed.drop}", f"{scrubbed.found.get(scrubbed.drop, 0)} found")

    return step


def _cleaned(batch: pa.Table, done: _Fates, alive: list[int]) -> pa.Table:
    import pyarrow as pa

    rows = pa.array(alive, pa.int64())
    columns = {name: batch[name].take(rows).combine_chunks() for name in SCHEMA_FIELDS}
    columns["text"] = pa.array([done.texts[i] for i in alive], pa.string())
    columns["language"] = pa.array([done.language[i] for i in alive], pa.string())
    return pa.table(columns)


def _fates(batch: pa.Table, done: _Fates, split: str) -> pa.Table:
    import pyarrow.compute as pc

    dropped = [step is not None for step in done.step]
    return ledger.table(
        {
            **{name: batch[name].to_pylist() for name in ledger.IDENTITY if name != "language"},
            "language": done.language,
            "split": [split] * len(dropped),
            "bytes_in": pc.binary_length(batch["text"]).to_pylist(),
            "bytes_out": [0 if gone else len(text.encode()) for gone, text in zip(dropped, done.texts, strict=True)],
            "fate": [ledger.DROPPED if gone else ledger.KEPT for gone in dropped],
            "step": done.step,
            "reason": done.reason,
            "detail": done.detail,
            "found": [list(counts.items()) for counts in done.found],
            "lines_removed": [0] * len(dropped),
        }
    )
