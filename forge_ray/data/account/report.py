"""The account of a build for `forge data report`: what was found, kept and left out, why, and how it looks in numbers.

Owns counting the ledger and choosing examples. The page is `report_page.py`; whatever is shown of a document has passed
`excerpts.py`, so that the report leaks nothing that the finders of private data can find. What they are worth is stated
beside it (`privacy.json`, written by `bench/privacy.py`).

Cost: reads the ledger once (once more for each two million duplicates) in batches, and the parts that hold an example.
Memory does not grow with the corpus.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappush, heapreplace
from importlib import resources
from typing import TYPE_CHECKING, Any

from forge_ray.data.account import builds, forget, ledger
from forge_ray.data.account.builds import Build, File
from forge_ray.data.account.excerpts import Shown, privacy_config
from forge_ray.data.pii.privacy import KINDS
from forge_ray.telemetry import format_bytes

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

DETECTORS = "privacy.json"
OTHERS = "(others)"
_MOST_NAMES = 40
_MOST_COUNTED = 10_000
_CLUSTERS_AT_ONCE = 2_000_000
_COLUMNS = (
    *("id", "origin", "licence", "language", "split", "source", "bytes_in", "bytes_out", "fate", "step", "reason"),
    *("detail", "duplicate_of", "found", "lines_removed", "tokens"),
)
_GROUPS = {"source": "origin", "language": "language", "licence": "licence", "split": "split"}


def gather(build: Build, num_examples: int = 3, seed: int = 1) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        build: What it is about.
        num_examples: Documents shown for each reason.
        seed: Chooses them.
    """
    hidden = {stone["id"] for stone in forget.tombstones(build.last.workspace)}  # no example of what is to be forgotten
    account = _Account(num_examples, seed, hidden)
    for file in builds.files(build):
        for table in _tables(file):
            account.add(table, file.part)
    show = Shown(build)
    return {
        "build": build.refs,
        "created": build.last.manifest.created,
        "totals": account.totals(),
        "left_out": account.left_out(build, show),
        "by": account.groups(show),
        "private": _private(build, account),
        "lines_removed": account.lines_removed,
        "sizes": {name: _histogram(counts) for name, counts in account.sizes.items()},
        "clusters": _clusters(build, account.num_copies),
        "seconds": dict(build.curate.metrics.get("seconds", {})) if build.curate else {},
        "detectors": detectors(),
        "names_looked_for": show.finds_names,
        "seed": seed,
    }


def detectors() -> dict[str, Any] | None:
    """Recall and precision of the finders as they were last measured; none where that file is not there."""
    resource = resources.files("forge_ray.data.pii") / DETECTORS
    return json.loads(resource.read_text(encoding="utf-8")) if resource.is_file() else None


# --------------------------------------------------------------------------------------------------------- counting


def _tables(file: File) -> Iterator[pa.Table]:
    """The rows of a file with all columns that are counted; what it lacks is null, and kept is who nobody dropped."""
    import pyarrow as pa

    types = {field.name: field.type for field in ledger.schema()}
    for batch in file.batches(list(_COLUMNS)):
        columns = {
            name: batch[name] if name in batch.schema.names else pa.nulls(batch.num_rows, types[name])
            for name in _COLUMNS
        }
        if not file.name.startswith(ledger.PREFIX):
            columns["fate"] = pa.array([ledger.KEPT] * batch.num_rows)
            columns["split"] = pa.array([file.part.partition("-")[0]] * batch.num_rows)
        yield pa.table(columns)


