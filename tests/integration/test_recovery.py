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
from tests.integration.conftest import TINY, Finished, Forge, clean_environment, kill_tree
from tests.integration.crew import processes
from tests.waiting import wait_for

LONG = ("--pretrain.steps=600", "--pretrain.checkpoint_every_s=0.5")


KINDS = ("forge-seat", "forge-compute")


@pytest.fixture
def private(forge: Forge, ran: Finished, tmp_path: Path) -> Forge:
    """`forge` with a private cluster of its own, on a copy of the published data."""
    copy = forge.in_copy(tmp_path)
    return Forge(copy.workspace, clean_environment(tmp_path / "cache"))


def test_killing_a_worker_an_agent_and_the_driver_costs_no_committed_step_and_changes_no_weight(
    forge: Forge, ran: Finished, private: Forge
) -> None:
    undisturbed = forge("pretrain", str(TINY), "--json", *LONG)
    assert undisturbed.code == 0, undisturbed.stderr[-3000:]
    ref = undisturbed.result["stages"]["pretrain"]["ref"]
    run_id = ref.partition("/")[2]

    driver = private.start(
        "pretrain", str(TINY), *LONG, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        wait_for("a step", lambda: _steps(private, run_id))
        wait_for("workers", lambda: len(processes("forge-compute", run_id)) == 2)
        victim = processes("forge-compute", run_id)[0]
        victim.kill()
        wait_for("the next", lambda: len({*processes("forge-compute", run_id)} - {victim}) == 2)
        agents = _agents(driver.pid)
        agents[0].kill()
        wait_for("the next agent", lambda: len({*_agents(driver.pid)} - {agents[0]}) == 2)
        assert driver.poll() is None, "the run ended before its driver could be killed"
    finally:
        kill_tree(driver)
    orphans = processes("forge-compute", run_id)
    assert len(orphans) == 2, "agent, driver and Ray are gone, the workers are not"

    resumed = private("pretrain", str(TINY), "--json", *LONG)
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert resumed.result["stages"]["pretrain"]["ref"] == ref
    assert all(resumed.result["stages"][name]["skipped"] for name in ("ingest", "tokenizer", "tokenize"))
    assert _weights(private, ref) == _weights(forge, ref)
    assert not processes("forge-seat", run_id)

    events = Events.read(Storage(str(private.workspace)), run_id)
    assert len([event for event in events if event["event"] == "start"]) == 2
    steps = [event["step"] for event in events if event["event"] == "step" and not event.get("again")]
    assert steps == sorted(set(steps)), "a committed step was computed again"
    assert set(steps) | {event["step"] for event in events if event["event"] == "step"} == set(range(1, 601))


def test_ctrl_c_ends_with_130_and_leaves_no_process(private: Forge) -> None:
    driver = private.start(
        "pretrain", str(TINY), *LONG, "--pretrain.seed=3", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    below: list[psutil.Process] = wait_for(
        "workers", lambda: _agents(driver.pid) and psutil.Process(driver.pid).children(recursive=True)
    )
    seats = wait_for("seats", lambda: _seats_of(private))
    os.kill(driver.pid, signal.SIGINT)
    _, stderr = driver.communicate(timeout=90)
    assert driver.returncode == 130, stderr[-2000:]
    assert "goes on" in stderr
    psutil.wait_procs([*below, *seats], timeout=30)
    below += seats
    assert not [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _steps(forge: Forge, run_id: str) -> list[int]:
    rows = Events.read(Storage(str(forge.workspace)), run_id)
    return [row["step"] for row in rows if row["event"] == "step"]


def _seats_of(forge: Forge) -> list[psutil.Process]:
    runs = {path.name for path in (forge.workspace / "runs").glob("*")}
    return [process for run_id in runs for kind in KINDS for process in processes(kind, run_id)]


def _agents(driver_pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # others come and go meanwhile
            if "TrainWorker" in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


def _weights(forge: Forge, ref: str) -> str:
    path = Workspace(str(forge.workspace)).get(ref).local_path("model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()
