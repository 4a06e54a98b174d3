"""Kills: of a worker, of the driver, of everything. The run goes on from the workspace and the weights are the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from forge_ray.artifact import Workspace
from forge_ray.events import Events
from forge_ray.storage import Storage
from tests.integration.conftest import TINY, Finished, Forge, clean_environment, kill_tree, wait_for

LONG = ("--pretrain.steps=400", "--pretrain.checkpoint_every_s=0.5")


@pytest.fixture
def private(forge: Forge, ran: Finished, tmp_path: Path) -> Forge:
    """`forge` with a private cluster of its own, on a copy of the published data."""
    copy = forge.in_copy(tmp_path)
    return Forge(copy.workspace, clean_environment(tmp_path / "cache"))


def test_killing_a_worker_and_then_everything_costs_no_committed_step_and_changes_no_weight(
    forge: Forge, ran: Finished, private: Forge
) -> None:
    undisturbed = forge("pretrain", str(TINY), "--json", *LONG)
    assert undisturbed.code == 0, undisturbed.stderr[-3000:]
    ref = undisturbed.result["stages"]["pretrain"]["ref"]

    driver = private.start(
        "pretrain", str(TINY), *LONG, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        first = wait_for("a checkpoint", lambda: _checkpoints(private, ref))
        _worker_of(driver.pid).kill()
        wait_for("a checkpoint after the worker's death", lambda: max(_checkpoints(private, ref)) > max(first))
        assert driver.poll() is None, "the run ended before it could be killed"
    finally:
        kill_tree(driver)
    killed_at = max(_checkpoints(private, ref))

    resumed = private("pretrain", str(TINY), "--json", *LONG)
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert resumed.result["stages"]["pretrain"]["ref"] == ref
    assert all(resumed.result["stages"][name]["skipped"] for name in ("ingest", "tokenizer", "tokenize"))
    assert _weights(private, ref) == _weights(forge, ref)

    events = Events.read(Storage(str(private.workspace)), ref.partition("/")[2])
    starts = [event["step"] for event in events if event["event"] == "start"]
    assert len(starts) == 3
    assert starts[0] == 0
    assert starts[2] == killed_at
    assert {event["step"] for event in events if event["event"] == "step"} == set(range(1, 401))


def test_ctrl_c_ends_with_130_and_leaves_no_process(private: Forge) -> None:
    driver = private.start(
        "pretrain", str(TINY), *LONG, "--pretrain.seed=3", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    below: list[psutil.Process] = wait_for(
        "workers", lambda: _workers(driver.pid) and psutil.Process(driver.pid).children(recursive=True)
    )
    os.kill(driver.pid, signal.SIGINT)
    _, stderr = driver.communicate(timeout=90)
    assert driver.returncode == 130, stderr[-2000:]
    assert "goes on" in stderr
    psutil.wait_procs(below, timeout=30)
    assert not [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _checkpoints(forge: Forge, ref: str) -> list[int]:
    folder = forge.workspace / "runs" / ref.partition("/")[2] / "checkpoints"
    return sorted(int(path.stem) for path in folder.glob("*.json"))


def _workers(driver_pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # others come and go meanwhile
            if "TrainWorker" in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


def _worker_of(driver_pid: int) -> psutil.Process:
    return wait_for("a Ray Train worker", lambda: _workers(driver_pid))[-1]


def _weights(forge: Forge, ref: str) -> str:
    path = Workspace(str(forge.workspace)).get(ref).local_path("model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()
