"""What all our HTML pages have in common: one page that needs nothing but itself.

Owns the frame, the base of the look, escaping, tables and tiles. No script, no font, no image, nothing fetched: a page
says so to the browser too, in its content security policy. Every text is escaped, because names and excerpts come from
documents that anybody may have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2228; --soft: #5b6570; --line: #d9dee4; --paper: #fff; --well: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa4ae; --line: #343b43; --paper: #14181c;
  --well: #1e242a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 50rem; } .soft { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.tile { background: var(--well); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } td.n, td.w { white-space: nowrap; }
summary { cursor: pointer; }
pre { background: var(--well); padding: .6rem .8rem; border-radius: .4rem; white-space: pre-wrap; margin: .3rem 0;
  overflow-wrap: anywhere; font: .8rem/1.45 ui-monospace, monospace; max-height: 16rem; overflow-y: auto; }
figure { margin: .8rem 0 0; } svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
.legend { font-size: .85rem; color: var(--soft); } .legend > span { white-space: nowrap; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin: 0 .35em 0 .9em; }
@media (max-width: 40rem) { h2 { margin-top: 2rem; } table { font-size: .82rem; } th, td { padding-right: .7rem; } }
"""


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """The whole page; `style` is what it adds to the base, `body` is HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Escaped, with what is no character of a page shown as a mark."""
    shown = (mark if mark.isprintable() or mark in "\n\t" else "\N{REPLACEMENT CHARACTER}" for mark in str(value))
    return escape("".join(shown))


def tiles(cells: Sequence[tuple[str, str]]) -> str:
    """Large figures, each over what it counts."""
    shown = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in cells)
    return f'<div class="tiles">{shown}</div>'


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    """Rows of cells that are HTML already; a head says what class its column has, `marked` which row stands out."""
    kinds = [f' class="{kind}"' if kind else "" for _, kind in heads]
    head = "".join(f"<th{kind}>{text(name)}</th>" for (name, _), kind in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr{' class=marked' if number == marked else ''}>"
        f"{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(caption: str, legend: Sequence[tuple[str, str]], parts: Sequence[str], width: int, height: int) -> str:
    """A drawing of SVG parts; the legend is pairs of a colour, as the style names it, and what it stands for."""
    keys = " ".join(
        f'<span><span class="key" style="background:var(--{colour})"></span>{text(name)}</span>'
        for colour, name in legend
    )
    return (
        f'<figure><figcaption>{text(caption)} <span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(caption)}">{"".join(parts)}</svg></figure>'
    )
