"""What `forge data why`, `report` and `forget` do: a build is chosen, asked, and told of.

Each gives its result as JSON values and as text. The answers themselves are in `data/`: `explain.py`, `report.py`,
`forgetting.py` and `erase.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray import pipeline
from forge_ray.artifact import Workspace
from forge_ray.config import ForgeConfig
from forge_ray.data.account import builds, erase, explain, forgetting, report_page
from forge_ray.data.account import forget as tombstones
from forge_ray.data.account import report as reports
from forge_ray.errors import ConfigError

Told = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Asked:
    """What a question is about: `names` are documents or a REF; without a job the latest build counts."""

    config: ForgeConfig
    is_job: bool
    names: tuple[str, ...]

    @property
    def workspace(self) -> Workspace:
        """Where it is answered."""
        return Workspace(self.config.workspace, self.config.cache_bytes)

    def build(self, workspace: Workspace) -> builds.Build:
        """The job's newest build, or the newest of all."""
        return builds.latest(workspace, self.config if self.is_job else None)


def why(asked: Asked) -> Told:
    """What became of one document.

    Raises:
        ConfigError: Not one name is given.
        NotFoundError: There is no such document.
    """
    if len(asked.names) != 1:
        raise ConfigError("which document?", got=" ".join(asked.names) or "none", wanted="its id, key or source")
    workspace = asked.workspace
    answer = explain.why(workspace, asked.names[0], asked.build(workspace))
    return answer.as_json(), explain.as_text(answer)


def report(asked: Asked, out: str, examples: str) -> Told:
    """What became of all documents of a build; a page is written to `out`.

    Raises:
        ConfigError: A REF and a job are given, or two REFs, or no number of examples.
    """
    names = asked.names
    if len(names) > 1 or (names and asked.is_job):
        raise ConfigError("the report is of one build", got=" ".join(names), wanted="[JOB.yaml ...] or [REF]")
    if not examples.isdigit():
        raise ConfigError("--examples wants a number", got=examples)
    workspace = asked.workspace
    build = builds.of_ref(workspace, names[0]) if names else asked.build(workspace)
    found = reports.gather(build, num_examples=int(examples))
    report_page.write(Path(out), found)
    return {"page": out, **found}, f"{reports.as_text(found)}\n\nAll of it: {out}"


def forget(asked: Asked, switches: Collection[str], reason: str) -> Told:
    """Writes tombstones; with `--erase` makes the job's next build and deletes what holds the documents.

    Raises:
        ConfigError: No name is given, or `--erase` without a job.
        NotFoundError: There is no such document.
    """
    if not asked.names:
        raise ConfigError("which documents?", got="none", wanted="ids, keys or sources")
    if "--erase" in switches and not asked.is_job:
        raise ConfigError(
            "--erase makes the job's next build before it deletes old bytes",
            got="no JOB.yaml",
            do="name the job: forge data forget DOC JOB.yaml --erase",
        )
    workspace, dry = asked.workspace, "--dry-run" in switches
    plan = forgetting.plan(workspace, asked.names, asked.build(workspace), "--duplicates" in switches)
    stones, erased = [], None
    if not dry:
        stones = tombstones.bury(workspace, plan.rows, reason)
        if "--erase" in switches:
            made = pipeline.run(asked.config, "tokenize")
            artifacts = [outcome.artifact for outcome in made.values()]
            erased = erase.erase(workspace, plan.rows, reason, artifacts, plan.duplicates)
    return forgetting.as_json(plan, stones, erased, dry), forgetting.as_text(plan, erased, dry)
