"""The report of `report.py` as one HTML page that needs nothing but itself.

Owns the look. No script, no font, no image, nothing fetched: the page says so to the browser too, in its content
security policy. Every text is escaped, because names and excerpts come from documents that anybody may have written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from forge_ray.storage import TEMP_PREFIX, translated
from forge_ray.telemetry import format_bytes, format_s

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2228; --soft: #5b6570; --line: #d9dee4; --paper: #fff; --well: #f4f6f8;
  --kept: #2e7d5b; --dropped: #c2601d; --skipped: #8b949e; --forgotten: #7554b8; --before: #9aa7b5; --after: #2f6fd0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa4ae; --line: #343b43; --paper: #14181c;
  --well: #1e242a; --kept: #4cae83; --dropped: #e0853f; --skipped: #77818b; --forgotten: #a68be0; --before: #5d6a77;
  --after: #6ea3f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.tile { background: var(--well); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { width: 30%; min-width: 6rem; } .bar i { display: block; height: .7rem; margin-top: .35rem; border-radius: 2px;
  min-width: 2px; background: var(--dropped); } .bar i.skipped { background: var(--skipped); }
.bar i.forgotten { background: var(--forgotten); }
details { margin: .4rem 0; border-bottom: 1px solid var(--line); padding-bottom: .4rem; }
summary { cursor: pointer; } .example { margin: .6rem 0 1rem; }
pre { background: var(--well); padding: .6rem .8rem; border-radius: .4rem; white-space: pre-wrap; margin: .3rem 0;
  overflow-wrap: anywhere; font: .82rem/1.45 ui-monospace, monospace; max-height: 16rem; overflow-y: auto; }
figure { margin: .8rem 0 0; } svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } .legend { font-size: .85rem; color: var(--soft); }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin: 0 .35em 0 .9em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
@media (max-width: 40rem) { .bar { display: none; } h2 { margin-top: 2rem; } table { font-size: .82rem; }
  th, td { padding-right: .7rem; } svg text { font-size: 14px; } }
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
        f'<p class="soft">{_text(" from ".join(reversed(report["build"].values())))}, {_text(report["created"])}</p>',
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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>Documents of {_text(ref)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    """Escaped, with what is no character of a page shown as a mark."""
    text = "".join(mark if mark.isprintable() or mark in "\n\t" else "\N{REPLACEMENT CHARACTER}" for mark in str(value))
    return escape(text)


def _totals(report: Mapping[str, Any]) -> str:
    totals = report["totals"]
    tiles = [
        (f"{totals['documents']:,}", "documents found"),
        (f"{totals['kept']:,}", f"kept, {_share(totals['kept'], totals['documents'])}"),
        (format_bytes(totals["bytes_in"]), "of text before"),
        (format_bytes(totals["bytes_out"]), f"after, {_share(totals['bytes_out'], totals['bytes_in'])}"),
        (f"{totals['tokens']:,}", "tokens in shards"),
        (f"{report['lines_removed']:,}", "repeated lines removed"),
    ]
    shown = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in tiles
    )
    return f'<div class="tiles">{shown}</div>{_stack(totals)}'


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
            _text(row["step"]),
            _text(row["reason"]),
            f"{row['documents']:,}",
            format_bytes(row["bytes"]) if row["bytes"] else "",
            f'<i class="{_text(row["fate"])}" style="width:{100 * row["documents"] / most:.1f}%"></i>',
        ]
        for row in rows
    ]
    parts = [
        "<h2>What was left out, and why</h2>",
        _table([("step", ""), ("reason", ""), ("documents", "n"), ("bytes", "n"), ("", "bar")], cells),
    ]
    shown = [row for row in rows if row["examples"]]
    return [*parts, *(["<h2>Examples</h2>"] if shown else []), *(_examples(row) for row in shown)]


def _examples(row: Mapping[str, Any]) -> str:
    items = []
    for example in row["examples"]:
        facts = [example["detail"], f"kept instead: {example['duplicate_of']}" if example["duplicate_of"] else ""]
        said = "; ".join(_text(fact) for fact in facts if fact)
        excerpt = f"<pre>{_text(example['excerpt'])}</pre>" if example["excerpt"] else ""
        items.append(
            f'<div class="example"><code>{_text(example["id"])}</code> '
            f'<span class="soft">{_text(example["source"])}</span>'
            f"{f'<p>{said}</p>' if said else ''}{excerpt}</div>"
        )
    head = _text(row["step"] if row["step"] == row["reason"] else f"{row['step']}: {row['reason']}")
    return (
        f'<details><summary>{head} <span class="soft">{row["documents"]:,}</span></summary>{"".join(items)}</details>'
    )


def _private(report: Mapping[str, Any]) -> list[str]:
    figures = (report["detectors"] or {}).get("ours", {})
    columns = [figures.get(name, {}) for name in ("recall", "recall_bare", "precision")]
    cells = [
        [
            _text(row["kind"]),
            f"{row['found']:,}",
            f"{row['documents']:,}",
            _text(row["action"]),
            *(_percent(column.get(row["kind"])) for column in columns),
        ]
        for row in report["private"]
    ]
    heads = [("kind", ""), ("found", "n"), ("in documents", "n"), ("action", "")]
    heads += [("recall", "n"), ("recall of bare values", "n"), ("precision", "n")]
    return [
        "<h2>Private data</h2>",
        _table(heads, cells),
        f'<p class="soft">{_text(_measured(report["detectors"]))}</p>',
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
                _text(row["name"]),
                f"{row.get('documents', 0):,}",
                f"{row.get('kept', 0):,}",
                format_bytes(row.get("bytes_in", 0)),
                format_bytes(row.get("bytes_out", 0)),
                f"{row.get('tokens', 0):,}",
            ]
            for row in rows
        ]
        parts += [f"<h2>{_TITLES[name]}</h2>", _table([(name, ""), *heads], cells)]
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
                f'fill="var(--{name})"><title>{_text(said)}</title></rect>'
            )
    every = max(1, -(-len(edges) // 7))
    for number, edge in enumerate(edges):
        if number % every == 0:
            marks.append(f'<text x="{left + number * slot:.1f}" y="{height - 8}">{_text(shown(edge))}</text>')
    marks.append(f'<text x="{left}" y="14">{most:,} documents in the highest bar</text>')
    keys = "".join(f'<span class="key" style="background:var(--{name})"></span>{name}' for name in series)
    legend = f' <span class="legend">{keys}</span>' if len(series) > 1 else ""
    return (
        f"<figure><figcaption>{_text(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)}">{"".join(marks)}</svg></figure>'
    )


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
    return ["<h2>Duplicates</h2>", _table(heads, cells)]


def _seconds(seconds: Mapping[str, float]) -> list[str]:
    cells = [[_text(name), format_s(value)] for name, value in sorted(seconds.items(), key=lambda item: -item[1])]
    return (
        ["<h2>Work of the steps within documents</h2>", _table([("step", ""), ("core time", "n")], cells)]
        if cells
        else []
    )


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells that are HTML already; a head says what class its column has."""
    kinds = [f' class="{kind}"' if kind else "" for _, kind in heads]
    head = "".join(f"<th{kind}>{_text(name)}</th>" for (name, _), kind in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _percent(frac: float | None) -> str:
    return "" if frac is None else f"{frac:.1%}"
