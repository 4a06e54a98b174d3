"""The `forge` command: verbs, words, exit codes. Loads only what the verb needs; `forge --help` loads next to nothing.

Results go to stdout (`--json`: one JSON object), progress and errors to stderr. Exit codes are those of `errors.py`;
130 after Ctrl-C, 141 when a closed pipe ended the work.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TextIO

from forge_ray import __version__
from forge_ray.errors import ConfigError, ForgeError

if TYPE_CHECKING:
    from forge_ray.artifact import Artifact
    from forge_ray.settings import Resolved

STAGE_VERBS = {
    "ingest": "read documents from their sources; hold whole groups out for evaluation",
    "curate": "clean and deduplicate them, strip private data; the fate of each goes on record",
    "tokenizer": "train the vocabulary on them; `forge tokenizer sweep` compares sizes and patterns",
    "tokenize": "write token shards",
    "pretrain": "train the model with Ray Train; goes on where a killed run stopped",
    "evaluate": "bits per byte on held-out documents beside baselines, and samples",
    "export": "write the Hugging Face folder that transformers and vLLM load",
}
OTHER_VERBS = {
    "run": "all stages, then serve and ask once",
    "serve": "an OpenAI-compatible endpoint for JOB.yaml or an export's REF, until Ctrl-C",
    "show": "an artifact and its ancestors, or the names of all artifacts",
    "data": "why: the fate of a document; report: of all of them; forget: leave documents out, and erase them",
    "gc": "delete what no artifact refers to",
    "config": "every field: type, default, meaning",
    "doctor": "check this machine and say what to mend",
}
SWITCHES = ("--dry-run", "--json", "--help", "--version")
_OWN_SWITCHES = {"data": ("--duplicates", "--erase")}
_OF_A_JOB = "[JOB.yaml ...] [--section.field VALUE ...] [--dry-run] [--json]"
_USAGES = {
    "tokenizer": "[sweep] [JOB.yaml ...] [--section.field VALUE ...] [--dry-run] [--json]",
    "serve": "JOB.yaml ... | REF [--section.field VALUE ...] [--dry-run] [--json]",
    "show": "[JOB.yaml ...] [REF] [--workspace URI] [--json]",
    "data": """why DOC [JOB.yaml ...] [--workspace URI] [--json]
       forge data report [JOB.yaml ... | REF] [--out FILE.html] [--examples N] [--workspace URI] [--json]
       forge data forget DOC ... [JOB.yaml ...] [--reason TEXT] [--duplicates] [--erase] [--dry-run] [--json]""",
    "gc": "[JOB.yaml ...] [--workspace URI] [--dry-run] [--json]",
    "config": "[SECTION ...] [--json]",
    "doctor": "[JOB.yaml ...] [--section.field VALUE ...] [--json]",
}
_NOTES = {
    "data": """DOC is a document's id, its beginning, its key or its source. Without JOB.yaml the latest build counts.
report prints a summary and writes one page (./data-report.html); what it shows has passed the finders of private data.
forget writes tombstones: the next build leaves these documents out. --duplicates takes those that say the same too.
--erase, with JOB.yaml, makes that build now, deletes every file that holds them, and puts it on record."""
}
# What `forge VERB --help` lists; a stage that is not here has one section, of its own name.
_SECTIONS = {
    "tokenizer": ("tokenizer", "sweep"),
    "pretrain": ("model", "pretrain"),
    "serve": ("serve",),
    "run": ("serve",),
}


def usage() -> str:
    """The text of `forge --help`."""
    verbs = {"run": OTHER_VERBS["run"], **STAGE_VERBS, **{k: v for k, v in OTHER_VERBS.items() if k != "run"}}
    rows = "\n".join(f"  {name:<10} {text}" for name, text in verbs.items())
    return f"""usage: forge VERB {_OF_A_JOB}

A company's own language model, from its own documents to a private endpoint.

{rows}

A stage's verb runs what is missing before it too, and skips what is published.
Values come from defaults, then YAML files from left to right, then FORGE_SECTION__FIELD, then --section.field.
--dry-run prints the resolved configuration, where each value comes from, and what would run.
--json prints the result as one JSON object on stdout; progress is on stderr.
forge VERB --help tells more of a verb; forge --version names this version.

