"""The report of `report.py` as one HTML page (`page.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forge_ray import page
from forge_ray.storage import TEMP_PREFIX, translated
from forge_ray.telemetry import format_bytes, format_s

_STYLE = """
:root { --kept: #2e7d5b; --dropped: #c2601d; --skipped: #8b949e; --forgotten: #7554b8; --before: #9aa7b5;
  --after: #2f6fd0; }
@media (prefers-color-scheme: dark) { :root { --kept: #4cae83; --dropped: #e0853f; --skipped: #77818b;
  --forgotten: #a68be0; --before: #5d6a77; --after: #6ea3f2; } }
.bar { width: 30%; min-width: 6rem; } .bar i { display: block; height: .7rem; margin-top: .35rem; border-radius: 2px;
  min-width: 2px; background: var(--dropped); } .bar i.skipped { background: var(--skipped); }
.bar i.forgotten { background: var(--forgotten); }
details { margin: .4rem 0; border-bottom: 1px solid var(--line); padding-bottom: .4rem; }
.example { margin: .6rem 0 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
@media (max-width: 40rem) { .bar { display: none; } svg text { font-size: 14px; } }
"""
_TITLES = {"source": "Sources", "language": "Languages", "licence": "Licences", "split": "Training and held out"}
_FATES = ("kept", "dropped", "skipped", "forgotten")


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the page; it appears whole or not at all.

    Raises:
        StorageError: The folder is not there or cannot be written.
    """
    with translated(str(path)):
        temp = path.with_name(f"{TEMP_PREFIX}{os.getpid()}-{path.name}")
        try:
            temp.write_text(as_html(report), encoding="utf-8")
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)


def as_html(report: Mapping[str, Any]) -> str:
    """The whole page."""
    ref = list(report["build"].values())[-1]
    body = [
        "<h1>What became of the documents</h1>",
        f'<p class="soft">{page.text(" from ".join(reversed(report["build"].values())))}, '
        f"{page.text(report['created'])}</p>",
        _totals(report),
        *_left_out(report["left_out"]),
        *_private(report),
        *_groups(report["by"]),
        *_sizes(report["sizes"]),
        *_clusters(report["clusters"]),
        *_seconds(report["seconds"]),
        '<p class="soft">Made by <code>forge data report</code>. Names and excerpts have passed the finders of private '
        "data, which replace what they find; names of persons were "
        f"{'looked for' if report['names_looked_for'] else 'not looked for'}. "
        f"Examples are a random choice (seed {report['seed']}).</p>",
    ]
    return page.document(f"Documents of {ref}", body, _STYLE)


def _totals(report: Mapping[str, Any]) -> str:
    totals = report["totals"]
    cells = [
        (f"{totals['documents']:,}", "documents found"),
        (f"{totals['kept']:,}", f"kept, {_share(totals['kept'], totals['documents'])}"),
        (format_bytes(totals["bytes_in"]), "of text before"),
        (format_bytes(totals["bytes_out"]), f"after, {_share(totals['bytes_out'], totals['bytes_in'])}"),
        (f"{totals['tokens']:,}", "tokens in shards"),
        (f"{report['lines_removed']:,}", "repeated lines removed"),
    ]
    return page.tiles(cells) + _stack(totals)


def _stack(totals: Mapping[str, int]) -> str:
    """Kept, dropped, skipped and forgotten as one bar."""
    every = max(1, totals["documents"])
    rects, keys, x = [], [], 0.0
    for fate in _FATES:
        if not totals[fate]:
            continue
        width = max(1000 * totals[fate] / every, 2)
        rects.append(
            f'<rect x="{x:.1f}" width="{width:.1f}" height="22" fill="var(--{fate})"><title>{fate}</title></rect>'
        )
        keys.append(f'<span class="key" style="background:var(--{fate})"></span>{fate} {totals[fate]:,}')
        x += width
    return (
        f'<figure><svg viewBox="0 0 1000 22" preserveAspectRatio="none" style="height:1.4rem" role="img" '
        f'aria-label="fates of all documents">{"".join(rects)}</svg>'
        f'<figcaption class="legend">{"".join(keys)}</figcaption></figure>'
    )


def _left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    most = max(row["documents"] for row in rows)
    cells = [
        [
            page.text(row["step"]),
            page.text(row["reason"]),
            f"{row['documents']:,}",
            format_bytes(row["bytes"]) if row["bytes"] else "",
            f'<i class="{page.text(row["fate"])}" style="width:{100 * row["documents"] / most:.1f}%"></i>',
        ]
        for row in rows
    ]
    parts = [
        "<h2>What was left out, and why</h2>",
        page.table([("step", ""), ("reason", ""), ("documents", "n"), ("bytes", "n"), ("", "bar")], cells),
    ]
    shown = [row for row in rows if row["examples"]]
    return [*parts, *(["<h2>Examples</h2>"] if shown else []), *(_examples(row) for row in shown)]


def _examples(row: Mapping[str, Any]) -> str:
    items = []
    for example in row["examples"]:
        facts = [example["detail"], f"kept instead: {example['duplicate_of']}" if example["duplicate_of"] else ""]
        said = "; ".join(page.text(fact) for fact in facts if fact)
        excerpt = f"<pre>{page.text(example['excerpt'])}</pre>" if example["excerpt"] else ""
        items.append(
            f'<div class="example"><code>{page.text(example["id"])}</code> '
            f'<span class="soft">{page.text(example["source"])}</span>'
            f"{f'<p>{said}</p>' if said else ''}{excerpt}</div>"
        )
    head = page.text(row["step"] if row["step"] == row["reason"] else f"{row['step']}: {row['reason']}")
    return (
        f'<details><summary>{head} <span class="soft">{row["documents"]:,}</span></summary>{"".join(items)}</details>'
    )


def _private(report: Mapping[str, Any]) -> list[str]:
    figures = (report["detectors"] or {}).get("ours", {})
    columns = [figures.get(name, {}) for name in ("recall", "recall_bare", "precision")]
    cells = [
        [
            page.text(row["kind"]),
            f"{row['found']:,}",
            f"{row['documents']:,}",
            page.text(row["action"]),
            *(_percent(column.get(row["kind"])) for column in columns),
        ]
        for row in report["private"]
    ]
    heads = [("kind", ""), ("found", "n"), ("in documents", "n"), ("action", "")]
    heads += [("recall", "n"), ("recall of bare values", "n"), ("precision", "n")]
    return [
        "<h2>Private data</h2>",
        page.table(heads, cells),
        f'<p class="soft">{page.text(_measured(report["detectors"]))}</p>',
    ]


def _measured(detectors: Mapping[str, Any] | None) -> str:
    """Where the figures of the finders come from."""
    if not detectors:
        return "Recall and precision of the finders were not measured: bench/privacy.py --write does it."
    versions = ", ".join(f"{name} {version}" for name, version in detectors.get("versions", {}).items())
    when = detectors.get("date") or detectors.get("created")
    falses = [
        f"{row['false_per_mb']:.1f} per MB of {name}"
        for name, row in detectors.get("ours", {}).get("texts", {}).items()
        if isinstance(row, Mapping) and "false_per_mb" in row
    ]
    return (
        "Recall and precision of the finders on a generated, labelled set"
        + (f", measured on {when}" if when else "")
        + f" by bench/privacy.py with {versions}"
        + (f"; false finds in real text: {', '.join(falses)}" if falses else "")
        + ". Bare values stand in a sentence that says nothing about them. These are not figures of these documents."
    )


def _groups(by: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    heads = [("documents", "n"), ("kept", "n"), ("bytes before", "n"), ("after", "n"), ("tokens", "n")]
    parts = []
    for name, rows in by.items():
        if len(rows) < 2 and name in ("language", "licence"):  # one row would say what the totals say
            continue
        cells = [
            [
                page.text(row["name"]),
                f"{row.get('documents', 0):,}",
                f"{row.get('kept', 0):,}",
                format_bytes(row.get("bytes_in", 0)),
                format_bytes(row.get("bytes_out", 0)),
                f"{row.get('tokens', 0):,}",
            ]
            for row in rows
        ]
        parts += [f"<h2>{_TITLES[name]}</h2>", page.table([(name, ""), *heads], cells)]
    return parts


def _sizes(sizes: Mapping[str, Sequence[Mapping[str, int]]]) -> list[str]:
    before, after, tokens = sizes["bytes before"], sizes["bytes after"], sizes["tokens"]
    plots = []
    if before or after:
        plots.append(_plot("Document size", {"before": before, "after": after}, format_bytes))
    if tokens:
        plots.append(_plot("Tokens of a document", {"after": tokens}, lambda number: f"{number:,.0f}"))
    return ["<h2>Sizes</h2>", f'<div class="plots">{"".join(plots)}</div>'] if plots else []


def _plot(title: str, series: Mapping[str, Sequence[Mapping[str, int]]], shown: Callable[[float], str]) -> str:
    """A histogram over powers of two; the bars of several series stand side by side."""
    edges = sorted({row["from"] for rows in series.values() for row in rows})
    edges = [1 << b for b in range(edges[0].bit_length() - 1, edges[-1].bit_length())]
    most = max(row["count"] for rows in series.values() for row in rows)
    left, width, height = 8, 520, 190
    slot = (width - 2 * left) / len(edges)
    bar = slot * 0.8 / len(series)
    marks = [f'<line x1="{left}" x2="{width - left}" y1="{height - 24}" y2="{height - 24}" stroke="var(--line)"/>']
    for number, (name, rows) in enumerate(series.items()):
        for row in rows:
            x = left + edges.index(row["from"]) * slot + slot * 0.1 + number * bar
            tall = max((height - 46) * row["count"] / most, 1.5 if row["count"] else 0)
            said = f"{shown(row['from'])} to {shown(row['to'] + 1)}: {row['count']:,} {name if len(series) > 1 else ''}"
            marks.append(
                f'<rect x="{x:.1f}" y="{height - 24 - tall:.1f}" width="{bar:.1f}" height="{tall:.1f}" '
                f'fill="var(--{name})"><title>{page.text(said)}</title></rect>'
            )
    every = max(1, -(-len(edges) // 7))
    for number, edge in enumerate(edges):
        if number % every == 0:
            marks.append(f'<text x="{left + number * slot:.1f}" y="{height - 8}">{page.text(shown(edge))}</text>')
    marks.append(f'<text x="{left}" y="14">{most:,} documents in the highest bar</text>')
    keys = [(name, name) for name in series] if len(series) > 1 else []
    return page.figure(title, keys, marks, width, height)


def _clusters(rows: Sequence[Mapping[str, int]]) -> list[str]:
    if not rows:
        return []
    cells = [
        [
            f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} to {row['to']:,}",
            f"{row['count']:,}",
            f"{row['documents']:,}",
            f"{row['documents'] - row['count']:,}",
        ]
        for row in rows
        if row["count"]
    ]
    heads = [("documents that say the same", ""), ("clusters", "n"), ("documents", "n"), ("dropped", "n")]
    return ["<h2>Duplicates</h2>", page.table(heads, cells)]


def _seconds(seconds: Mapping[str, float]) -> list[str]:
    cells = [[page.text(name), format_s(value)] for name, value in sorted(seconds.items(), key=lambda item: -item[1])]
    return (
        ["<h2>Work of the steps within documents</h2>", page.table([("step", ""), ("core time", "n")], cells)]
        if cells
        else []
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _percent(frac: float | None) -> str:
    return "" if frac is None else f"{frac:.1%}"
