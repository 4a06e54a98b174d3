"""Curate: documents cleaned, deduplicated and stripped of private data, each one's fate on record.

Three passes. Within documents, one task per part: licences, normalize, language, quality, privacy. Across documents
(`dedup.py`): exact and near duplicates, contamination, repeated lines. Then one task per part again, which applies what
was decided. The first and the last pass are remembered by what went in (`memo.py`), so parts that nothing changes for
are not made again.

The artifact:

```
train-00000.parquet, heldout-00000.parquet ...   kept documents, ingest's columns, under the name of ingest's part
ledger-train-00000.parquet ...                   a row for each document of that part (ledger.py)
ledger-skipped-00000.parquet ...                 ingest's, unchanged
parts.json                                       as ingest's, of what is left
clean/..., features/..., fates/...               the first pass, which the next build goes on from
```

Owns the order of the steps and the account. The steps themselves are the modules beside this one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.config import CurateConfig, FilesSource
from forge_ray.data.account import ledger
from forge_ray.data.curation import clean, dedup
from forge_ray.data.ingest import PARTS, Part, by_origin, parts_of
from forge_ray.data.reading import formats
from forge_ray.errors import DataError
from forge_ray.memo import Memo
from forge_ray.runtime import map_rows
from forge_ray.telemetry import format_bytes, say

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
STEPS = ("licences", "normalize", "language", "quality", "privacy", "exact", "near", "decontaminate", "lines")


def observe(config: CurateConfig) -> dict[str, Any]:
    """The state of what the configuration only names: evaluation sets, and the model that finds names of persons.

    Raises:
        StorageError: An evaluation set does not exist or cannot be listed.
    """
    found: dict[str, Any] = {}
    if config.decontaminate.enabled:
        listings = [formats.listing(FilesSource(kind="files", uri=uri)) for uri in config.decontaminate.uris]
        found["evaluation"] = [[[row["key"], row["size"], row["state"]] for row in rows] for rows in listings]
    if config.privacy.enabled and config.privacy.name_model:
        from forge_ray.data.pii.privacy import model_state

        found["names"] = model_state(config.privacy.name_model)
    return found


def run(
    config: CurateConfig, documents: Artifact, workspace: Workspace, frozen: Mapping[str, Any] | None = None
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Curates every part of an ingest artifact.

    Args:
        config: The steps.
        documents: What ingest published.
        workspace: Where the parts lie and go.
        frozen: What `observe` gave when the stage was planned; none for whatever it gives now.

    Returns:
        The artifact's files and its metrics: documents and bytes before and after, drops by step and reason, private
        data by kind, seconds of work by step.

    Raises:
        DataError: No document is left to train on, or none to evaluate on, or an evaluation set changed while it was
            read.
        NotInstalledError: A step needs a package or model that is not there.
    """
    clean.steps(config)  # what is wrong with them is better said before any work
    parts = parts_of(documents)
    rows = [{"_part": part.name, "split": part.split, "entry": documents.entry(part.name)} for part in parts]
    frozen = observe(config) if frozen is None else frozen
    memo = Memo(workspace, "clean", FORMAT_VERSION, clean.settled_by(config) | {"names": frozen.get("names")})
    cleaned = map_rows("curate", clean.Cleaner(config, documents.ref, workspace), rows, memo)
    decided = _across(config, parts, cleaned, workspace)
    if observe(config) != frozen:
        raise _changed(config)
    memo = Memo(workspace, "apply", FORMAT_VERSION, {"lines": config.lines.fingerprinted()})
    rows = [
        {"_part": row["_part"], "clean": first["clean"], "fates": first["fates"], "decisions": decisions}
        for row, first, decisions in zip(rows, cleaned, decided, strict=True)
    ]
    applied = map_rows("curate: apply", _Apply(config, workspace), rows, memo)
    files = [documents.entry(name) for name in ledger.parts(documents)]
    left: list[Part] = []
    for part, first, row in zip(parts, cleaned, applied, strict=True):
        files.append(replace(row["ledger"], name=f"{ledger.PREFIX}{part.name}"))
        for kind in ("clean", "features", "fates"):
            if first[kind]:
                files.append(replace(first[kind], name=f"{kind}/{part.name}"))
        if row["final"]:
            files.append(replace(row["final"], name=part.name))
            left.append(replace(part, documents=row["documents"], bytes=row["bytes"]))
    files.append(workspace.put_bytes(PARTS, json.dumps([asdict(part) for part in left]).encode()))
    metrics = _metrics(config, parts, left, cleaned, applied)
    _check(metrics)
    return files, metrics


def _changed(config: CurateConfig) -> DataError:
    """The fingerprint names what these were when the stage was planned; what was read must be that."""
    return DataError(
        "an evaluation set, or the model that finds names, changed while it was read",
        got=", ".join(filter(None, (*config.decontaminate.uris, config.privacy.name_model))),
        do="run the same command again, once nothing writes there: what did not change is not read again",
    )


def _across(
    config: CurateConfig, parts: list[Part], cleaned: list[dict[str, Any]], workspace: Workspace
) -> list[FileEntry | None]:
    """What is decided across documents, for each part; earlier generations first, held-out documents before others."""
    if not clean.compares(config):
        return [None] * len(parts)
    order = sorted(range(len(parts)), key=lambda i: (parts[i].generation, parts[i].split != "heldout", i))
    given = [
        dedup.Part(
            name=parts[i].name,
            split=parts[i].split,
            generation=parts[i].generation,
            documents=cleaned[i]["documents"],
            clean=cleaned[i]["clean"],
            features=cleaned[i]["features"],
        )
        for i in order
    ]
    decisions = dict(zip(order, dedup.across(given, config, workspace), strict=True))
    return [decisions[i] for i in range(len(parts))]