Start with: forge run jobs/demo.yaml"""


def verb_usage(verb: str) -> str:
    """The text of `forge VERB --help`: its line, its usage and the fields that it reads first."""
    line = {**STAGE_VERBS, **OTHER_VERBS}[verb]
    parts = [f"usage: forge {verb} {_USAGES.get(verb, _OF_A_JOB)}\n\n{line}"]
    parts += [_NOTES[verb]] if verb in _NOTES else []
    sections = _SECTIONS.get(verb, (verb,) if verb in STAGE_VERBS else ())
    if sections:
        from forge_ray import settings

        parts += [_fields_text(settings.fields(sections)), "`forge config` lists the fields of every section."]
    return "\n\n".join(parts)


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
    try:
        return _guarded(words)
    except BrokenPipeError:
        with suppress(OSError):
            print("error: a pipe was closed before the work was done", file=sys.stderr)
        _discard(sys.stdout)
        _discard(sys.stderr)
        return 141


def _guarded(words: list[str]) -> int:
    """Runs the verb and turns what it raises into an exit code; a broken pipe is left to `main`."""
    try:
        parsed = parse(words)
        if "--version" in parsed.switches:
            _tell(f"forge-ray {__version__}", sys.stdout)
            return 0
        if not parsed.verb or "--help" in parsed.switches:
            _tell(verb_usage(parsed.verb) if parsed.verb else usage(), sys.stdout)
            return 0
        # Libraries print where they please (Ray does, on stdout, when Serve ends): stdout belongs to the result alone.
        with redirect_stdout(sys.stderr):
            return VERBS[parsed.verb](parsed)
    except ForgeError as error:
        if "--json" in words:
            _tell(json.dumps(error.as_dict()), sys.stdout)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is published", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception:
        traceback.print_exc()
        print("error: this is a defect in forge-ray; please report it with the lines above", file=sys.stderr)
        return 1


def parse(words: Sequence[str]) -> Words:
    """Takes a command line apart: places, flags and switches may stand in any order after the verb.

    A flag without `=` takes the next word as its value, unless that begins with `--`.

    Raises:
        ConfigError: The verb is unknown.
    """
    rest = ["--help" if word == "-h" else word for word in words]
    switches = frozenset(word for word in rest if word in SWITCHES)
    rest = [word for word in rest if word not in SWITCHES]
    if not rest:
        return Words("", (), (), switches)
    verb = rest.pop(0)
    if verb.startswith("-"):
        near = _near(verb, SWITCHES)
        raise ConfigError(
            "the verb comes first", got=verb, do=f"did you mean {near}?" if near else "forge --help lists the verbs"
        )
    if verb not in VERBS:
        near = _near(verb, VERBS)
        raise ConfigError(
            "no such verb", got=verb, do=f"did you mean `forge {near}`?" if near else "forge --help lists the verbs"
        )
    places: list[str] = []
    flags: list[str] = []
    while rest:
        word = rest.pop(0)
        if word in _OWN_SWITCHES.get(verb, ()):
            switches |= {word}
            continue
        if not word.startswith("-"):
            places.append(word)
            continue
        flags.append(word)
        if word.startswith("--") and "=" not in word and rest and not rest[0].startswith("--"):
            flags.append(rest.pop(0))
    return Words(verb, tuple(places), tuple(flags), switches)


# ------------------------------------------------------------------------------------------------------------- verbs


def _stage(words: Words) -> int:
    from forge_ray import pipeline, summary

    if words.verb == "tokenizer" and words.places[:1] == ("sweep",):
        return _sweep(words)
    resolved = _resolve(words)
    if "--dry-run" in words.switches:
        return _dry_run(words, resolved, words.verb)
    outcomes = pipeline.run(resolved.config, words.verb)
    text = summary.as_text(outcomes, resolved.config.workspace)
    _print_result(words, summary.as_json(outcomes), text)
    return 0


def _sweep(words: Words) -> int:
    """The vocabulary studio: its report stands beside the stages and changes none of them."""
    from forge_ray import pipeline

    resolved = _resolve(words, words.places[1:])
    if "--dry-run" in words.switches:
        return _dry_run(words, resolved, "sweep")
    artifact = pipeline.run(resolved.config, "sweep")["sweep"].artifact
    from forge_ray.artifact import cache_folder
    from forge_ray.evaluate import vocabulary, vocabulary_page

    report = artifact.read_json(vocabulary.REPORT)
    page = artifact.materialize(cache_folder("sweep") / artifact.manifest.fingerprint) / vocabulary.PAGE
    text = vocabulary_page.as_text(report, str(page))
    _print_result(words, {"ref": artifact.ref, "page": str(page), **report}, text)
    return 0


def _run(words: Words) -> int:
    from forge_ray import pipeline, summary
    from forge_ray.serve.session import preflight, session

    resolved = _resolve(words)
    if "--dry-run" in words.switches:
        return _dry_run(words, resolved, "export")
    config = resolved.config
    preflight(config.serve)
    with ExitStack() as stack:
        outcomes = pipeline.run(config, "export", stack)
        stack.enter_context(_cluster(config))
        endpoint = stack.enter_context(session(config.serve, outcomes["export"].artifact))
        answer = endpoint.complete(
            config.serve.prompt, max_tokens=config.serve.max_tokens, temperature=config.serve.temperature
        )
    text = summary.as_text(outcomes, config.workspace, (config.serve.prompt, answer))
    _print_result(words, summary.as_json(outcomes, prompt=config.serve.prompt, answer=answer), text)
    return 0


def _serve(words: Words) -> int:
    from forge_ray.artifact import Workspace
    from forge_ray.serve.session import preflight, session, wait_for_interrupt

    files, ref = _files_and_ref(words)
    if not words.places:
        raise ConfigError("what is to be served?", got="nothing", wanted="JOB.yaml, or the REF of an export")
    resolved = _resolve(words, files)
    if "--dry-run" in words.switches:
        return _dry_run(words, resolved, None if ref else "export")
    exported = Workspace(resolved.config.workspace).resolve(ref) if ref else _published_export(resolved)
    preflight(resolved.config.serve)
    with _cluster(resolved.config), session(resolved.config.serve, exported) as endpoint:
        body = json.dumps({"model": endpoint.model_name, "prompt": resolved.config.serve.prompt, "max_tokens": 64})
        _print_result(
            words,
            {"url": f"{endpoint.url}/v1", "model": endpoint.model_name, "ref": exported.ref},
            f"Ask it:\n  curl {endpoint.url}/v1/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(body)}\n"
            "Ctrl-C stops it.",
        )
        wait_for_interrupt()
    return 0


def _published_export(resolved: Resolved) -> Artifact:
    from forge_ray import pipeline, summary
    from forge_ray.artifact import Workspace
    from forge_ray.errors import ArtifactError, NotFoundError

    planned = pipeline.plan(resolved.config, "export")[-1]
    workspace = Workspace(resolved.config.workspace)
    if planned.published:
        return workspace.get(planned.ref)
    do = "`forge run` with the same YAML makes it"
    with suppress(ArtifactError):
        latest = workspace.resolve("export").ref
        do += f"; the latest export there is another: `{summary.command('serve', latest, resolved.config.workspace)}`"
    raise NotFoundError("this job's model is not published yet", got=f"{planned.ref} in {workspace.uri}", do=do)


def _show(words: Words) -> int:
    from forge_ray import pipeline, summary
    from forge_ray.artifact import Workspace

    files, ref = _files_and_ref(words)
    workspace = Workspace(_resolve(words, files).config.workspace)
    if not ref:
        refs = workspace.refs_of_artifacts()
        _print_result(words, {"artifacts": refs}, "\n".join(refs) or f"nothing is published in {workspace.uri}")
        return 0
    artifacts = list(pipeline.lineage(workspace.resolve(ref)))
    _print_result(words, {"lineage": summary.lineage_as_json(artifacts)}, summary.lineage_as_text(artifacts))
    return 0


def _data(words: Words) -> int:
    """What is asked of the ledger."""
    verbs = {"why": _data_why, "report": _data_report, "forget": _data_forget}
    verb = words.places[0] if words.places else ""
    if verb not in verbs:
        near = _near(verb, verbs)
        raise ConfigError(
            "what is asked of the documents?",
            got=verb or "nothing",
            wanted="forge data why, report or forget",
            do=f"did you mean `forge data {near}`?" if near else "`forge data --help` tells of each",
        )
    if verb != "forget" and (idle := words.switches & {"--dry-run", *_OWN_SWITCHES["data"]}):
        raise ConfigError(f"`forge data {verb}` has no such switch", got=", ".join(sorted(idle)))
    own = {"why": (), "report": ("--out", "--examples"), "forget": ("--reason",)}[verb]
    values, flags = _own_flags(words, own)
    rest = replace(words, places=words.places[1:], flags=flags)
    files = [place for place in rest.places if place.endswith((".yaml", ".yml"))]
    names = [place for place in rest.places if place not in files]
    return verbs[verb](rest, names, _resolve(rest, files).config, bool(files), values)


def _data_why(words: Words, names: list[str], config: Any, is_job: bool, values: dict[str, str]) -> int:
    from forge_ray.artifact import Workspace
    from forge_ray.data import builds, explain

    if len(names) != 1:
        raise ConfigError("which document?", got=" ".join(names) or "none", wanted="its id, key or source")
    workspace = Workspace(config.workspace)
    answer = explain.why(workspace, names[0], builds.latest(workspace, config if is_job else None))
    _print_result(words, answer.as_json(), explain.as_text(answer))
    return 0


def _data_report(words: Words, names: list[str], config: Any, is_job: bool, values: dict[str, str]) -> int:
    from pathlib import Path

    from forge_ray.artifact import Workspace
    from forge_ray.data import builds, report, report_page

    if len(names) > 1 or (names and is_job):
        raise ConfigError("the report is of one build", got=" ".join(words.places), wanted="[JOB.yaml ...] or [REF]")
    examples = values.get("--examples", "3")
    if not examples.isdigit():
        raise ConfigError("--examples wants a number", got=examples)
    workspace = Workspace(config.workspace)
    build = builds.of_ref(workspace, names[0]) if names else builds.latest(workspace, config if is_job else None)
    found = report.gather(build, num_examples=int(examples))
    page = Path(values.get("--out", "data-report.html"))
    report_page.write(page, found)
    _print_result(words, {"page": str(page), **found}, report.as_text(found) + f"\n\nAll of it: {page}")
    return 0


def _data_forget(words: Words, names: list[str], config: Any, is_job: bool, values: dict[str, str]) -> int:
    from forge_ray import pipeline
    from forge_ray.artifact import Workspace
    from forge_ray.data import builds, erase, forget, forgetting

    if not names:
        raise ConfigError("which documents?", got="none", wanted="ids, keys or sources")
    if "--erase" in words.switches and not is_job:
        raise ConfigError(
            "--erase makes the job's next build before it deletes old bytes",
            got="no JOB.yaml",
            do="name the job: forge data forget DOC JOB.yaml --erase",
        )
    workspace, dry, why = Workspace(config.workspace), "--dry-run" in words.switches, values.get("--reason", "")
    build = builds.latest(workspace, config if is_job else None)
    plan = forgetting.plan(workspace, names, build, "--duplicates" in words.switches)
    stones, erased = [], None
    if not dry:
        stones = forget.bury(workspace, plan.rows, why)
        if "--erase" in words.switches:
            made = pipeline.run(config, "tokenize")
            artifacts = [outcome.artifact for outcome in made.values()]
            erased = erase.erase(workspace, plan.rows, why, artifacts, plan.duplicates)
    result = forgetting.as_json(plan, stones, erased, dry)
    _print_result(words, result, forgetting.as_text(plan, erased, dry))
    return 0


def _own_flags(words: Words, names: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The values of a verb's own flags, and the flags that are left for the configuration."""
    values: dict[str, str] = {}
    left: list[str] = []
    flags = list(words.flags)
    while flags:
        word = flags.pop(0)
        name, given, value = word.partition("=")
        if name not in names:
            left.append(word)
            continue
        if not given and flags and not flags[0].startswith("--"):
            value = flags.pop(0)
        if not value:
            raise ConfigError("a flag lacks its value", got=word, wanted=f"{name} VALUE")
        values[name] = value
    return values, tuple(left)


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
        {
            "workspace": workspace.uri,
            "deleted": not dry,
            "bytes": total,
            "names": [name for name, _ in garbage],
        },
        f"{'would delete' if dry else 'deleted'} {len(garbage)} files, {format_bytes(total)}, older than an hour, "
        f"in {workspace.uri}{names}",
    )
    return 0


