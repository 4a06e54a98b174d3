"""`forge submit` and `ray job submit`: the same command, sent to a running head, followed, stopped, resumed, seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import LIMIT_S, ROOT, TINY, Finished, Forge, Head
from tests.integration.crew import processes
from tests.waiting import wait_for


def test_a_submitted_pretraining_runs_on_the_head_and_is_seen_on_its_dashboard(
    head: Head, forge: Forge, ran: Finished
) -> None:
    entry = ["forge", "pretrain", str(TINY.relative_to(ROOT)), f"--workspace={forge.workspace}", "--pretrain.seed=11"]
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ray")),
            "job",
            "submit",
            f"--address={head.dashboard}",
            "--working-dir",
            ".",
            "--submission-id=forge-test",
            "--",
            *entry,
        ],
        cwd=ROOT,
        env={k: v for k, v in head.environment.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "pretrain: published pretrain/" in done.stdout
    jobs = {job["submission_id"]: job["status"] for job in head.get("/api/jobs/")}
    assert jobs["forge-test"] == "SUCCEEDED"
    runs = head.get("/api/train/v2/runs/v1")["train_runs"]
    mine = [run for run in runs if run["name"].startswith("pretrain-")]
    assert {run["status"] for run in mine} == {"FINISHED"}, mine


@pytest.fixture
def user(head: Head, forge: Forge, ran: Finished, tmp_path: Path) -> Forge:
    """Somebody who knows the head's address and token, and has a home of their own."""
    kept = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    return Forge(forge.workspace, kept | {"HOME": str(tmp_path), "RAY_JOB_STOP_WAIT_TIME_S": "60"})


def _asked(user: Forge, *words: str) -> Finished:
    """A command that takes no workspace."""
    command = [sys.executable, "-m", "forge_ray.cli", *words, "--json"]
    done = subprocess.run(
        command, env=user.environment, cwd=ROOT, text=True, capture_output=True, timeout=LIMIT_S, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def _workers(user: Forge, kind: str) -> list[psutil.Process]:
    """Of the runs in this workspace."""
    runs = {path.name for path in (user.workspace / "runs").glob("*")}
    return [process for run_id in runs for process in processes(kind, run_id)]


def test_a_job_is_followed_stopped_in_order_and_resumed_to_its_end(head: Head, user: Forge) -> None:
    sent = user(
        "submit",
        *("pretrain", str(TINY), "--json", f"--address={head.dashboard}", "--detach", "--pretrain.seed=12"),
        "--pretrain.steps=400",
    )
    assert sent.code == 0, sent.stderr[-3000:]
    job = sent.result["job"]
    wait_for("its workers", lambda: len(_workers(user, "forge-compute")) == 2)
    assert [row["status"] for row in _asked(user, "jobs").result["jobs"]] == ["RUNNING"]
    stopped = _asked(user, "stop", job)
    assert stopped.result["status"] == "STOPPED", stopped.stderr
    assert not _workers(user, "forge-seat"), "a stopped job leaves no worker behind"

    resumed = _asked(user, "resume", job)
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert resumed.result["exit_code"] == 0
    assert "pretrain: published pretrain/" in resumed.stderr
    again = _asked(user, "logs", resumed.result["job"])
    assert "pretrain: published pretrain/" in again.stderr
    assert [row["status"] for row in _asked(user, "jobs").result["jobs"]] == ["STOPPED", "SUCCEEDED"]


def test_a_job_that_fails_gives_its_exit_code_and_says_what_to_do(head: Head, user: Forge) -> None:
    words = ("submit", "pretrain", str(TINY), "--json", f"--address={head.dashboard}")
    done = user(*words, "--pretrain.slots=4096")
    assert done.code == 2, done.stderr[-3000:]
    assert json.loads(done.stdout)["exit_code"] == 2
    assert "raise pretrain.mixture.max_epochs" in done.stderr
