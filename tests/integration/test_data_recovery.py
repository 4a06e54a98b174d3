"""Kills in the data engine: of workers and of the driver, in every stage. The rerun ends in the same bytes."""

from __future__ import annotations

import contextlib
import random
import subprocess
from pathlib import Path

import psutil
import pytest

from forge_ray.artifact import Workspace
from tests.integration.conftest import Forge, clean_environment, kill_tree
from tests.waiting import wait_for

STAGES = ("ingest", "curate", "tokenizer", "tokenize")
SOURCES, DOCUMENTS = 6, 200
JOB = """
ingest:
  held_out_frac: 0.1
  sources:
{sources}
curate:
  normalize: {{enabled: true}}
  quality: {{enabled: true, min_stop_words: 0, min_words: 5}}
  privacy: {{enabled: true}}
  exact: {{enabled: true}}
  near: {{enabled: true}}
  decontaminate: {{enabled: true}}
  lines: {{enabled: true}}
tokenizer: {{vocab_size: 600, sample_bytes: 300000}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A corpus of six folders, so of six units, with duplicates, repeated lines and private data; and its YAML."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(900)]
    texts: list[str] = []
    for source in range(SOURCES):
        folder = tmp_path / f"source-{source}"
        folder.mkdir()
        for number in range(DOCUMENTS):
            if texts and draw.random() < 0.1:
                text = draw.choice(texts) + f" {draw.choice(words)}"
            else:
                lines = [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(draw.randint(3, 12))]
                text = "\n".join(
                    ["Internal use only, do not pass on.", *lines, f"ask {draw.choice(words)}@example.com"]
                )
            texts.append(text)
            (folder / f"{number:03d}.txt").write_text(text)
    sources = "\n".join(f"    - {{kind: files, uri: {tmp_path}/source-{i}}}" for i in range(SOURCES))
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(sources=sources))
    return path


MOMENTS = (("ingest", 2), ("clean", 2), ("clean", SOURCES), ("apply", 2), ("tokenize", 2))


def test_the_driver_killed_in_each_stage_changes_no_byte_of_shards_and_ledger(
    forge: Forge, job: Path, tmp_path: Path
) -> None:
    private = Forge(tmp_path / "workspace", clean_environment(tmp_path / "cache"))
    for kind, enough in MOMENTS:
        driver = _started(private, job, tmp_path / "log")
        try:
            _wait_for(private, driver, kind, enough)
        finally:
            kill_tree(driver)
    _same_bytes(private, forge, job)


def test_workers_killed_in_each_stage_cost_their_piece_alone(forge: Forge, job: Path, tmp_path: Path) -> None:
    private = Forge(tmp_path / "workspace", clean_environment(tmp_path / "cache"))
    driver = _started(private, job, tmp_path / "log")
    try:
        for kind, enough in MOMENTS:
            _wait_for(private, driver, kind, enough)
            for worker in _workers(driver.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        assert driver.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-4000:]
    finally:
        kill_tree(driver)
    _same_bytes(private, forge, job)


def _started(forge: Forge, job: Path, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as sink:
        return forge.start("tokenize", str(job), start_new_session=True, stdout=sink, stderr=sink)


def _wait_for(forge: Forge, driver: subprocess.Popen[str], kind: str, enough: int) -> None:
    folder = forge.workspace / "memo" / kind
    wait_for(
        f"{enough} pieces of {kind}",
        lambda: driver.poll() is not None or len(list(folder.glob("*.json"))) >= enough,
    )


def _same_bytes(private: Forge, forge: Forge, job: Path) -> None:
    rerun = private("tokenize", str(job), "--json")
    assert rerun.code == 0, rerun.stderr[-3000:]
    undisturbed = forge("tokenize", str(job), "--json")
    assert undisturbed.code == 0, undisturbed.stderr[-3000:]
    for stage in STAGES:
        ref = rerun.result["stages"][stage]["ref"]
        assert ref == undisturbed.result["stages"][stage]["ref"]
        ours, theirs = (Workspace(str(each.workspace)).get(ref).manifest.files for each in (private, forge))
        assert ours == theirs
    dropped = undisturbed.result["stages"]["curate"]["metrics"]["dropped"]
    assert {"exact", "near"} & set(dropped)


def _workers(driver_pid: int) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it has done its work
        below = psutil.Process(driver_pid).children(recursive=True)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            title = "".join(process.cmdline()[:1])
            if title.startswith("ray::") and "Agent" not in title:  # with its agents a node dies
                found.append(process)
    return found