class _Account:
    """Counts over all batches, and the candidates for examples."""

    def __init__(self, num_examples: int, seed: int, hidden: set[str]) -> None:
        import numpy as np

        self._hidden = hidden
        self.num_examples = num_examples
        self._start = (seed * 0x9E3779B97F4A7C15) % 2**64
        self.reasons: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
        self.names: dict[str, dict[str, Counter[str]]] = {name: defaultdict(Counter) for name in _GROUPS}
        self.found: Counter[str] = Counter()
        self.holding: Counter[str] = Counter()
        self.sizes = {name: np.zeros(64, np.int64) for name in ("bytes before", "bytes after", "tokens")}
        self.lines_removed = self.num_copies = 0
        self._examples: dict[tuple[str, str, str], list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
        self._drawn = 0

    def add(self, table: pa.Table, part: str) -> None:
        """Counts a batch."""
        import pyarrow.compute as pc

        kept = table.filter(pc.equal(table["fate"], ledger.KEPT))
        gone = table.filter(pc.not_equal(table["fate"], ledger.KEPT))
        for row in _sums(table, ["fate", "step", "reason"], ["bytes_in"]):
            cell = self.reasons[row["fate"], row["step"] or "", row["reason"] or ""]
            cell[0] += row["count_all"]
            cell[1] += row["bytes_in_sum"] or 0
        for name, column in _GROUPS.items():
            self._add_group(name, column, table, kept)
        self._add_private(table)
        for name, rows, column in (
            ("bytes before", table, "bytes_in"),
            ("bytes after", kept, "bytes_out"),
            ("tokens", kept, "tokens"),
        ):
            self.sizes[name] += _log2_counts(rows[column])
        self.lines_removed += pc.sum(table["lines_removed"]).as_py() or 0
        copies = pc.and_(pc.is_in(table["step"], _text_array(("exact", "near"))), pc.is_valid(table["duplicate_of"]))
        self.num_copies += pc.sum(copies).as_py() or 0
        self._draw(gone, part)

    def _add_group(self, name: str, column: str, table: pa.Table, kept: pa.Table) -> None:
        groups = self.names[name]
        for row in _sums(table, [column], ["bytes_in"]):
            counts = groups[row[column] or ""]
            counts.update(documents=row["count_all"], bytes_in=row["bytes_in_sum"] or 0)
        for row in _sums(kept, [column], ["bytes_out", "tokens"]):
            counts = groups[row[column] or ""]
            counts.update(kept=row["count_all"], bytes_out=row["bytes_out_sum"] or 0, tokens=row["tokens_sum"] or 0)
        if len(groups) > 2 * _MOST_COUNTED:  # a record's licence or language may say anything
            self.names[name] = defaultdict(Counter, _folded(groups, _MOST_COUNTED))

    def _add_private(self, table: pa.Table) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        pair = pa.struct([("key", pa.string()), ("value", pa.int32())])
        pairs = pc.list_flatten(
            table["found"].combine_chunks().cast(pa.list_(pair))
        )  # a map itself cannot be flattened
        if not len(pairs):
            return
        counts = pa.table({"kind": pc.struct_field(pairs, [0]), "count": pc.struct_field(pairs, [1])})
        for row in _sums(counts, ["kind"], ["count"]):
            self.found[row["kind"]] += row["count_sum"]
            self.holding[row["kind"]] += row["count_all"]

    def _draw(self, gone: pa.Table, part: str) -> None:
        """Keeps for each reason those whose ids come first from a seeded start on; ids are as good as random."""
        if not self.num_examples:
            return
        columns = ("fate", "step", "reason", "id")
        for i, (fate, step, reason, doc_id) in enumerate(zip(*(gone[n].to_pylist() for n in columns), strict=True)):
            if fate == ledger.FORGOTTEN or doc_id in self._hidden:
                continue
            chosen = self._examples[fate, step or "", reason or ""]
            rank = -((int(doc_id, 16) - self._start) % 2**64)
            if len(chosen) == self.num_examples and rank <= chosen[0][0]:
                continue
            self._drawn += 1
            row = {name: gone[name][i].as_py() for name in ("id", "source", "detail", "duplicate_of")} | {"part": part}
            (heapreplace if len(chosen) == self.num_examples else heappush)(chosen, (rank, self._drawn, row))

    # ---------------------------------------------------------------------------------------------------- results

    def totals(self) -> dict[str, Any]:
        """Documents by fate, bytes and tokens."""
        fates: Counter[str] = Counter()
        for (fate, _, _), (documents, _) in self.reasons.items():
            fates[fate] += documents
        every = self.names["source"].values()
        return {
            "documents": sum(fates.values()),
            **{fate: fates[fate] for fate in (ledger.KEPT, ledger.DROPPED, ledger.SKIPPED, ledger.FORGOTTEN)},
            **{name: sum(counts[name] for counts in every) for name in ("bytes_in", "bytes_out", "tokens")},
        }

    def left_out(self, build: Build, show: Shown) -> list[dict[str, Any]]:
        """A row for each step and reason, the most frequent first, with examples."""
        chosen = {row["id"]: row["part"] for rows in self._examples.values() for _, _, row in rows if row["part"]}
        excerpts = show.excerpts(build, chosen)
        rows = []
        for key, (documents, num_bytes) in self.reasons.items():
            if key[0] == ledger.KEPT:
                continue
            examples = [row for _, _, row in sorted(self._examples.get(key, ()), key=lambda item: -item[0])]
            fate, step, reason = key
            rows.append(
                {
                    "fate": fate,
                    "step": step,
                    "reason": show.text(reason),
                    "documents": documents,
                    "bytes": num_bytes,
                    "examples": [show.example(row, excerpts.get(row["id"])) for row in examples],
                }
            )
        return sorted(rows, key=lambda row: (-row["documents"], row["step"], row["reason"]))

    def groups(self, show: Shown) -> dict[str, list[dict[str, Any]]]:
        """For sources, languages, licences and splits: the largest, and the others together."""
        return {
            name: [
                {"name": show.text(key) or "(none)", **counts} for key, counts in _folded(groups, _MOST_NAMES).items()
            ]
            for name, groups in self.names.items()
        }


def _sums(table: pa.Table, keys: list[str], columns: list[str]) -> list[dict[str, Any]]:
    """Rows and sums of columns for each combination of keys."""
    return table.group_by(keys).aggregate([([], "count_all"), *((column, "sum") for column in columns)]).to_pylist()


def _text_array(values: Iterable[str]) -> pa.Array:
    import pyarrow as pa

    return pa.array(list(values), pa.string())


def _folded(groups: Mapping[str, Counter[str]], most: int) -> dict[str, Counter[str]]:
    """The groups with most documents; the rest as one."""
    ordered = sorted(groups, key=lambda name: (name == OTHERS, -groups[name]["documents"], name))
    kept = {name: groups[name] for name in ordered[:most]}
    for name in ordered[most:]:
        kept[OTHERS] = kept.get(OTHERS, Counter()) + groups[name]
    return kept


def _log2_counts(column: pa.ChunkedArray) -> np.ndarray:
    """How many values have so many bits: bin b holds 2**b to 2**(b+1) - 1."""
    import numpy as np

    values = column.drop_null().to_numpy()
    values = values[values > 0]
    return np.bincount(np.log2(values).astype(np.int64), minlength=64) if len(values) else np.zeros(64, np.int64)


def _histogram(counts: np.ndarray) -> list[dict[str, int]]:
    """Bins from the first to the last that has something."""
    import numpy as np

    used = np.flatnonzero(counts)
    bins = range(used[0], used[-1] + 1) if len(used) else range(0)
    return [{"from": 1 << b, "to": (2 << b) - 1, "count": int(counts[b])} for b in bins]


def _private(build: Build, account: _Account) -> list[dict[str, Any]]:
    config = privacy_config(build)
    return [
        {
            "kind": kind,
            "found": account.found[kind],
            "documents": account.holding[kind],
            "action": getattr(config, kind) if config and config.enabled else "not looked for",
        }
        for kind in KINDS
    ]


def _clusters(build: Build, num_copies: int) -> list[dict[str, int]]:
    """How many documents were kept in the place of how many: sizes of clusters of duplicates, by powers of two.

    A cluster is a document and those that were dropped for it. Clusters are counted some at a time, told by their id.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    counts, documents = np.zeros(64, np.int64), np.zeros(64, np.int64)
    passes = -(-num_copies // _CLUSTERS_AT_ONCE)
    for turn in range(passes):
        sizes: Counter[int] = Counter()
        for file in builds.files(build):
            for batch in file.batches(["duplicate_of", "step"]) if file.name.startswith(ledger.PREFIX) else ():
                rows = pa.table({"of": batch["duplicate_of"], "step": batch["step"]}).drop_null()
                rows = rows.filter(pc.is_in(rows["step"], _text_array(("exact", "near"))))
                for row in _sums(rows, ["of"], []):
                    number = int(row["of"], 16)
                    if number % passes == turn:
                        sizes[number] += row["count_all"]
        totals = np.fromiter(sizes.values(), np.int64, len(sizes)) + 1
        bins = np.log2(totals).astype(np.int64)
        counts += np.bincount(bins, minlength=64)
        documents += np.bincount(bins, weights=totals, minlength=64).astype(np.int64)
    rows = _histogram(counts)
    return [row | {"documents": int(documents[row["from"].bit_length() - 1])} for row in rows]


# ------------------------------------------------------------------------------------------------------------ text


def as_text(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    totals = report["totals"]
    lines = [
        f"{list(report['build'].values())[-1]} of {report['created']}",
        f"{totals['documents']:,} documents found: {totals['kept']:,} kept, {totals['dropped']:,} dropped, "
        f"{totals['skipped']:,} skipped, {totals['forgotten']:,} forgotten",
        f"{format_bytes(totals['bytes_in'])} of text before, {format_bytes(totals['bytes_out'])} after, "
        f"{totals['tokens']:,} tokens; {report['lines_removed']:,} repeated lines removed",
    ]
    if report["left_out"]:
        lines += ["", "Left out"]
        lines += _columns([(row["step"], row["reason"], f"{row['documents']:,}") for row in report["left_out"]])
    private = [row for row in report["private"] if row["found"]]
    if private:
        lines += ["", "Private data"]
        cells = [(row["kind"], f"{row['found']:,} in {row['documents']:,} documents", row["action"]) for row in private]
        lines += _columns(cells)
    lines += ["", "Sources"]
    lines += _columns(
        [
            (row["name"], f"{row['documents']:,} documents", f"{row.get('kept', 0):,} kept")
            for row in report["by"]["source"]
        ]
    )
    return "\n".join(lines)


def _columns(rows: list[tuple[str, str, str]]) -> list[str]:
    rows = [tuple("".join(m if m.isprintable() else "?" for m in cell) for cell in row) for row in rows]  # type: ignore[misc]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {row[0]:<{first}}  {row[1]:<{second}}  {row[2]}".rstrip() for row in rows]
