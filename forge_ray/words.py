"""The words of the `forge` command: its verbs, what each says of itself, and a command line taken apart.

Owns the texts of `--help` and the order in which words may stand. Does nothing: that is `cli.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from forge_ray.errors import ConfigError

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
    "plan": "what a budget buys, before any is spent; `forge plan fit` predicts a job from small runs",
    "run": "all stages, then serve and ask once",
    "serve": "an OpenAI-compatible endpoint for JOB.yaml or an export's REF, until Ctrl-C",
    "cluster": "plan, up, status, down, doctor: a cluster of Ray's launcher; list: those that were started from here",
    "submit": "a job to a cluster, followed until it ends",
    "jobs": "what was submitted from here, and what became of it",
    "logs": "the log of a job, until it ends",
    "stop": "end a job in order, with a last checkpoint",
    "resume": "submit a job again: it goes on where it stopped",
    "show": "an artifact and its ancestors, or the names of all artifacts",
    "data": "why: the fate of a document; report: of all of them; forget: leave documents out, and erase them",
    "gc": "delete what no artifact refers to",
    "config": "every field: type, default, meaning",
    "doctor": "check this machine and say what to mend",
}
_USAGE_OF = {"run": OTHER_VERBS["run"], **STAGE_VERBS, **OTHER_VERBS}
SWITCHES = ("--dry-run", "--json", "--help", "--version")
OWN_SWITCHES = {"pretrain": ("--supervise",), "run": ("--supervise",), "data": ("--duplicates", "--erase")}
OWN_SWITCHES |= {"submit": ("--detach",), "resume": ("--detach",)}
_OF_A_JOB = "[JOB.yaml ...] [--section.field VALUE ...] [--dry-run] [--json]"
_SUPERVISED = f"{_OF_A_JOB} [--supervise]"
_USAGES = {
    "pretrain": _SUPERVISED,
    "run": _SUPERVISED,
    "tokenizer": "[sweep] [JOB.yaml ...] [--section.field VALUE ...] [--dry-run] [--json]",
    "plan": """[JOB.yaml ...] [--plan.usd USD] [--plan.hours H] [--section.field VALUE ...] [--out FILE.yaml] [--json]
       forge plan fit JOB.yaml ... [--section.field VALUE ...] [--json]""",
    "serve": "JOB.yaml ... | REF [--section.field VALUE ...] [--dry-run] [--json]",
    "cluster": """plan FILE [--prices FILE.yaml] [--json]
       forge cluster up|status|down|doctor FILE|NAME [--json]
       forge cluster identity NAME [--json]
       forge cluster list [--json]""",
    "submit": """[STAGE] JOB.yaml ... --cluster FILE|NAME | --address URL [--section.field VALUE ...]
       [--detach] [--json]""",
    "jobs": "[--json]",
    "logs": "JOB [--json]",
    "stop": "JOB [--json]",
    "resume": "JOB [--detach] [--json]",
    "show": "[JOB.yaml ...] [REF] [--workspace URI] [--json]",
    "data": """why DOC [JOB.yaml ...] [--workspace URI] [--json]
       forge data report [JOB.yaml ... | REF] [--out FILE.html] [--examples N] [--workspace URI] [--json]
       forge data forget DOC ... [JOB.yaml ...] [--reason TEXT] [--duplicates] [--erase] [--dry-run] [--json]""",
    "gc": "[JOB.yaml ...] [--workspace URI] [--dry-run] [--json]",
    "config": "[SECTION ...] [--json]",
    "doctor": "[JOB.yaml ...] [--section.field VALUE ...] [--json]",
}
_SUPERVISE = """--supervise starts it again, without a person, when it was killed or lost a store, Ray or a node.
What starts the supervisor again after a reboot is a systemd unit (Restart=on-failure) or a Kubernetes Job."""
_NOTES = {
    "plan": """The corpus is plan.corpus_tokens, or plan.corpus_bytes, or what the job has published.
--out writes the best option as YAML, to be laid over the job: forge run JOB.yaml FILE.yaml.
fit trains a ladder of small models on the job's documents and writes down what it expects of the job; the job's own
result is then shown beside it.""",
    "pretrain": _SUPERVISE,
    "run": _SUPERVISE,
    "cluster": """FILE is Ray's own: `ray up`, `ray attach` and `ray dashboard` take it too. plan calls no cloud and
shows what would be created, what it costs, and what is wrong or unsafe; up refuses that. down looks whether anything
is left.
identity makes the token and the authority of a cluster on Kubernetes (cluster/kubernetes/).
Tokens and certificates are made once for a cluster, in ~/.forge-ray/clusters, and reach its nodes by SSH.""",
    "submit": """STAGE is one of forge's verbs, pretrain unless it is given. The job takes this package and its resolved
configuration along; its driver runs on the head under --supervise. A lost connection is made again; Ctrl-C leaves the
job running.""",
    "data": """DOC is a document's id, its beginning, its key or its source. Without JOB.yaml the latest build counts.
report prints a summary and writes one page (./data-report.html); what it shows has passed the finders of private data.
forget writes tombstones: the next build leaves these documents out. --duplicates takes those that say the same too.
--erase, with JOB.yaml, makes that build now, deletes every file that holds them, and puts it on record.""",
}
# What `forge VERB --help` lists; a stage that is not here has one section, of its own name.
_SECTIONS = {
    "tokenizer": ("tokenizer", "sweep"),
    "pretrain": ("model", "pretrain"),
    "plan": ("plan",),
    "serve": ("serve",),
    "run": ("serve",),
}


def usage() -> str:
    """The text of `forge --help`."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in _USAGE_OF.items())
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
    parts = [f"usage: forge {verb} {_USAGES.get(verb, _OF_A_JOB)}\n\n{_USAGE_OF[verb]}"]
    parts += [_NOTES[verb]] if verb in _NOTES else []
    sections = _SECTIONS.get(verb, (verb,) if verb in STAGE_VERBS else ())
    if sections:
        from forge_ray import settings

        parts += [fields_text(settings.fields(sections)), "`forge config` lists the fields of every section."]
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Words:
    """A command line taken apart."""

    verb: str
    places: tuple[str, ...]
    flags: tuple[str, ...]
    switches: frozenset[str]
    out: TextIO = field(default_factory=lambda: sys.stdout)


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
        close = near(verb, SWITCHES)
        raise ConfigError(
            "the verb comes first", got=verb, do=f"did you mean {close}?" if close else "forge --help lists the verbs"
        )
    if verb not in _USAGE_OF:
        close = near(verb, _USAGE_OF)
        raise ConfigError(
            "no such verb", got=verb, do=f"did you mean `forge {close}`?" if close else "forge --help lists the verbs"
        )
    places: list[str] = []
    flags: list[str] = []
    while rest:
        word = rest.pop(0)
        if word in OWN_SWITCHES.get(verb, ()):
            switches |= {word}
            continue
        if not word.startswith("-"):
            places.append(word)
            continue
        flags.append(word)
        if word.startswith("--") and "=" not in word and rest and not rest[0].startswith("--"):
            flags.append(rest.pop(0))
    return Words(verb, tuple(places), tuple(flags), switches)


def own_flags(words: Words, names: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
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


def fields_text(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Fields of the configuration for a terminal."""
    return "\n".join(
        f"{name}{f': {kind}' if kind else ''}{f' = {default}' if default else ''}\n    {text}"
        for name, kind, default, text in rows
    )


def near(word: str, possible: Iterable[str]) -> str | None:
    """The likeliest meant of these, if any is near."""
    import difflib

    return next(iter(difflib.get_close_matches(word, possible, n=1)), None)
