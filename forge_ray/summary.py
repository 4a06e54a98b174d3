"""What results say to a person: what a run learned, its cost, its place, what to do next; an artifact's past."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge_ray import plan_verbs
from forge_ray.artifact import Artifact
from forge_ray.config import ForgeConfig
from forge_ray.pipeline import Outcome
from forge_ray.storage import Storage
from forge_ray.telemetry import format_bytes, format_s

_LABELS = {
    "model": "this model",
    "bigram": "bigram, same tokens",
    "gzip": "gzip -9",
    "zstd": "zstd -19",
    "smollm2": "SmolLM2-135M-Instruct (4-bit)",
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
    planned = _planned(outcomes)
    return {"stages": stages, **({"planned": planned[0]} if planned else {}), **extra}


def as_text(outcomes: Mapping[str, Outcome], workspace: str, answer: tuple[str, str] | None = None) -> str:
    """The result of a run for a terminal; `answer` is what the endpoint was asked, and what it wrote."""
    metrics = {name: outcome.artifact.metrics for name, outcome in outcomes.items()}
    parts = [_learned(metrics["evaluate"])] if "evaluate" in metrics else []
    parts += [_curated(metrics["curate"])] if "curate" in metrics else []
    parts += [_trained(metrics)] if "pretrain" in metrics else []
    if planned := _planned(outcomes):
        parts += [planned[1]]
    parts += [_stages(outcomes, Storage(workspace).uri)]
    if answer:
        parts += [f"The endpoint, asked for {answer[0]!r}, answered:\n\n{_indent(answer[0] + answer[1])}"]
    parts += [_next(outcomes, workspace)]
    return "\n\n".join(parts)


def lineage_as_json(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """An artifact and its ancestors for `forge show --json`."""
    return [
        {
            "ref": m.ref,
            "created": m.created,
            "wall_s": m.wall_s,
            "bytes": sum(entry.size_bytes for entry in m.files),
            "inputs": dict(m.inputs),
            "files": [vars(entry) for entry in m.files],
            "metrics": dict(m.metrics),
            "made_by": dict(m.made_by),
        }
        for m in (artifact.manifest for artifact in artifacts)
    ]


def lineage_as_text(artifacts: Sequence[Artifact]) -> str:
    """An artifact and its ancestors for a terminal."""
    lines = []
    for m in (artifact.manifest for artifact in artifacts):
        size = format_bytes(sum(entry.size_bytes for entry in m.files))
        lines += [f"{m.ref}  {m.created}  {format_s(m.wall_s)}  {len(m.files)} files, {size}"]
        lines += [f"    {name}: {_short(value)}" for name, value in m.metrics.items()]
        lines += [f"    from {role}/{name}" for role, name in m.inputs.items()]
    return "\n".join(lines)


def command(verb: str, ref: str, workspace: str) -> str:
    """A command line to paste: the program as it was called, and the workspace where it is not the default one."""
    words = [_program(), verb, ref]
    if Storage(workspace).uri != Storage(ForgeConfig().workspace).uri:
        words += [f"--workspace={workspace}"]
    return shlex.join(words)


def _planned(outcomes: Mapping[str, Outcome]) -> plan_verbs.Told | None:
    """What `forge plan fit` expected of the run, beside what came."""
    if "evaluate" not in outcomes:
        return None
    return plan_verbs.against(outcomes["pretrain"].artifact, outcomes["evaluate"].artifact.metrics)


def _program() -> str:
    called = Path(sys.argv[0])
    if called.name != "forge" or not called.is_file() or shutil.which("forge") == str(called):
        return "forge"
    return os.path.relpath(called)


def _learned(evaluated: Mapping[str, Any]) -> str:
    scores = sorted(evaluated["bits_per_byte"].items(), key=lambda item: item[1])
    labels = dict(_LABELS)
    theirs = evaluated.get("smollm2_context_tokens", evaluated["context_tokens"])
    if theirs != evaluated["context_tokens"]:
        labels["smollm2"] += f", {theirs:,}-token windows"
    width = max(len(labels[name]) for name, _ in scores)
    rows = [f"  {labels[name]:<{width}}  {bits:.3f}{'   <-' if name == 'model' else ''}" for name, bits in scores]
    rows += [f"  {labels[name]:<{width}}  {note}" for name, note in evaluated["skipped"].items()]
    head = (
        f"Bits per byte on {format_bytes(evaluated['heldout_bytes'])} of held-out documents, "
        f"{evaluated['context_tokens']}-token windows (less is better)"
    )
    rows += [f"  ({evaluated['heldout_seen_frac']:.1%} of that text stands in lines that training documents have too)"]
    samples = "\n\n".join(_indent(f"{s['prompt']}[...]{s['continuation']}") for s in evaluated["samples"])
    return "\n".join([head, *rows]) + f"\n\nWhat it writes after [...]\n\n{samples}"


def _curated(c: Mapping[str, Any]) -> str:
    found, kept = (c[f"train_documents{end}"] + c[f"heldout_documents{end}"] for end in ("_in", ""))
    text = f"{kept:,} of {found:,} documents kept"
    if not c["steps"]:
        return f"{text}, as they are: no step of curate is switched on"
    dropped = ", ".join(f"{sum(by.values()):,} by {step}" for step, by in c["dropped"].items())
    private = sum(c["found"].values())
    return (
        f"{text}{f'; dropped: {dropped}' if dropped else ''}\n{c['lines_removed']:,} repeated lines removed, "
        f"{private:,} private details found; `{_program()} data report` shows which, and why"
    )


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


def _next(outcomes: Mapping[str, Outcome], workspace: str) -> str:
    last = list(outcomes.values())[-1].artifact.ref
    lines = [f"  {command('show', last, workspace)}  where it came from, to the last document"]
    if "export" in outcomes:
        serve = command("serve", outcomes["export"].artifact.ref, workspace)
        lines.insert(0, f"  {serve}  an OpenAI-compatible endpoint on this machine, until Ctrl-C")
    return "\n".join(["Next", *lines])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
