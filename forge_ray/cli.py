"""The `forge` command: verbs, words, exit codes. Loads only what the verb needs; `forge --help` loads next to nothing.

Results go to stdout (`--json`: one JSON object), progress and errors to stderr. Exit codes are those of `errors.py`;
130 after Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from forge_ray.errors import ConfigError, ForgeError

if TYPE_CHECKING:
    from forge_ray.artifact import Artifact
    from forge_ray.settings import Resolved

STAGE_VERBS = {
    "ingest": "read documents from their sources; hold whole groups out for evaluation",
    "tokenizer": "train the vocabulary on them",
    "tokenize": "write token shards",
    "pretrain": "train the model with Ray Train; goes on where a killed run stopped",
    "evaluate": "bits per byte on held-out documents beside baselines, and samples",
    "export": "write the Hugging Face folder that transformers and vLLM load",
}
OTHER_VERBS = {
    "run": "all stages, then serve and ask once",
    "serve": "an OpenAI-compatible endpoint for JOB.yaml or an export's REF, until Ctrl-C",
    "show": "an artifact and its ancestors",
    "gc": "delete what no artifact refers to",
    "config": "every field: type, default, meaning",
    "doctor": "check this machine and say what to mend",
}
SWITCHES = ("--dry-run", "--json", "--help")


def usage() -> str:
    """The text of `forge --help`."""
    verbs = {"run": OTHER_VERBS["run"], **STAGE_VERBS, **{k: v for k, v in OTHER_VERBS.items() if k != "run"}}
    rows = "\n".join(f"  {name:<10} {text}" for name, text in verbs.items())
    return f"""usage: forge VERB [JOB.yaml ...] [--section.field VALUE ...] [--dry-run] [--json]

A company's own language model, from its own documents to a private endpoint.

{rows}

A stage's verb runs what is missing before it too, and skips what is published.
Values come from defaults, then YAML files from left to right, then FORGE_SECTION__FIELD, then --section.field.
--dry-run prints the resolved configuration, where each value comes from, and what would run.
--json prints the result as one JSON object on stdout; progress is on stderr.

