"""`forge data` on a real cluster: asked, forgotten, erased, and killed with `kill -9` in the middle of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from forge_ray.artifact import Workspace
from tests.integration.conftest import LIMIT_S, TINY, Finished, Forge, Head, kill_tree
from tests.unit.data.small_job import holders
from tests.waiting import wait_for

KEY = "botocore:sns/2010-03-31/Publish"


@pytest.fixture(scope="module")
def tokenized(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """The tiny job up to its token shards."""
    forge = Forge(tmp_path_factory.mktemp("data") / "workspace", head.environment)
    done = forge("tokenize", str(TINY))
    assert done.code == 0, done.stderr[-3000:]
    return forge


@pytest.fixture
def copied(tokenized: Forge, tmp_path: Path) -> Forge:
    """A copy of it, to be changed."""
    return tokenized.in_copy(tmp_path)


def good(done: Finished) -> Finished:
    assert done.code == 0, done.stderr[-3000:]
    return done


def said() -> str:
    """What the document says in its source."""
    from forge_ray.config import IngestConfig
    from forge_ray.data.reading import botocore_docs

    unit = {"kind": "botocore", "services": ["sns"]}
    documents = botocore_docs.read(unit, IngestConfig())
    return next(document.text for document in documents if getattr(document, "key", "") == KEY)


def test_why_and_report_of_a_real_build(tokenized: Forge, tmp_path: Path) -> None:
    answer = good(tokenized("data", "why", KEY, str(TINY), "--json")).result
    assert (answer["document"]["fate"], answer["document"]["origin"]) == ("kept", "botocore")
    assert len(answer["places"]) == 1
    page = tmp_path / "report.html"
    report = good(tokenized("data", "report", str(TINY), f"--out={page}", "--json")).result
    assert report["totals"]["tokens"] > 0
    assert page.read_text().endswith("</html>\n")
    assert tokenized("data", "why", "no such document").code == 4


def test_erasing_deletes_text_and_tokens_and_the_job_goes_on(copied: Forge) -> None:
    text = said()
    workspace = Workspace(str(copied.workspace))
    assert len(holders(workspace, text)) >= 2
    result = good(copied("data", "forget", KEY, str(TINY), "--erase", "--reason", "asked by mail", "--json")).result
    assert result["erasures"][0]["blobs"]
    assert holders(workspace, text) == []
    assert "published already" in good(copied("tokenize", str(TINY))).stderr
    good(copied("gc"))
    assert good(copied("data", "why", KEY, str(TINY), "--json")).result["document"]["fate"] == "forgotten"


@pytest.mark.parametrize("moment", ["tombstones", "memo/ingest", "erasures"])
def test_after_kill_9_the_same_command_finishes(copied: Forge, moment: str) -> None:
    text = said()
    workspace = Workspace(str(copied.workspace))
    there = set(workspace.storage.list(moment))
    words = ("data", "forget", KEY, str(TINY), "--erase", "--reason", "asked by mail", "--json")
    started = copied.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(moment, lambda: set(workspace.storage.list(moment)) - there or started.poll() is not None, LIMIT_S)
    finally:
        kill_tree(started)
    result = good(copied(*words)).result
    assert [row["key"] for row in result["forgotten"]] == [KEY]
    assert holders(workspace, text) == []
    names = workspace.storage.list("erasures")
    records = [name for name in names if name.endswith(".json")]
    assert sorted(names) == sorted([*records, *(name.replace(".json", ".done") for name in records)])
    assert len(records) == 1
    record = json.loads(workspace.storage.read_bytes(records[0]))
    assert not any(Path(workspace.uri, "blobs", b["sha256"][:2], b["sha256"]).exists() for b in record["blobs"])
    outcome = good(copied("tokenize", str(TINY), "--json")).result
    assert all(stage["skipped"] for stage in outcome["stages"].values())
