"""The ledger of `goodput.py` as one HTML page (`page.py`).

Owns how it is told and drawn, and how a million steps become a few hundred points.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_ray import page
from forge_ray.telemetry import format_s
from forge_ray.train.goodput import PARTS, Account, Fault, Ledger, Span, Verdict

_STYLE = """
:root { --loss: #2f6fd0; --useful: #2e7d5b; --recomputed: #d98b1f; --stalled: #c2372e; --saving: #2f6fd0;
  --data: #7554b8; --waiting: #9aa4ae; --fault: #c2372e; --announced: #d98b1f; --guard: #7554b8; }
@media (prefers-color-scheme: dark) { :root { --loss: #6ea3f2; --useful: #4cae83; --recomputed: #e5a64a;
  --stalled: #ef6a60; --saving: #6ea3f2; --data: #a68be0; --waiting: #6a747e; --fault: #ef6a60; --announced: #e5a64a;
  --guard: #a68be0; } }
td { overflow-wrap: anywhere; } summary { color: var(--soft); }
@media (max-width: 40rem) { svg text { font-size: 20px; } }
"""
_MEANINGS = {
    "useful": "steps that were committed, once each",
    "recomputed": "slots and steps that had been computed before",
    "stalled": "forming a group anew after a loss",
    "saving": "training stood still for a checkpoint",
    "data": "a step waited for its samples",
    "waiting": "nobody trained: start-up, or driver or all workers gone",
}
_WHATS = {
    "died": "process died",
    "gone": "node lost",
    "lost": "worker lost",
    "hang": "hung",
    "digest": "state differed",
    "notice": "preemption notice",
    "drained": "drained",
    "refused": "newcomer refused",
    "restart": "driver restarted",
}
_ANNOUNCED = ("notice", "drained", "refused")
_WIDTH, _LEFT, _RIGHT = 1000, 56, 30
_POINTS, _BARS = 600, 160
_MOST_ROWS, _MOST_NOTES, _MOST_STACKS, _STACK_CHARS, _MOST_SAMPLES = 1000, 100, 20, 4000, 50


def as_html(events: Iterable[Mapping[str, Any]], run_id: str, usd_per_node_hour: float = 0.0) -> str:
    """The whole page.

    Args:
        events: Records of the run in the order of time, as `Events.read` gives them.
        usd_per_node_hour: 0 where nobody knows it.

    Cost: 20 CPU seconds and 0.7 GB for a million steps (2026-11); the page stays below 1 MB.
    """
    run = _replayed(events, usd_per_node_hour)
    account = run.account
    body = [
        "<h1>How the run went</h1>",
        f'<p class="soft">pretrain/{page.text(run_id)}</p>',
        f"<p>{page.text(_summary(account))}</p>",
        _tiles(account),
        *_loss(run),
        *_seconds(run, usd_per_node_hour),
        *_faults(run),
        *_verdicts(run),
        *_notes(run),
        '<p class="soft">Made by <code>forge run</code> from the events of the run. A stall runs from when a fault was '
        "noticed to the next committed step. Goodput is useful seconds by wall seconds: what a step loses in speed "
        "while workers are missing is not in it, but in tokens/s.</p>",
    ]
    return page.document(f"Run {run_id}", body, _STYLE)


@dataclass
class _Run:
    """What the page needs: (loss, world size) by step as committed last, the spans with their step time, and notes."""

    account: Account
    steps: dict[int, tuple[float, int]] = field(default_factory=dict)
    spans: list[tuple[Span, float]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)

    @property
    def begin_s(self) -> float:
        return self.spans[0][0].begin_s


def _replayed(events: Iterable[Mapping[str, Any]], usd_per_node_hour: float) -> _Run:
    ledger = Ledger(usd_per_node_hour)
    run = _Run(ledger.account())
    for event in events:
        span = ledger.add(event)
        note = _note(event)
        if note:
            run.notes.append((int(event.get("step") or 0), note))
        if span:
            run.spans.append((span, float(event.get("wall_s") or 0.0)))
            loss = event.get("loss")
            run.steps[int(event.get("step") or 0)] = (
                float(loss) if isinstance(loss, int | float) else math.nan,
                int(event.get("world_size") or 0),
            )
    run.account = ledger.account()
    if run.spans:
        run.spans.append((_tail(run), 0.0))
    return run


def _note(event: Mapping[str, Any]) -> str:
    """What is no fault and yet worth to know."""
    if event.get("event") == "checkpoint_failed":
        return f"no checkpoint ({event.get('tier')}): {event.get('why')}"
    if event.get("event") == "bits":
        return f"went on as {event.get('now')}, where it had been {event.get('before')}: the weights' bits may differ"
    return ""


def _tail(run: _Run) -> Span:
    """What came after the last step."""
    end_s = run.spans[-1][0].end_s
    settled = {part: sum(span.parts.get(part, 0.0) for span, _ in run.spans) for part in PARTS}
    rest = {part: max(0.0, getattr(run.account, f"{part}_s") - settled[part]) for part in PARTS}
    return Span(end_s, run.begin_s + run.account.wall_s, rest)


# ------------------------------------------------------------------------------------------------------------ figures


def _summary(account: Account) -> str:
    """The run in a sentence or two."""
    if not account.num_steps:
        return "No step was committed."
    steps = f"{account.num_steps:,} step{'s' if account.num_steps > 1 else ''} in {format_s(account.wall_s)}"
    if not account.faults:
        return f"{steps}, undisturbed."
    causes = ", ".join(f"{_WHATS.get(cause, cause)} ({count:,})" for cause, count in account.faults_by_cause.items())
    again = (
        f"{_count(account.num_repeated, 'step')} had to be repeated" if account.num_repeated else "no step was repeated"
    )
    return f"{steps}, with {_count(len(account.faults), 'fault')}: {causes}. {again.capitalize()}."


def _tiles(account: Account) -> str:
    stalls = [account.stall_s(share) for share in (0.5, 0.95, 1.0)]
    cells = [
        (_share(account.goodput_frac), "goodput"),
        (_share(account.ettr_frac), "effective training time"),
        (_short_count(account.num_tokens), "tokens committed"),
        (f"{account.tokens_per_s or 0:,.0f}", "tokens/s, faults included"),
        (f"{len(account.faults):,}", "faults"),
        *(
            [(_short_s(stalls[1]), f"stall p95; median {_short_s(stalls[0])}, longest {_short_s(stalls[2])}")]
            * (stalls[1] is not None)
        ),
        *(
            [(_share(account.ettr_hour_min_frac), "effective training time of the worst hour")]
            * (account.ettr_hour_min_frac is not None)
        ),
        (f"{account.node_hours:,.2f}", "node-hours"),
        *([(f"${account.usd or 0:,.2f}", "at the price given")] * (account.usd is not None)),
    ]
    return page.tiles(cells)


# ------------------------------------------------------------------------------------------------------------- plots


def _loss(run: _Run) -> list[str]:
    """Loss over steps, what disturbed it, and the world size beneath, on one axis."""
    if len(run.steps) < 2:
        return []
    bins = _binned(sorted(run.steps.items()))
    first, last = bins[0].first, bins[-1].last
    at = lambda step: _LEFT + (step - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT)
    finite = [b for b in bins if b.low <= b.high]
    parts = _marks(run, at)
    if finite:
        settled = finite[len(finite) // 30 :]  # the first steps' fall would flatten the rest
        low, high = min(b.low for b in settled), max(b.high for b in settled)
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        y = lambda loss: 240 - 200 * (loss - low) / (high - low)
        parts += _rules(_nice(low, high, 4), y, lambda value: f"{value:g}")
        area = [f"{at(b.middle):.1f},{y(b.high):.1f}" for b in finite]
        area += [f"{at(b.middle):.1f},{y(b.low):.1f}" for b in reversed(finite)]
        mean = [f"{at(b.middle):.1f},{y(b.mean):.1f}" for b in finite]
        parts += [
            f'<clipPath id="plot"><rect x="{_LEFT}" y="38" width="{_WIDTH}" height="204"/></clipPath>',
            f'<g clip-path="url(#plot)"><polygon points="{" ".join(area)}" fill="var(--loss)" opacity=".25"/>',
            f'<polyline points="{" ".join(mean)}" fill="none" stroke="var(--loss)" stroke-width="1.6"/></g>',
        ]
    parts += _world(bins, at)
    for step in _nice(first, last, 8):
        parts.append(f'<text x="{at(step):.1f}" y="352" text-anchor="middle">{step:,.0f}</text>')
    announced = {fault.cause in _ANNOUNCED for fault in run.account.faults}
    legend = [("loss", "loss (band: lowest and highest)")] + [("fault", "fault")] * (False in announced)
    legend += [("announced", "announced or refused")] * (True in announced)
    legend += [("guard", "guardian")] * bool(run.account.verdicts)
    caption = "Loss in nats per token over steps; world size beneath (area: mean, line: smallest)."
    return ["<h2>Loss</h2>", page.figure(caption, legend, parts, _WIDTH, 360)]


def _marks(run: _Run, at: Callable[[float], float]) -> list[str]:
    """Faults and verdicts over the curve, one for each place, with what happened there as a tooltip."""
    rows: dict[tuple[str, int], list[str]] = {}
    for fault in run.account.faults:
        colour = "announced" if fault.cause in _ANNOUNCED else "fault"
        said = f"step {fault.step:,}: {_what(fault)} {fault.seat}"
        rows.setdefault((colour, round(at(fault.step) / 4)), []).append(
            said + (f", stall {_short_s(fault.stall_s)}" if fault.stall_s is not None else "")
        )
    for verdict in run.account.verdicts:
        rows.setdefault(("guard", round(at(verdict.step) / 4)), []).append(
            f"step {verdict.step:,}: {verdict.verdict}, {verdict.reason}"
        )
    parts = []
    guides = len(rows) <= 100
    for (colour, place), said in rows.items():
        x, y = min(_WIDTH - 5, place * 4), {"fault": 10, "announced": 20, "guard": 30}[colour]
        more = [f"and {len(said) - 12} more"] if len(said) > 12 else []
        guide = f'<path d="M{x} {y}V240" stroke="var(--{colour})" opacity=".18"/>' if guides else ""
        parts.append(
            f"<g><title>{page.text(chr(10).join(said[:12] + more))}</title>{guide}"
            f'<path d="M{x - 4} {y - 7}h8l-4 8z" fill="var(--{colour})"/></g>'
        )
    return parts


def _world(bins: Sequence[_Bin], at: Callable[[float], float]) -> list[str]:
    """World size: filled to the mean of each place, and a line at the smallest, so that a dip of one step is seen."""
    most = max(b.mean_size for b in bins)
    if not most:
        return []
    top = math.ceil(most)
    y = lambda size: 330 - 60 * size / top
    edges = [(at(b.first), at(min(b.last + 1, bins[-1].last)), b) for b in bins]
    mean = " ".join(f"{x0:.1f},{y(b.mean_size):.1f} {x1:.1f},{y(b.mean_size):.1f}" for x0, x1, b in edges)
    least = " ".join(f"{x0:.1f},{y(b.least):.1f} {x1:.1f},{y(b.least):.1f}" for x0, x1, b in edges)
    return [
        *_rules([0, top], y, lambda value: f"{value:.0f}"),
        f'<polygon points="{_LEFT},330 {mean} {edges[-1][1]:.1f},330" fill="var(--useful)" opacity=".35"/>',
        f'<polyline points="{least}" fill="none" stroke="var(--useful)"/>',
    ]


def _seconds(run: _Run, usd_per_node_hour: float) -> list[str]:
    """Where the time went: a table for the run, and a plot over its wall time under that of the step time."""
    account = run.account
    if not account.wall_s:
        return []
    cells = []
    for part in PARTS:
        seconds = getattr(account, f"{part}_s")
        key = f'<span class="key" style="background:var(--{part});margin-left:0"></span>{part}'
        cells.append([key, format_s(seconds), f"{seconds / account.wall_s:.2%}", page.text(_MEANINGS[part])])
    cells.append(["in all", format_s(account.wall_s), "", page.text(_cost(account, usd_per_node_hour))])
    parts = ["<h2>Where the time went</h2>"]
    if run.spans:
        parts.append(_over_time(run))
    return [*parts, page.table([("", "w"), ("time", "n"), ("share", "n"), ("", "")], cells)]


def _cost(account: Account, usd_per_node_hour: float) -> str:
    said = f"{account.node_hours:,.2f} node-hours"
    if account.usd is None:
        return f"{said}; no price: pretrain.usd_per_node_hour is 0"
    said += f" at ${usd_per_node_hour:g}: ${account.usd:,.2f}"
    if account.num_tokens:
        said += f", ${1e6 * account.usd / account.num_tokens:,.4g} a million committed tokens"
    return said


def _over_time(run: _Run) -> str:
    wall_s, begin_s = max(run.account.wall_s, 1e-6), run.begin_s
    num_bars = max(1, min(_BARS, len(run.spans)))
    width_s = wall_s / num_bars
    bars = [dict.fromkeys(PARTS, 0.0) for _ in range(num_bars)]
    times: list[list[float]] = [[] for _ in range(num_bars)]
    for span, step_s in run.spans:
        _spread(span, begin_s, width_s, bars)
        if step_s:
            times[min(num_bars - 1, int((span.end_s - begin_s) / width_s))].append(step_s)
    across = (_WIDTH - _LEFT - _RIGHT) / num_bars
    parts = _step_times(times, across)
    y = lambda share: 330 - 150 * share
    parts.append('<g shape-rendering="crispEdges">')
    for number, bar in enumerate(bars):
        whole, below = sum(bar.values()) or 1.0, 0.0
        for part in PARTS:
            share = bar[part] / whole
            if share > 0.0005:
                parts.append(
                    f'<rect x="{_LEFT + number * across:.1f}" y="{y(below + share):.1f}" width="{across + 0.2:.1f}" '
                    f'height="{150 * share:.1f}" fill="var(--{part})"/>'
                )
            below += share
    parts.append("</g>")
    parts += _rules([0, 0.5, 1], y, lambda value: f"{value:.0%}")
    unit_s, unit = next(
        row for row in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")) if wall_s >= 2 * row[0] or row[0] == 1
    )
    for tick in _nice(0, wall_s / unit_s, 8):
        x = _LEFT + tick * unit_s / wall_s * (_WIDTH - _LEFT - _RIGHT)
        parts.append(f'<text x="{x:.1f}" y="352" text-anchor="middle">{tick:g} {unit}</text>')
    caption = "Step time in seconds (line: median, band: up to p95), and shares of the wall time beneath."
    legend = [(part, part) for part in PARTS if getattr(run.account, f"{part}_s")]
    return page.figure(caption, legend, parts, _WIDTH, 360)


def _spread(span: Span, begin_s: float, width_s: float, bars: list[dict[str, float]]) -> None:
    """Adds a span to the bars that it lies in: first what was lost, then what was useful."""
    low, last = span.begin_s - begin_s, len(bars) - 1
    for part in reversed(PARTS):
        rest_s = span.parts.get(part, 0.0)
        while rest_s > 1e-9:
            number = min(last, int(low / width_s))
            taken_s = rest_s if number == last else min(rest_s, max(1e-6, (number + 1) * width_s - low))
            bars[number][part] += taken_s
            low, rest_s = low + taken_s, rest_s - taken_s


def _step_times(times: Sequence[Sequence[float]], across: float) -> list[str]:
    every = sorted(value for row in times for value in row)
    if not every:
        return []
    top = 1.5 * every[int(0.98 * (len(every) - 1))]
    y = lambda seconds: 140 - 120 * min(1.0, seconds / top)
    places = [(_LEFT + (number + 0.5) * across, sorted(row)) for number, row in enumerate(times) if row]
    median = [(x, statistics.median(row)) for x, row in places]
    high = [(x, row[math.ceil(0.95 * len(row)) - 1]) for x, row in places]
    area = [f"{x:.1f},{y(value):.1f}" for x, value in high] + [f"{x:.1f},{y(v):.1f}" for x, v in reversed(median)]
    line = " ".join(f"{x:.1f},{y(value):.1f}" for x, value in median)
    return [
        *_rules(_nice(0, top, 3), y, lambda value: f"{value:g}"),
        f'<polygon points="{" ".join(area)}" fill="var(--ink)" opacity=".15"/>',
        f'<polyline points="{line}" fill="none" stroke="var(--ink)" stroke-width="1.4"/>',
    ]


@dataclass
class _Bin:
    """Neighbouring steps as one place of a plot."""

    first: int
    last: int
    low: float
    mean: float
    high: float
    least: int
    mean_size: float

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


def _binned(steps: Sequence[tuple[int, tuple[float, int]]]) -> list[_Bin]:
    """At most `_POINTS` places of equal numbers of steps; a loss that is no number leaves its place without a curve."""
    size = -(-len(steps) // _POINTS)
    bins = []
    for start in range(0, len(steps), size):
        rows = steps[start : start + size]
        losses = [loss for _, (loss, _) in rows if math.isfinite(loss)]
        sizes = [world_size for _, (_, world_size) in rows]
        low, mean, high = (min(losses), math.fsum(losses) / len(losses), max(losses)) if losses else (1.0, 0.0, 0.0)
        bins.append(_Bin(rows[0][0], rows[-1][0], low, mean, high, min(sizes), sum(sizes) / len(sizes)))
    return bins


def _nice(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    raw = max(high - low, 1e-12) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _rules(values: Sequence[float], y: Callable[[float], float], shown: Callable[[float], str]) -> list[str]:
    parts = []
    for value in values:
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="var(--line)"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{page.text(shown(value))}</text>'
        )
    return parts


# ------------------------------------------------------------------------------------------------------------ tables


def _faults(run: _Run) -> list[str]:
    faults = run.account.faults
    if not faults:
        return []
    shown = sorted(
        sorted(faults, key=lambda fault: -(fault.stall_s or 0.0))[:_MOST_ROWS], key=lambda fault: fault.time_s
    )
    left = f", the {_MOST_ROWS:,} with the longest stalls" if len(shown) < len(faults) else ""
    stacks = {id(fault) for fault in [fault for fault in shown if fault.stacks][-_MOST_STACKS:]}
    begin_s = run.begin_s if run.spans else faults[0].time_s
    cells = [
        [
            _clock(fault.time_s - begin_s),
            f"{fault.step:,}",
            page.text(_what(fault)),
            page.text(fault.seat or fault.host),
            _why(fault, id(fault) in stacks),
            "" if fault.stall_s is None else _short_s(fault.stall_s),
            page.text(_done(fault)),
        ]
        for fault in shown
    ]
    heads = [
        ("after", "n"),
        ("step", "n"),
        ("what", "w"),
        ("seat", "w"),
        ("why", ""),
        ("stall", "n"),
        ("what was done", ""),
    ]
    return [f"<h2>Faults{left}</h2>", page.table(heads, cells)]


def _what(fault: Fault) -> str:
    return _WHATS.get(fault.cause, fault.cause)


def _why(fault: Fault, with_stacks: bool) -> str:
    stacks = f"<details><summary>stacks</summary><pre>{page.text(fault.stacks[:_STACK_CHARS])}</pre></details>"
    return page.text(fault.why[:500]) + (stacks if with_stacks else "")


def _done(fault: Fault) -> str:
    if fault.cause == "restart":
        return "went on from the newest state" if fault.stall_s is not None else ""
    if fault.cause == "refused":
        return "not taken in"
    said = []
    if fault.world_size is not None:
        said.append(f"{fault.world_size} went on")
    if fault.missing_slots and fault.cause not in _ANNOUNCED:
        said.append(f"computed its {_count(fault.missing_slots, 'slot')}")
    if fault.back_s is not None:
        said.append(f"back after {_short_s(fault.back_s)}")
    return ", ".join(said)


def _verdicts(run: _Run) -> list[str]:
    verdicts = run.account.verdicts
    if not verdicts:
        return []
    cells = [
        [
            f"{verdict.step:,}",
            page.text(verdict.verdict + (f" to {verdict.back_to:,}" if verdict.back_to is not None else "")),
            page.text(verdict.reason),
            _figure_of(verdict.loss),
            _figure_of(verdict.grad_norm),
            _samples(verdict),
        ]
        for verdict in verdicts[-_MOST_ROWS:]
    ]
    heads = [
        ("step", "n"),
        ("verdict", ""),
        ("why", ""),
        ("loss", "n"),
        ("gradient norm", "n"),
        ("documents left out", ""),
    ]
    left = f", the last {_MOST_ROWS:,}" if len(verdicts) > _MOST_ROWS else ""
    return [f"<h2>What the guardian decided{left}</h2>", page.table(heads, cells)]


def _notes(run: _Run) -> list[str]:
    notes = run.notes[-_MOST_NOTES:]
    if run.account.num_unrecorded:
        lost = f"the records of {_count(run.account.num_unrecorded, 'committed step')} were lost with their worker"
        notes.append((run.account.step, lost))
    if not notes:
        return []
    cells = [[f"{step:,}", page.text(note[:500])] for step, note in notes]
    return ["<h2>Worth to know</h2>", page.table([("step", "n"), ("what", "")], cells)]


def _samples(verdict: Verdict) -> str:
    if not verdict.samples:
        return ""
    names = [f"{source}: {document}" for source, document in verdict.samples[:_MOST_SAMPLES]]
    more = verdict.num_samples - len(names)
    listed = "\n".join(names + ([f"and {more:,} more"] if more else []))
    return (
        f"<details><summary>{_count(verdict.num_samples, 'document')}</summary><pre>{page.text(listed)}</pre></details>"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _short_count(number: int) -> str:
    """`12,345`, `196.6 M`, `1.42 T`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,}"


def _share(frac: float | None) -> str:
    return "none yet" if frac is None else f"{frac:.2%}"


def _short_s(seconds: float | None) -> str:
    """`0.42 s` below ten seconds, where tenths are too coarse."""
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds < 10 else format_s(seconds)


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _figure_of(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
