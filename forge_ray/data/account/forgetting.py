"""The answer to `forge data forget`: which documents, what else says the same, who has seen them, what was erased.

Owns putting together and telling. Tombstones are `forget.py`, deleting is `erase.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forge_ray.artifact import Workspace
from forge_ray.data.account import builds, erase, explain, forget, ledger
from forge_ray.data.account.builds import Build, Found
from forge_ray.errors import ArtifactError
from forge_ray.telemetry import format_bytes, say

_SHOWN = 12
_MOST_VERSIONS = 1000


@dataclass(frozen=True)
class Plan:
    """Documents to forget, and what that touches.

    `duplicates` are the other documents that say the same; `sought` says whether they were looked for at all, which
    only a build with that step of curation has done. `versions` are documents with the same key that said something
    else, in this build or an earlier one: the files of earlier builds still hold them.
    """

    rows: tuple[dict[str, Any], ...]
    duplicates: tuple[dict[str, Any], ...]
    sought: bool
    versions: tuple[dict[str, Any], ...]
    places: tuple[explain.Place, ...]
    readers: tuple[explain.Reader, ...]
    unknown_runs: tuple[str, ...]
    erased_before: tuple[str, ...]
    running: tuple[str, ...]


def plan(workspace: Workspace, names: Sequence[str], build: Build, with_duplicates: bool) -> Plan:
    """Finds the documents; writes nothing.

    Args:
        names: Ids, unique prefixes of ids, keys or sources.
        build: Where to look first.
        with_duplicates: Whether what says the same is to be forgotten too.

    Raises:
        NotFoundError: There is no such document in any build.
        ArtifactError: One of the names means several.
    """
    others = list(builds.every(workspace))
    found = [_with_ledger(builds.find(name, build, others), others) for name in names]
    rows = {one.id: one.row for one in found}
    same = {row["id"]: row for one in found for row in explain.duplicates(one)}
    same = {doc_id: row for doc_id, row in same.items() if doc_id not in rows}
    if with_duplicates:
        rows |= same
        same = {}
    places = explain.places_of(workspace, set(rows))
    readers, unknown = explain.readers_of(workspace, places)
    return Plan(
        rows=tuple(rows.values()),
        duplicates=tuple(same.values()),
        sought=any(_compared(one.build) for one in found),
        versions=tuple(_versions(workspace, list(rows.values()), others)),
        places=tuple(places),
        readers=readers,
        unknown_runs=unknown,
        erased_before=tuple(
            f"on {record['when']}: {record['record']}" for record in forget.erasures_of(workspace, set(rows))
        ),
        running=tuple(erase.running(workspace)),
    )


def _versions(workspace: Workspace, rows: Sequence[dict[str, Any]], others: Sequence[Build]) -> list[dict[str, Any]]:
    """Documents with one of these keys and another id, in any build, that have no tombstone yet."""
    import pyarrow.dataset as ds

    ids, keys = [row["id"] for row in rows], [row["key"] for row in rows]
    wanted = ds.field("key").isin(keys) & ~ds.field("id").isin(ids)
    found: dict[str, dict[str, Any]] = {}
    searched: set[str] = set()
    for file in (file for build in others for file in builds.files(build)):
        if file.sha256 in searched:
            continue
        searched.add(file.sha256)
        try:
            found = {row["id"]: row for row in file.rows(wanted, _MOST_VERSIONS)} | found
        except ArtifactError as error:  # parts that were never curated, and are erased by now
            say(f"  passed over: {error.what}")
    buried = {stone["id"] for stone in forget.tombstones(workspace)}
    return [row for row in found.values() if row["id"] not in buried and row["fate"] != ledger.SKIPPED]


def _with_ledger(found: Found, others: Sequence[Build]) -> Found:
    """A document that is forgotten already, as the newest build has it that still held it and knew its duplicates."""
    if found.row["fate"] != ledger.FORGOTTEN:
        return found
    for build in others:
        row = explain.row_of(build, found.id)
        if row and row["fate"] != ledger.FORGOTTEN:
            return Found(row, build)
    return found


def _compared(build: Build) -> bool:
    if build.curate is None:
        return False
    steps = build.curate.metrics.get("steps", ())
    return "exact" in steps or "near" in steps


def as_json(plan: Plan, stones: Sequence[dict[str, Any]], erased: erase.Erased | None, dry: bool) -> dict[str, Any]:
    """For `--json`."""
    return {
        "dry_run": dry,
        "forgotten": [explain.brief(row) for row in plan.rows],
        "tombstones": list(stones),
        "duplicates_left": [explain.brief(row) for row in plan.duplicates],
        "duplicates_were_sought": plan.sought,
        "other_versions": [explain.brief(row) for row in plan.versions],
        "places": [vars(place) for place in plan.places],
        "readers": [vars(reader) for reader in plan.readers],
        "runs_that_do_not_say": list(plan.unknown_runs),
        "running": list(plan.running),
        "erasures": list(erased.records) if erased else [],
        "unreadable": list(erased.unreadable) if erased else [],
    }


def as_text(plan: Plan, erased: erase.Erased | None, dry: bool) -> str:
    """For a terminal."""
    verb = "would forget" if dry else "forgotten"
    rows = explain.lines(verb, [f"{row['id']}  {row['source']}, {row['fate']} until now" for row in plan.rows])
    rows += explain.lines("says the same", [explain.one_line(row) for row in plan.duplicates])
    if plan.duplicates:
        rows.append(("", "one of these takes its place in the next build; --duplicates forgets them too"))
    elif not plan.sought:
        rows.append(("says the same", "not known: curate.exact and curate.near were off"))
    rows += explain.lines("same key", [explain.one_line(row) for row in plan.versions])
    if plan.versions:
        rows.append(
            ("", "these said something else in an earlier build, or do so beside it; their ids forget them too")
        )
    rows += explain.lines("tokens in", [explain.place_text(place) for place in plan.places])
    rows += explain.lines("read by", [explain.reader_text(reader) for reader in plan.readers])
    if plan.unknown_runs:
        rows.append(("perhaps by", f"runs that do not say what they read: {', '.join(plan.unknown_runs[:_SHOWN])}"))
    rows += explain.lines("erased before", plan.erased_before)
    if erased is None:
        rows.append(
            ("next", "the next build leaves them out; --erase with JOB.yaml makes it now and deletes old bytes")
        )
    else:
        rows += _erased(erased)
    rows += [
        ("not yet", f"{stage} runs, or was killed; if it runs, call this again when it is done")
        for stage in plan.running
    ]
    return explain.table(rows)


def _erased(erased: erase.Erased) -> list[tuple[str, str]]:
    rows = []
    for record in erased.records:
        size = sum(blob["size_bytes"] for blob in record["blobs"])
        rows.append(("erased", f"{len(record['blobs'])} files, {format_bytes(size)}: {record['record']}"))
        rows += [("not erased", text) for text in record["left"]]
        rows += [("not readable now", f"{ref} of another job: run it again") for ref in record["other_jobs"]]
    if not erased.records:
        rows.append(("erased", "nothing: no file of the workspace holds them"))
    rows += [("unreadable", text) for text in erased.unreadable[:_SHOWN]]
    return rows