Start with: forge run jobs/demo.yaml"""


@dataclass(frozen=True)
class Words:
    """A command line taken apart."""

    verb: str
    places: tuple[str, ...]
    flags: tuple[str, ...]
    switches: frozenset[str]
    out: TextIO = field(default_factory=lambda: sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        parsed = parse(words)
        if not parsed.verb or "--help" in parsed.switches:
            print(usage())
            return 0
        # Libraries print where they please (Ray does, on stdout, when Serve ends): stdout belongs to the result alone.
        with redirect_stdout(sys.stderr):
            return VERBS[parsed.verb](parsed)
    except ForgeError as error:
        if as_json:
            print(json.dumps(error.as_dict()))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is published", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception:
        traceback.print_exc()
        print("error: this is a defect in forge-ray; please report it with the lines above", file=sys.stderr)
        return 1


def parse(words: Sequence[str]) -> Words:
    """Takes a command line apart.

    Raises:
        ConfigError: The verb is unknown.
    """
    rest = ["--help" if word == "-h" else word for word in words]
    switches = frozenset(word for word in rest if word in SWITCHES)
    rest = [word for word in rest if word not in SWITCHES]
    if not rest or rest[0].startswith("-"):
        if rest:
            raise ConfigError("the verb comes first", got=rest[0], do="forge --help lists the verbs")
        return Words("", (), (), switches)
    verb = rest.pop(0)
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ConfigError(
            "no such verb", got=verb, do=f"did you mean `forge {near[0]}`?" if near else "forge --help lists the verbs"
        )
    places: list[str] = []
    while rest and not rest[0].startswith("-"):
        places.append(rest.pop(0))
    return Words(verb, tuple(places), tuple(rest), switches)


# ------------------------------------------------------------------------------------------------------------- verbs


def _stage(words: Words) -> int:
    from forge_ray import pipeline, summary

    resolved = _resolve(words)
    if "--dry-run" in words.switches:
        return _dry_run(words, resolved, words.verb)
    outcomes = pipeline.run(resolved.config, words.verb)
    text = summary.as_text(outcomes, " ".join(words.places), _workspace_uri(resolved), None)
    _print_result(words, summary.as_json(outcomes), text)
    return 0


def _run(words: Words) -> int:
    from forge_ray import pipeline, summary
    from forge_ray.serve.session import session

    resolved = _resolve(words)
    if "--dry-run" in words.switches:
        return _dry_run(words, resolved, "export")
    config = resolved.config
    with ExitStack() as stack:
        outcomes = pipeline.run(config, "export", stack)
        stack.enter_context(_cluster(config))
        endpoint = stack.enter_context(session(config.serve, outcomes["export"].artifact))
        answer = endpoint.complete(
            config.serve.prompt, max_tokens=config.serve.max_tokens, temperature=config.serve.temperature
        )
    text = summary.as_text(outcomes, " ".join(words.places), _workspace_uri(resolved), (config.serve.prompt, answer))
    _print_result(words, summary.as_json(outcomes, prompt=config.serve.prompt, answer=answer), text)
    return 0


def _serve(words: Words) -> int:
    from forge_ray.artifact import Workspace
    from forge_ray.serve.session import session, wait_for_interrupt

    files = [place for place in words.places if _is_yaml(place)]
    refs = [place for place in words.places if not _is_yaml(place)]
    if len(refs) > 1 or not words.places:
        raise ConfigError(
            "what is to be served?", got=" ".join(refs) or "nothing", wanted="JOB.yaml, or the REF of an export"
        )
    resolved = _resolve(words, files)
    if "--dry-run" in words.switches:
        return _dry_run(words, resolved, None if refs else "export")
    workspace = Workspace(resolved.config.workspace)
    exported = workspace.resolve(refs[0]) if refs else _published_export(resolved)
    with _cluster(resolved.config), session(resolved.config.serve, exported) as endpoint:
        body = json.dumps({"model": endpoint.model_name, "prompt": resolved.config.serve.prompt, "max_tokens": 64})
        _print_result(
            words,
            {"url": f"{endpoint.url}/v1", "model": endpoint.model_name, "ref": exported.ref},
            f"Ask it:\n  curl {endpoint.url}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n"
            "Ctrl-C stops it.",
        )
        wait_for_interrupt()
    return 0


def _published_export(resolved: Resolved) -> Artifact:
    from forge_ray import pipeline
    from forge_ray.artifact import Workspace
    from forge_ray.errors import NotFoundError

    planned = pipeline.plan(resolved.config, "export")[-1]
    if not planned.published:
        raise NotFoundError(
            "this job's model is not published yet", got=planned.ref, do="`forge run` with the same YAML makes it"
        )
    return Workspace(resolved.config.workspace).get(planned.ref)


def _show(words: Words) -> int:
    from forge_ray.artifact import Workspace
    from forge_ray.pipeline import lineage
    from forge_ray.telemetry import format_bytes, format_s

    resolved = _resolve(words, [])
    workspace = Workspace(resolved.config.workspace)
    if not words.places:
        refs = workspace.refs_of_artifacts()
        _print_result(words, {"artifacts": refs}, "\n".join(refs) or f"nothing is published in {workspace.uri}")
        return 0
    rows, lines = [], []
    for artifact in lineage(workspace.resolve(words.places[0])):
        m = artifact.manifest
        size = sum(entry.size_bytes for entry in m.files)
        rows.append(
            {
                "ref": m.ref,
                "created": m.created,
                "wall_s": m.wall_s,
                "bytes": size,
                "inputs": dict(m.inputs),
                "files": [vars(entry) for entry in m.files],
                "metrics": dict(m.metrics),
                "made_by": dict(m.made_by),
            }
        )
        lines += [f"{m.ref}  {m.created}  {format_s(m.wall_s)}  {len(m.files)} files, {format_bytes(size)}"]
        lines += [f"    {name}: {_short(value)}" for name, value in m.metrics.items()]
        lines += [f"    from {role}/{name}" for role, name in m.inputs.items()]
    _print_result(words, {"lineage": rows}, "\n".join(lines))
    return 0


def _gc(words: Words) -> int:
    from forge_ray.artifact import Workspace
    from forge_ray.telemetry import format_bytes

    workspace = Workspace(_resolve(words).config.workspace)
    garbage = workspace.garbage()
    dry = "--dry-run" in words.switches
    if not dry:
        workspace.collect(garbage)
    total = sum(size for _, size in garbage)
    names = "".join(f"\n  {name}  {format_bytes(size)}" for name, size in garbage)
    _print_result(
        words,
        {"deleted": not dry, "bytes": total, "names": [name for name, _ in garbage]},
        f"{'would delete' if dry else 'deleted'} {len(garbage)} files, {format_bytes(total)}, older than an hour"
        + names,
    )
    return 0


def _config(words: Words) -> int:
    from forge_ray import settings

    rows = settings.reference()
    lines = [
        f"{name}{f': {kind}' if kind else ''}{f' = {default}' if default else ''}\n    {text}"
        for name, kind, default, text in rows
    ]
    _print_result(
        words, [dict(zip(("name", "type", "default", "text"), row, strict=True)) for row in rows], "\n".join(lines)
    )
    return 0


def _doctor(words: Words) -> int:
    from forge_ray import doctor

    checks = doctor.examine(_resolve(words).config)
    text = "\n".join(
        f"{'ok  ' if c.ok else 'MEND'}  {c.name:<12} {c.found}" + ("" if c.ok else f"\n      {c.do}") for c in checks
    )
    _print_result(words, [vars(c) for c in checks], text)
    return 0 if all(c.ok for c in checks) else 1


VERBS = {
    **dict.fromkeys(STAGE_VERBS, _stage),
    "run": _run,
    "serve": _serve,
    "show": _show,
    "gc": _gc,
    "config": _config,
    "doctor": _doctor,
}


# ------------------------------------------------------------------------------------------------------------ helpers


def _resolve(words: Words, files: Sequence[str] | None = None) -> Resolved:
    from forge_ray import settings

    return settings.resolve(words.places if files is None else files, words.flags)


def _cluster(config: Any) -> Any:
    from forge_ray.runtime import cluster

    return cluster(config.ray)


def _dry_run(words: Words, resolved: Resolved, until: str | None) -> int:
    from forge_ray import pipeline

    rows = resolved.rows()
    planned = pipeline.plan(resolved.config, until) if until else []
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {json.dumps(value)}  [{origin}]" for name, value, origin in rows]
    lines += ["", *(f"{'skip' if p.published else 'run '}  {p.ref}" for p in planned)]
    _print_result(
        words,
        {
            "config": [{"name": n, "value": v, "origin": o} for n, v, o in rows],
            "stages": [{"ref": p.ref, "published": p.published} for p in planned],
        },
        "\n".join(lines),
    )
    return 0


def _print_result(words: Words, result: Any, text: str) -> None:
    print(json.dumps(result) if "--json" in words.switches else text, file=words.out, flush=True)


def _workspace_uri(resolved: Resolved) -> str:
    from forge_ray.storage import Storage

    return Storage(resolved.config.workspace).uri


def _is_yaml(place: str) -> bool:
    return place.endswith((".yaml", ".yml"))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


if __name__ == "__main__":
    sys.exit(main())
