"""A plan for a terminal, and as a YAML file to train with."""

from __future__ import annotations

from pathlib import Path

import yaml

from forge_ray.errors import StorageError
from forge_ray.plan.planner import Option, Plan

_SHOWN = 8


def as_text(plan: Plan) -> str:
    """The best option in words, the others in a table, what was assumed, and the advice."""
    best = plan.options[0]
    head = [
        f"{plan.corpus_tokens:,.0f} tokens of training documents. Best within the limits:",
        "",
        f"  model     {_short(best.parameters)} parameters, depth {best.depth}, "
        f"with a vocabulary of {best.vocab_size:,} entries",
        f"  training  {_short(best.tokens)} tokens ({best.epochs:.2f} passes) in {best.steps:,} steps of "
        f"{best.slots} x {best.micro_batch} x {best.seq_len}",
        f"  machines  {best.nodes} x {best.machine} ({best.market}), "
        f"{best.workers} workers, {best.sharding}, {best.reduction}, "
        f"{best.memory_gib:.1f} GiB on each",
        f"  time      {_hours(best.hours)}{_taken_away(best)}",
        f"  money     ${best.train_usd:,.2f} to train{_served(best)}",
        f"  endpoint  ${best.serving.usd_per_million_tokens:.3g} a million tokens on {best.serving.machine} at full "
        f"load, {best.serving.ms_per_token:.2g} ms a token at least",
    ]
    if best.bits_per_byte:
        head += [
            f"  expected  {_expected(best)} bits per byte on held-out documents, the interval with 90% ({plan.ladder})"
        ]
    fitted = [o.bits_per_byte for o in plan.options if o.bits_per_byte]
    rows = [("machine", "market", "parameters", "tokens", "time", "training", "in all")]
    rows[0] += ("bits per byte",) * bool(fitted)
    rows += [
        (
            f"{o.nodes} x {o.machine}",
            o.market,
            _short(o.parameters),
            _short(o.tokens),
            _hours(o.hours),
            f"${o.train_usd:,.2f}",
            f"${o.usd:,.2f}",
            *([_expected(o)] * bool(fitted)),
        )
        for o in plan.options[:_SHOWN]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    more = len(plan.options) - _SHOWN
    table += [f"  and {more} more: --json lists all"] if more > 0 else []
    notes = [
        f"List prices of {plan.prices_as_of}; spot prices are round figures (plan.prices takes a file of yours).",
        "Sizes are ranked by a law of web text alone (arXiv 2404.10102, 2305.16264): it does not know your documents.",
        _ladder(plan),
    ]
    parts = ["\n".join(head), "\n".join(table), "\n".join(notes)]
    return "\n\n".join([f"NO: {plan.advice}", *parts] if plan.advice else parts)


def write_job(option: Option, path: str) -> None:
    """Writes what the option decides as YAML: `forge run jobs/yours.yaml PATH` trains it.

    Raises:
        StorageError: The file cannot be written.
    """
    text = (
        f"# By forge plan: {option.nodes} x {option.machine} ({option.market}), {_hours(option.hours)}, "
        f"${option.train_usd:,.2f}.\n# Lay it over your job: forge run jobs/yours.yaml {path}\n"
        f"{yaml.safe_dump(option.job(), sort_keys=False)}"
    )
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"the plan cannot be written: {error.strerror}", got=path, do="choose another --out"
        ) from None


def _ladder(plan: Plan) -> str:
    """What is known of the loss on the job's own documents."""
    if not plan.ladder:
        return "No loss is promised: `forge plan fit` with your job predicts one from small runs on its documents."
    low, high = (_short(size) for size in plan.spoken_for)
    none = "" if any(o.bits_per_byte for o in plan.options) else " No option is near those, so no loss is promised."
    return (
        f"Bits per byte are what {plan.ladder} expects, small runs on these documents: it speaks for {low} to {high} "
        f"parameters in blocks, and for at most twice or half as many tokens for each as the job has.{none}"
    )


def _expected(option: Option) -> str:
    found = option.bits_per_byte
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})" if found else "-"


def _short(number: float) -> str:
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.0f}"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min" if hours * 60 >= 1 else "under a minute"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


def _taken_away(option: Option) -> str:
    return f", {option.interruptions:.1f} machines taken away on the way" if option.interruptions else ""


def _served(option: Option) -> str:
    return f", ${option.serve_usd:,.2f} to serve" if option.serve_usd else ""