def _config(words: Words) -> int:
    from forge_ray import settings

    if words.flags:
        raise ConfigError(
            "`forge config` takes no values", got=" ".join(words.flags), do="--dry-run of a verb shows what is set"
        )
    rows = settings.fields(words.places)
    _print_result(
        words, [dict(zip(("name", "type", "default", "text"), row, strict=True)) for row in rows], _fields_text(rows)
    )
    return 0


def _doctor(words: Words) -> int:
    from forge_ray import doctor

    config = _resolve(words).config
    checks = doctor.examine(config)
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
    "data": _data,
    "gc": _gc,
    "config": _config,
    "doctor": _doctor,
}


# ------------------------------------------------------------------------------------------------------------ helpers


def _resolve(words: Words, files: Sequence[str] | None = None) -> Resolved:
    from forge_ray import settings
    from forge_ray.config import ForgeConfig

    for name in (word.partition("=")[0] for word in words.flags):
        near = _near(name, SWITCHES)
        if near and "." not in name and name.removeprefix("--") not in ForgeConfig.model_fields:
            raise ConfigError("no such flag", got=name, do=f"did you mean {near}?")
    resolved = settings.resolve(words.places if files is None else files, words.flags)
    if words.verb in STAGE_VERBS or words.verb == "run":
        _check_workspace_outlives_the_job(resolved.config.workspace)
    return resolved