# -------------------------------------------------------------------------------------------------------- applying


class _Apply:
    """The Ray task of the last pass: a cleaned part and what was decided into the final part and its ledger."""

    __name__ = "apply"

    def __init__(self, config: CurateConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        fates = pq.read_table(self._path(row, "fates"))
        final, documents, num_bytes = row["clean"], 0, 0
        if row["decisions"] is not None:
            cleaned = pq.read_table(self._path(row, "clean"))
            cleaned, fates = _decided(cleaned, fates, pq.read_table(self._path(row, "decisions")), self.config)
            with self.workspace.new_file("final") as build:
                pq.write_table(cleaned, build.stream, compression="zstd", row_group_size=4096)
            final = build.entry
        counts: Counter[tuple[str, str]] = Counter()
        removed = 0
        columns = ("fate", "step", "reason", "bytes_out", "lines_removed")
        for fate, step, reason, size, lines in zip(*(fates[name].to_pylist() for name in columns), strict=True):
            if fate == ledger.KEPT:
                documents += 1
                num_bytes += size
                removed += lines
            else:
                counts[step, reason] += 1
        return [
            {
                "final": final if documents else None,
                "ledger": ledger.store(self.workspace, "ledger", fates),
                "documents": documents,
                "bytes": num_bytes,
                "lines_removed": removed,
                "dropped": [[step, reason, count] for (step, reason), count in sorted(counts.items())],
            }
        ]

    def _path(self, row: dict[str, Any], kind: str) -> Any:
        return self.workspace.verified(row[kind], f"curate: {kind} of {row['_part']}")


_STEP_OF = {"exact": "exact", "near": "near", "contaminated": "decontaminate"}


def _decided(
    cleaned: pa.Table, fates: pa.Table, decisions: pa.Table, config: CurateConfig
) -> tuple[pa.Table, pa.Table]:
    """Applies decisions, which count rows of the cleaned part, to it and to the fates of the whole part."""
    import pyarrow as pa

    columns = {name: fates[name].to_pylist() for name in fates.column_names}
    place = [i for i, fate in enumerate(columns["fate"]) if fate == ledger.KEPT]
    texts = cleaned["text"].to_pylist()
    gone: set[int] = set()
    for decision in decisions.to_pylist():
        row, at = decision["row"], place[decision["row"]]
        if decision["drop"]:
            step, reason = _STEP_OF[decision["drop"]], decision["drop"]
            detail, columns["duplicate_of"][at] = None, decision["other"]
        else:
            removed = set(decision["remove"])
            lines = texts[row].split("\n")
            texts[row] = "\n".join(line for i, line in enumerate(lines) if i not in removed).strip()
            columns["lines_removed"][at] = len(removed)
            columns["bytes_out"][at] = len(texts[row].encode())
            if len(texts[row]) >= config.lines.min_document_chars:
                continue
            step, reason, detail = "lines", "too_short_without", f"{len(texts[row])} characters without repeated lines"
        gone.add(row)
        columns["fate"][at], columns["step"][at], columns["reason"][at] = ledger.DROPPED, step, reason
        columns["detail"][at], columns["bytes_out"][at] = detail, 0
    kept = pa.array([row for row in range(len(texts)) if row not in gone], pa.int64())
    final = cleaned.set_column(cleaned.column_names.index("text"), "text", pa.array(texts, pa.string()))
    return final.take(kept).combine_chunks(), ledger.table(columns)


# --------------------------------------------------------------------------------------------------------- account


def _metrics(
    config: CurateConfig,
    before: list[Part],
    after: list[Part],
    cleaned: list[dict[str, Any]],
    applied: list[dict[str, Any]],
) -> dict[str, Any]:
    def total(parts: list[Part], split: str, what: str) -> int:
        return sum(getattr(part, what) for part in parts if part.split == split)

    dropped: dict[str, Counter[str]] = {}
    for row in applied:
        for step, reason, count in row["dropped"]:
            dropped.setdefault(step, Counter())[reason] += count
    found: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for row in cleaned:
        found.update(row["found"])
        seconds.update(row["seconds"])
    return {
        **{
            f"{split}_{what}{suffix}": total(parts, split, what)
            for split in ("train", "heldout")
            for what in ("documents", "bytes")
            for suffix, parts in (("_in", before), ("", after))
        },
        "steps": [name for name in STEPS if _enabled(config, name)],
        "dropped": {step: dict(dropped[step]) for step in STEPS if step in dropped},
        "found": dict(sorted(found.items())),
        "lines_removed": sum(row["lines_removed"] for row in applied),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "origins": by_origin(after),
    }


def _enabled(config: CurateConfig, step: str) -> bool:
    return bool(config.licences.allow) if step == "licences" else getattr(config, step).enabled


def _check(metrics: dict[str, Any]) -> None:
    for split, purpose in (("train", "to train on"), ("heldout", "to evaluate on")):
        if not metrics[f"{split}_documents"]:
            drops = ", ".join(
                f"{count} {step}: {reason}" for step, by in metrics["dropped"].items() for reason, count in by.items()
            )
            raise DataError(
                f"curation left no document {purpose}",
                got=f"{metrics[f'{split}_documents_in']} documents before; dropped: {drops or 'none'}",
                wanted="at least one",
                do="loosen the step that dropped most, in curate; `forge config curate` documents its fields",
            )
    gone = sum(count for by in metrics["dropped"].values() for count in by.values())
    say(
        f"  {metrics['train_documents']} training and {metrics['heldout_documents']} held-out documents kept, {gone} "
        f"dropped, {metrics['lines_removed']} repeated lines removed, {sum(metrics['found'].values())} private details "
        f"found; {format_bytes(metrics['train_bytes'])} of training text"
    )
