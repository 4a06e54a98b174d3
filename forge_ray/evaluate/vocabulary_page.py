"""A sweep's report as a person reads it: a page (`page.py`) and text.

Owns how it is drawn. The facts are those of `report.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forge_ray import page
from forge_ray.evaluate.recommendation import mean_bits
from forge_ray.telemetry import format_bytes

_COLOURS = {"own": "var(--own)", "general": "var(--general)", "general tokenizer": "var(--other)"}
_LEGEND = {
    "own": "trained on your documents",
    "general": "general, of the same sizes",
    "general tokenizer": "general tokenizers as they are",
}
_STYLE = """
:root { --own: #1f6feb; --general: #b35900; --other: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --own: #6ea3f2; --general: #e0853f; --other: #8b949e; } }
.why { background: var(--well); border-left: 4px solid var(--own); padding: .6rem 1rem; }
.why p:first-child, tr.marked { font-weight: 600; } tr.marked { background: var(--well); }
th.n { white-space: normal; vertical-align: bottom; } svg text { font-size: 13px; fill: var(--ink); }
svg .faint { fill: var(--soft); }
"""
_WIDTH, _LEFT, _RIGHT, _STEP, _MOST_TYPES = 1000, 250, 90, 26, 8


def as_html(report: Mapping[str, Any]) -> str:
    """The whole page."""
    rows, chosen = report["candidates"], report["recommended"]
    by_tokens = sorted(rows, key=lambda row: row["bytes_per_token"], reverse=True)
    trained = sorted((row for row in rows if row.get("trials")), key=mean_bits)
    body = [
        f"<h1>Recommended: {chosen['vocab_size']:,} entries, pattern {page.text(chosen['pattern'])}</h1>",
        f'<p class="soft">forge tokenizer sweep of {page.text(report["documents"])}, '
        f"{format_bytes(report['heldout_bytes'])} of held-out documents</p>",
        f'<div class="why">{"".join(f"<p>{page.text(text)}</p>" for text in report["why"])}</div>',
        "<h2>Bytes per token on held-out documents</h2>",
        '<p class="soft">More is better: fewer tokens for the same text, so a longer memory and cheaper answers.</p>',
        _legend(rows),
        _bars(by_tokens),
        "<h2>Bits per byte of a small model trained for equal compute</h2>",
        f'<p class="soft">{page.text(_trial_note(report))}</p>',
        _dots(trained),
        "<h2>All figures</h2>",
        _table(_figures(rows), _chosen(rows, chosen)),
        *_types(by_tokens),
        *_terms(report["terms"]),
    ]
    if report["missing"]:
        body.append("<h2>Not compared</h2>")
        body.append("".join(f"<p>{page.text(row['name'])}: {page.text(row['why'])}</p>" for row in report["missing"]))
    return page.document("Vocabulary sweep", body, _STYLE)


def as_text(report: Mapping[str, Any], place: str) -> str:
    """The same for a terminal; `place` is where the page lies."""
    head, *lines = _figures(report["candidates"])
    marked = _chosen(report["candidates"], report["recommended"])
    cells = [["", *head], *(["->" if i == marked else "", *line] for i, line in enumerate(lines))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    table = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    terms = ", ".join(
        f"{row['term']} ({min(row['pieces'].values())}-{max(row['pieces'].values())} pieces elsewhere)"
        for row in report["terms"][:8]
    )
    parts = [
        f"{format_bytes(report['heldout_bytes'])} of held-out documents. {_trial_note(report)}",
        "\n".join(line.rstrip() for line in table),
        "\n".join(report["why"]),
        *([f"Terms that are one token only here: {terms}"] if terms else []),
        *(
            ["\n".join(f"Not compared: {row['name']}, {row['why']}" for row in report["missing"])]
            * bool(report["missing"])
        ),
        f"Report: {place}",
    ]
    return "\n\n".join(parts)


def _trial_note(report: Mapping[str, Any]) -> str:
    small, noise = report["small_model"], report["noise"]
    return (
        f"Less is better. {small['flops']:.1e} floating-point operations each, {small['seq_len']} tokens of context, "
        f"{format_bytes(small['scored_bytes'])} scored; one standard deviation over seeds is "
        f"{noise['bits_per_byte']:.4f} ({noise['degrees_of_freedom']} degrees of freedom). A dearer output projection "
        "leaves fewer steps; at equal size, steps and parameters are equal too."
    )


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head = ["vocabulary", "entries", "bytes/token", "tokens", "embeddings, job's model", "bits/byte", "seeds", "steps"]
    lines = [head]
    for row in rows:
        line = [row["name"], f"{row['vocab_size']:,}", f"{row['bytes_per_token']:.3f}", f"{row['tokens']:,}"]
        line.append(f"{row['embedding_frac']:.0%} of {row['parameters'] / 1e6:.1f} M")
        trials = row.get("trials")
        line += [f"{mean_bits(dict(row)):.4f}", str(len(trials)), str(trials[0]["steps"])] if trials else ["", "", ""]
        lines.append(line)
    return lines


def _chosen(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> int:
    return next(i for i, r in enumerate(rows) if r["whose"] == "own" and {k: r[k] for k in chosen} == dict(chosen))


def _table(cells: Sequence[Sequence[str]], marked: int | None = None) -> str:
    head, *lines = cells
    heads = [(name, "n" if number else "") for number, name in enumerate(head)]
    return page.table(heads, [[page.text(cell) for cell in line] for line in lines], marked)


def _legend(rows: Sequence[Mapping[str, Any]]) -> str:
    there = {row["whose"] for row in rows}
    keys = (f'<span class="key" style="background:{_COLOURS[w]}"></span>{_LEGEND[w]}' for w in _COLOURS if w in there)
    return f'<p class="soft">{"".join(keys)}</p>'


def _bars(rows: Sequence[Mapping[str, Any]]) -> str:
    scale = (_WIDTH - _LEFT - _RIGHT) / max(row["bytes_per_token"] for row in rows)
    parts = []
    for number, row in enumerate(rows):
        y, width = number * _STEP, row["bytes_per_token"] * scale
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 17}" text-anchor="end">{page.text(row["name"])}</text>',
            f'<rect x="{_LEFT}" y="{y + 4}" width="{width:.1f}" height="{_STEP - 8}" rx="2" '
            f'fill="{_COLOURS[row["whose"]]}"/>',
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 17}">{row["bytes_per_token"]:.2f}</text>',
        ]
    return _svg(parts, len(rows) * _STEP, "bytes per token by vocabulary")


def _dots(rows: Sequence[Mapping[str, Any]]) -> str:
    every = [trial["bits_per_byte"] for row in rows for trial in row["trials"]]
    low, high = min(every), max(every)
    low, high = low - 0.05 * (high - low or low), high + 0.05 * (high - low or low)
    at = lambda bits: _LEFT + (bits - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)
    height = len(rows) * _STEP
    parts = []
    for tick in (low + (high - low) * share for share in (0.0, 0.25, 0.5, 0.75, 1.0)):
        parts += [
            f'<line x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="0" y2="{height}" stroke="var(--line)"/>',
            f'<text class="faint" x="{at(tick):.1f}" y="{height + 18}" text-anchor="middle">{tick:.3f}</text>',
        ]
    for number, row in enumerate(rows):
        y = number * _STEP + _STEP / 2
        mean, colour = mean_bits(dict(row)), _COLOURS[row["whose"]]
        places = [at(trial["bits_per_byte"]) for trial in row["trials"]]
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 5}" text-anchor="end">{page.text(row["name"])}</text>',
            *(f'<circle cx="{place:.1f}" cy="{y}" r="4" fill="none" stroke="{colour}"/>' for place in places),
            f'<line x1="{at(mean):.1f}" x2="{at(mean):.1f}" y1="{y - 8}" y2="{y + 8}" stroke-width="3" '
            f'stroke="{colour}"/>',
            f'<text x="{_WIDTH - _RIGHT + 14}" y="{y + 5}">{mean:.4f}</text>',
        ]
    return _svg(parts, height + 26, "bits per byte by vocabulary")


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _types(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    titles = {"origin": "by source", "language": "by language", "suffix": "by kind of file"}
    for what, title in titles.items():
        sizes = {name: cell["bytes"] for name, cell in rows[0]["by"].get(what, {}).items()}
        if len(sizes) < 2:
            continue
        names = sorted(sizes, key=lambda name: -sizes[name])[:_MOST_TYPES]
        head = ["bytes per token", *(f"{name} ({format_bytes(sizes[name])})" for name in names)]
        lines = [[row["name"], *(f"{row['by'][what][name]['bytes_per_token']:.2f}" for name in names)] for row in rows]
        parts += [f"<h2>Bytes per token {title}</h2>", _table([head, *lines])]
    return parts


def _terms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = list(rows[0]["pieces"])
    head = ["word", "times in held-out text", *(f"pieces: {name}" for name in names)]
    lines = [[row["term"], f"{row['count']:,}", *(str(row["pieces"][name]) for name in names)] for row in rows]
    return [
        "<h2>Words of the domain that are one token only here</h2>",
        '<p class="soft">Frequent long words of the held-out documents; those that others cut most come first.</p>',
        _table([head, *lines]),
    ]
