"""What a finished run says to a person: what was learned, what it cost, where it lies, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_ray.pipeline import Outcome
from forge_ray.telemetry import format_bytes, format_s

_LABELS = {
    "model": "this model",
    "bigram": "bigram, same tokens",
    "gzip": "gzip -9",
    "zstd": "zstd -19",
    "smollm2": "SmolLM2-135M-Instruct, 1,024-token windows",
}


def as_json(outcomes: Mapping[str, Outcome], **extra: Any) -> dict[str, Any]:
    """The result of a run for `--json`."""
    stages = {
        name: {
            "ref": o.artifact.ref,
            "skipped": o.skipped,
            "wall_s": round(o.wall_s, 3),
            "metrics": dict(o.artifact.metrics),
        }
        for name, o in outcomes.items()
    }
    return {"stages": stages, **extra}


def as_text(outcomes: Mapping[str, Outcome], config_words: str, workspace: str, answer: tuple[str, str] | None) -> str:
    """The result of a run for a terminal."""
    metrics = {name: outcome.artifact.metrics for name, outcome in outcomes.items()}
    parts = [_learned(metrics["evaluate"])] if "evaluate" in metrics else []
    parts += [_trained(metrics)] if "pretrain" in metrics else []
    parts += [_stages(outcomes, workspace)]
    if answer:
        parts += [f"The endpoint, asked for {answer[0]!r}, answered:\n\n{_indent(answer[0] + answer[1])}"]
    parts += [_next(outcomes, config_words)]
    return "\n\n".join(parts)


def _learned(evaluated: Mapping[str, Any]) -> str:
    scores = sorted(evaluated["bits_per_byte"].items(), key=lambda item: item[1])
    width = max(len(_LABELS[name]) for name, _ in scores)
    rows = [f"  {_LABELS[name]:<{width}}  {bits:.3f}{'   <-' if name == 'model' else ''}" for name, bits in scores]
    rows += [f"  {_LABELS[name]:<{width}}  {note}" for name, note in evaluated["skipped"].items()]
    head = (
        f"Bits per byte on {format_bytes(evaluated['heldout_bytes'])} of held-out documents, "
        f"{evaluated['context_tokens']}-token windows (less is better)"
    )
    samples = "\n\n".join(_indent(f"{s['prompt']}[...]{s['continuation']}") for s in evaluated["samples"])
    return "\n".join([head, *rows]) + f"\n\nWhat it writes after [...]\n\n{samples}"


def _trained(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    p = metrics["pretrain"]
    vocabulary = metrics["tokenizer"]["heldout_bytes_per_token"]
    return (
        f"{p['parameters']:,} parameters, {p['tokens']:,} tokens ({p['epochs']:.2f} passes over the corpus) at "
        f"{p['tokens_per_s']:,.0f} tokens/s in {p['precision']}; own vocabulary of {p['vocab_size']:,} entries, "
        f"{vocabulary:.2f} bytes per token"
    )


def _stages(outcomes: Mapping[str, Outcome], workspace: str) -> str:
    rows = [
        f"  {name:<10}{'published before' if o.skipped else format_s(o.wall_s):<18}{o.artifact.ref}"
        for name, o in outcomes.items()
    ]
    return "\n".join([f"Artifacts in {workspace}", *rows])


def _next(outcomes: Mapping[str, Outcome], config_words: str) -> str:
    last = list(outcomes.values())[-1].artifact.ref
    lines = [f"  forge show {last}  where it came from, to the last document"]
    if "export" in outcomes:
        lines.insert(0, f"  forge serve {config_words}  an OpenAI-compatible endpoint on this machine, until Ctrl-C")
    return "\n".join(["Next", *lines])


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
