"""What a job takes along, what is kept of it here, and a log that is shown once over several connections."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from forge_ray import settings
from forge_ray.cluster import jobs
from forge_ray.cluster.jobs import Record
from forge_ray.errors import ConfigError, LostError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_pack_holds_the_package_the_job_and_the_lock_and_works_by_itself(tmp_path: Path) -> None:
    resolved = settings.resolve([ROOT / "jobs" / "demo.yaml"], ("--pretrain.steps=7", "--workspace=/srv/w"), {})
    config = yaml.safe_dump(resolved.config.model_dump(mode="json", exclude_unset=True))
    with jobs.packed(config) as folder:
        assert {path.name for path in folder.iterdir()} == {"forge_ray", "job.yaml", "requirements.lock"}
        assert not list(folder.rglob("__pycache__"))
        words = [sys.executable, "-m", "forge_ray.cli", "pretrain", "job.yaml", "--dry-run", "--json"]
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
        )
        assert done.returncode == 0, done.stderr
        there = settings.resolve([folder / "job.yaml"], (), {}).config
    assert there == resolved.config
    assert not folder.exists()


class Cluster:
    """A cluster whose connection breaks at given places of a job's log."""

    def __init__(self, log: str, breaks: list[int], code: int = 0) -> None:
        self.log, self.breaks, self.code = log, breaks, code

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        upto = self.breaks.pop(0) if self.breaks else len(self.log)
        for begin in range(0, upto, 7):
            yield self.log[begin : min(begin + 7, upto)]
        if upto < len(self.log):
            raise RuntimeError("WebSocket closed")

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status="FAILED" if self.code else "SUCCEEDED", driver_exit_code=self.code)

    @contextlib.contextmanager
    def client(self, record: Record) -> Iterator[Cluster]:
        yield self


RECORD = Record("pretrain-1", "pretrain", "", "http://head:8265", "2026-01-01")


@pytest.mark.parametrize("code", [0, 3])
def test_a_log_is_shown_once_however_often_the_connection_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    log = "".join(f"step {number}\n" for number in range(40))
    cluster = Cluster(log, [0, 14, 14, 102], code)  # between lines, so that what is said meanwhile can be told apart
    monkeypatch.setattr(jobs, "_client", cluster.client)
    monkeypatch.setattr(jobs, "_AGAIN_S", 0.0)
    assert jobs.follow(RECORD) == code
    said = [line for line in capsys.readouterr().err.splitlines(keepends=True) if "connection" not in line]
    assert "".join(said) == log


def test_a_cluster_that_stays_away_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_client", Cluster("x" * 99, [0] * 1000).client)
    monkeypatch.setattr(jobs, "_AGAIN_S", 0.0)
    monkeypatch.setattr(jobs, "_PATIENCE_S", 0.05)
    with pytest.raises(LostError, match="may go on") as caught:
        jobs.follow(RECORD)
    assert "forge resume pretrain-1" in str(caught.value.do)


def test_a_job_that_could_not_be_sent_leaves_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def away(record: Record) -> Iterator[None]:
        raise LostError("the cluster does not answer")
        yield

    monkeypatch.setattr(jobs, "_client", away)
    with pytest.raises(LostError):
        jobs.submit("pretrain", "{}", cluster="", address="http://nowhere:1")
    assert jobs.records() == []


def test_a_job_is_found_by_the_beginning_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_send", lambda record, config: None)
    first, second = (jobs.submit(verb, "{}", cluster="", address="http://h") for verb in ("pretrain", "run"))
    assert jobs.find(first.job[:-3]) == first
    assert jobs.records() == sorted([first, second], key=lambda record: record.submitted)
    with pytest.raises(ConfigError, match="no such job"):
        jobs.find("ingest")
    with pytest.raises(ConfigError, match="several"):
        jobs.find("")
    again = jobs.resume(second.job)
    assert again.verb == "run"
    assert again.job != second.job
