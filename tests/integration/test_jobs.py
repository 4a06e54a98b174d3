"""`ray job submit`: the same command, sent to a running head, and seen on its dashboard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import LIMIT_S, ROOT, TINY, Finished, Forge, Head


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
