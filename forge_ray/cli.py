"""The `forge` command: what each verb does, and exit codes; its words are `words.py`.

Loads only what the verb needs; `forge --help` loads next to nothing. Results go to stdout (`--json`: one JSON object),
progress and errors to stderr. Exit codes are those of `errors.py`; 130 after Ctrl-C, 141 when a closed pipe ended the
work.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from forge_ray import __version__
from forge_ray.errors import ConfigError, ForgeError
from forge_ray.words import (
    OWN_SWITCHES,
    STAGE_VERBS,
    SWITCHES,
    Words,
    fields_text,
    near,
    own_flags,
    parse,
    usage,
    verb_usage,
)

if TYPE_CHECKING:
    from forge_ray.artifact import Artifact
    from forge_ray.settings import Resolved


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
        if "--supervise" in parsed.switches:
            return _supervise(parsed)
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


def _supervise(words: Words) -> int:
    from forge_ray import supervise

    same = [word for word in sys.orig_argv[1:] if word != "--supervise"]
    return supervise.run([sys.executable, *same], one_result="--json" in words.switches)


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
    workspace = Workspace(resolved.config.workspace, resolved.config.cache_bytes)
    exported = workspace.resolve(ref) if ref else _published_export(resolved)
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
    workspace = Workspace(resolved.config.workspace, resolved.config.cache_bytes)
    if planned.published:
        return workspace.get(planned.ref)
    do = "`forge run` with the same YAML makes it"
    with suppress(ArtifactError):
        latest = workspace.resolve("export").ref
        do += f"; the latest export there is another: `{summary.command('serve', latest, resolved.config.workspace)}`"
    raise NotFoundError("this job's model is not published yet", got=f"{planned.ref} in {workspace.uri}", do=do)


def _plan(words: Words) -> int:
    from forge_ray import plan_verbs

    if words.places[:1] == ("fit",):
        result, text = plan_verbs.fit(_resolve(words, words.places[1:]).config)
    else:
        values, flags = own_flags(words, ("--out",))
        result, text = plan_verbs.budget(_resolve(replace(words, flags=flags)).config, values.get("--out", ""))
    _print_result(words, result, text)
    return 0


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
    from forge_ray import data_verbs

    own = {"why": (), "report": ("--out", "--examples"), "forget": ("--reason",)}
    verb = words.places[0] if words.places else ""
    if verb not in own:
        close = near(verb, own)
        raise ConfigError(
            "what is asked of the documents?",
            got=verb or "nothing",
            wanted="forge data why, report or forget",
            do=f"did you mean `forge data {close}`?" if close else "`forge data --help` tells of each",
        )
    if verb != "forget" and (idle := words.switches & {"--dry-run", *OWN_SWITCHES["data"]}):
        raise ConfigError(f"`forge data {verb}` has no such switch", got=", ".join(sorted(idle)))
    values, flags = own_flags(words, own[verb])
    rest = replace(words, places=words.places[1:], flags=flags)
    files = [place for place in rest.places if place.endswith((".yaml", ".yml"))]
    names = [place for place in rest.places if place not in files]
    asked = data_verbs.Asked(_resolve(rest, files).config, bool(files), tuple(names))
    if verb == "why":
        result, text = data_verbs.why(asked)
    elif verb == "report":
        result, text = data_verbs.report(asked, values.get("--out", "data-report.html"), values.get("--examples", "3"))
    else:
        result, text = data_verbs.forget(asked, words.switches, values.get("--reason", ""))
    _print_result(words, result, text)
    return 0


def _cluster_verb(words: Words) -> int:
    from forge_ray import cluster_verbs

    values, left = own_flags(words, ("--prices",))
    _no_flags(words, left)
    asked, *names = words.places or ("",)
    verbs = ("plan", *cluster_verbs.CLUSTER, "list")
    if asked not in verbs or len(names) != (asked != "list"):
        close = near(asked, verbs)
        raise ConfigError(
            "what is asked of which cluster?",
            got=" ".join(words.places) or "nothing",
            wanted=f"forge cluster {'|'.join(verbs[:-1])} FILE, or forge cluster list",
            do=f"did you mean `forge cluster {close}`?" if close and close != asked else "name one file",
        )
    if asked == "list":
        told = cluster_verbs.listed()
    elif asked == "plan":
        told = cluster_verbs.plan(names[0], values.get("--prices"))
    else:
        told = cluster_verbs.CLUSTER[asked](names[0])
    return _tell_told(words, told)


def _submit(words: Words) -> int:
    from forge_ray import cluster_verbs

    values, flags = own_flags(words, ("--cluster", "--address"))
    verb, places = "pretrain", words.places
    if places and places[0] in (*STAGE_VERBS, "run"):
        verb, places = places[0], places[1:]
    if not places:
        raise ConfigError(
            "what is to be done there?", got="nothing", wanted="forge submit [STAGE] JOB.yaml --cluster NAME"
        )
    resolved = _resolve(replace(words, verb=verb, places=places, flags=flags), submitted=True)
    return _tell_told(words, cluster_verbs.submit(verb, resolved, values, detach="--detach" in words.switches))


def _of_a_job(words: Words) -> int:
    from forge_ray import cluster_verbs

    _no_flags(words, words.flags)
    if words.verb == "jobs":
        return _tell_told(words, cluster_verbs.all_jobs())
    if len(words.places) != 1:
        raise ConfigError("which job?", got=" ".join(words.places) or "nothing", do="`forge jobs` lists them")
    (job,) = words.places
    if words.verb == "resume":
        return _tell_told(words, cluster_verbs.resume(job, detach="--detach" in words.switches))
    return _tell_told(words, {"logs": cluster_verbs.logs, "stop": cluster_verbs.stop}[words.verb](job))


def _tell_told(words: Words, told: tuple[Any, str, int]) -> int:
    result, text, code = told
    _print_result(words, result, text)
    return code


def _no_flags(words: Words, flags: Sequence[str]) -> None:
    if flags:
        raise ConfigError(
            f"`forge {words.verb}` has no such flag", got=" ".join(flags), do=f"see `forge {words.verb} --help`"
        )


def _gc(words: Words) -> int:
    from forge_ray import garbage
    from forge_ray.artifact import Workspace
    from forge_ray.telemetry import format_bytes

    workspace = Workspace(_resolve(words).config.workspace)
    found = garbage.find(workspace)
    dry = "--dry-run" in words.switches
    if not dry:
        garbage.delete(workspace, found)
    total = sum(size for _, size in found)
    names = "".join(f"\n  {name}  {format_bytes(size)}" for name, size in found)
    _print_result(
        words,
        {
            "workspace": workspace.uri,
            "deleted": not dry,
            "bytes": total,
            "names": [name for name, _ in found],
        },
        f"{'would delete' if dry else 'deleted'} {len(found)} files, {format_bytes(total)}, older than an hour, "
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
        words, [dict(zip(("name", "type", "default", "text"), row, strict=True)) for row in rows], fields_text(rows)
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
    "plan": _plan,
    "serve": _serve,
    "cluster": _cluster_verb,
    "submit": _submit,
    **dict.fromkeys(("jobs", "logs", "stop", "resume"), _of_a_job),
    "show": _show,
    "data": _data,
    "gc": _gc,
    "config": _config,
    "doctor": _doctor,
}


# ------------------------------------------------------------------------------------------------------------ helpers


def _resolve(words: Words, files: Sequence[str] | None = None, *, submitted: bool = False) -> Resolved:
    from forge_ray import settings
    from forge_ray.config import ForgeConfig

    for name in (word.partition("=")[0] for word in words.flags):
        close = near(name, SWITCHES)
        if close and "." not in name and name.removeprefix("--") not in ForgeConfig.model_fields:
            raise ConfigError("no such flag", got=name, do=f"did you mean {close}?")
    resolved = settings.resolve(words.places if files is None else files, words.flags)
    if words.verb in STAGE_VERBS or words.verb == "run":
        _check_workspace_outlives_the_job(resolved.config.workspace, submitted)
    return resolved


def _check_workspace_outlives_the_job(uri: str, submitted: bool) -> None:
    from pathlib import Path

    from forge_ray.storage import is_local

    # Ray sets the variable in the driver of `ray job submit`, which runs in a temporary copy of --working-dir.
    submitted |= "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
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