def _check_workspace_outlives_the_job(uri: str) -> None:
    from pathlib import Path

    from forge_ray.storage import is_local

    # Ray sets the variable in the driver of `ray job submit`, which runs in a temporary copy of --working-dir.
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and is_local(uri) and not Path(uri.removeprefix("file://")).expanduser().is_absolute():
        raise ConfigError(
            "a submitted job's relative workspace would lie in Ray's copy of the working directory, and be deleted",
            got=f"workspace {uri}",
            wanted="an absolute path that every node sees, or a URI",
            do="add --workspace=/shared/folder or --workspace=s3://bucket/folder",
        )


def _files_and_ref(words: Words) -> tuple[list[str], str | None]:
    """The places taken apart: YAML files, and what `serve` or `show` is asked for."""
    files = [place for place in words.places if place.endswith((".yaml", ".yml"))]
    refs = [place for place in words.places if place not in files]
    if len(refs) > 1:
        raise ConfigError(f"`forge {words.verb}` takes one REF", got=" ".join(refs), wanted="[JOB.yaml ...] [REF]")
    return files, refs[0] if refs else None


def _fields_text(rows: Sequence[tuple[str, str, str, str]]) -> str:
    return "\n".join(
        f"{name}{f': {kind}' if kind else ''}{f' = {default}' if default else ''}\n    {text}"
        for name, kind, default, text in rows
    )


def _near(word: str, possible: Iterable[str]) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(word, possible, n=1)), None)


def _cluster(config: Any) -> Any:
    from forge_ray.runtime import cluster

    return cluster(config.ray)


def _dry_run(words: Words, resolved: Resolved, until: str | None) -> int:
    from forge_ray import pipeline

    rows = resolved.rows()
    planned = pipeline.plan(resolved.config, until) if until else []
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {json.dumps(value)}  [{origin}]" for name, value, origin in rows]
    todo = "need" if words.verb == "serve" else "run "  # serve runs no stage: it refuses what is not published
    lines += ["", *(f"{'skip' if p.published else todo}  {p.ref}" for p in planned)]
    served = words.verb == "run" or (words.verb == "serve" and all(p.published for p in planned[-1:]))
    then = ["serve"] if served else []
    lines += [f"run   {verb}" for verb in then]
    _print_result(
        words,
        {
            "config": [{"name": n, "value": v, "origin": o} for n, v, o in rows],
            "stages": [{"ref": p.ref, "published": p.published} for p in planned],
            "then": then,
        },
        "\n".join(lines),
    )
    return 0


def _print_result(words: Words, result: Any, text: str) -> None:
    _tell(json.dumps(result) if "--json" in words.switches else text, words.out)


def _tell(text: str, out: TextIO) -> None:
    """Prints a result; a reader that has gone (`forge show | head -1`) has had what it wanted, the work is done."""
    try:
        print(text, file=out, flush=True)
    except BrokenPipeError:
        _discard(out)


def _discard(out: TextIO) -> None:
    """Points a broken stream at nothing, or Python fails once more when it flushes the stream at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


if __name__ == "__main__":
    sys.exit(main())
