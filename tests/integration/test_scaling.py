"""Agents under Ray Train on a private cluster of a head and three nodes of one CPU: killed, lost, drained, taken in."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from forge_ray.train.nodes import placement, scaling
from tests.integration.conftest import ROOT
from tests.waiting import wait_for

STORE_BYTES = 80 << 20
WITNESS = "FORGE_TEST_WITNESS"


class Witness(ControllerCallback, WorkerGroupCallback):
    """Writes down what the controller does; made on the driver, runs in the controller."""

    def __init__(self) -> None:
        self._path = os.environ[WITNESS]

    def _tell(self, what: str) -> None:
        with open(self._path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"what": what, "time_s": time.monotonic()}) + "\n")

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self._tell(type(current_state).__name__)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        self._tell("resize")

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        self._tell(f"poll of {len(worker_group_status.worker_statuses)}")


def _agent() -> Callable[[dict[str, Any]], None]:
    """An agent that writes down who it is and waits; pickled by value, so that workers need not import this module."""

    def agent(config: dict[str, Any]) -> None:
        import json
        import os
        import sys
        import time
        from pathlib import Path

        import ray

        about = ray.get_runtime_context()
        row = {"pid": os.getpid(), "node": about.get_node_id(), "torch": "torch" in sys.modules}
        folder = Path(config["folder"])
        (folder / f"{os.getpid()}.new").write_text(json.dumps(row))
        (folder / f"{os.getpid()}.new").rename(folder / f"{os.getpid()}.json")
        while not (folder / "over").exists():
            time.sleep(0.05)

    return agent


@dataclass
class Run:
    """A run of agents in a thread of this process."""

    folder: Path
    thread: threading.Thread
    outcome: list[BaseException | None]

    def agents(self) -> dict[int, str]:
        """Process id and node of the agents that live."""
        rows = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]
        return {row["pid"]: row["node"] for row in rows if _lives(row["pid"])}

    def witnessed(self) -> list[dict[str, Any]]:
        """What the controller did, in order."""
        path = self.folder / "witness"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, what: str, ready: Callable[[], Any]) -> Any:
        """Polls until something is so, and the run goes on."""
        return wait_for(what, lambda: (self.thread.is_alive() or pytest.fail(f"ended: {self.outcome}")) and ready())

    def wait_for_agents(self, number: int) -> dict[int, str]:
        """Waits for so many agents, of which the controller knows."""
        self.wait(f"{number} agents", lambda: len(self.agents()) == number)
        polls = len(self.witnessed())
        self.wait("a poll", lambda: f"poll of {number}" in [row["what"] for row in self.witnessed()[polls:]])
        return self.agents()

    def end(self) -> None:
        """Lets the agents return."""
        (self.folder / "over").touch()
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert self.outcome == [None]


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without a CPU, to which nodes are added; `Cluster` starts nodes in the main thread only."""
    folder = tempfile.mkdtemp(prefix="fr-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_USAGE_STATS_REPORT_URL", "http://127.0.0.1:9/")
        patch.setenv("PYTHONPATH", str(ROOT))
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        started = Cluster(initialize_head=True, head_node_args=head)
        try:
            ray.init(address=started.address, log_to_driver=False, logging_level="error")
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(cluster: Cluster) -> list[Any]:
    """Three nodes of one CPU, all free: those that earlier tests have left, and new ones."""
    usable = scaling.usable_nodes()
    for node in list(cluster.worker_nodes):
        if node.node_id not in usable or len(cluster.worker_nodes) > 3:
            cluster.remove_node(node, allow_graceful=False)
    while len(cluster.worker_nodes) < 3:
        _add(cluster)
    ids = {node.node_id for node in cluster.worker_nodes}
    wait_for("free nodes", lambda: sum(scaling.rooms(scaling.usable_nodes(), {"CPU": 1}).values()) == 3)
    wait_for("the end of others", lambda: len(scaling.usable_nodes().keys() - ids) == 1)
    return list(cluster.worker_nodes)


def _add(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Run]]:
    """Starts a run of agents with one CPU each."""
    monkeypatch.setenv(WITNESS, str(tmp_path / "witness"))
    monkeypatch.setenv("RAY_TRAIN_CALLBACKS", f"{__name__}.Witness")
    runs = []

    def start(least: int, most: int) -> Run:
        outcome: list[BaseException | None] = []

        def fit() -> None:
            try:
                scaling.fit(
                    _agent(),
                    {"folder": str(tmp_path)},
                    name="agents",
                    folder=str(tmp_path / "train"),
                    workers=(least, most),
                    resources={"CPU": 1},
                    max_failures=3,
                )
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        run = Run(tmp_path, threading.Thread(target=fit, daemon=True), outcome)
        runs.append(run)
        run.thread.start()
        return run

    yield start
    for run in runs:
        (run.folder / "over").touch()
        run.thread.join(60)


def test_a_killed_agent_is_replaced_on_its_node_and_the_others_live_on(nodes: list[Any], start: Any) -> None:
    run = start(1, 3)
    before = run.wait_for_agents(3)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    run.wait("the victim's end", lambda: victim not in run.agents())
    after = run.wait_for_agents(3)
    assert before.keys() - after.keys() == {victim}
    assert sorted(before.values()) == sorted(after.values())
    run.end()
    assert not any(json.loads(path.read_text())["torch"] for path in run.folder.glob("*.json"))


def test_a_lost_node_is_left_and_a_new_one_taken_in_without_touching_the_others(
    cluster: Cluster, nodes: list[Any], start: Any
) -> None:
    run = start(1, 3)
    before = run.wait_for_agents(3)
    cluster.remove_node(nodes[0], allow_graceful=False)
    left = run.wait_for_agents(2)
    new = _add(cluster)
    grown = run.wait_for_agents(3)
    assert left.items() < before.items()
    assert left.items() < grown.items()
    assert new.node_id in grown.values()
    run.end()


def test_a_draining_node_is_left_before_it_is_gone(nodes: list[Any], start: Any) -> None:
    run = start(1, 3)
    before = run.wait_for_agents(3)
    scaling.drain(nodes[0].node_id, "spot reclaim", 600.0)
    left = run.wait_for_agents(2)
    assert left == {pid: node for pid, node in before.items() if node != nodes[0].node_id}
    run.end()


def test_what_others_hold_is_not_counted(nodes: list[Any], start: Any) -> None:
    """The stock policy counts it, and tries for ever to place a third worker."""
    occupant = ray.remote(num_cpus=1)(_Occupant).remote()
    ray.get(occupant.ready.remote())
    run = start(1, 3)
    run.wait_for_agents(2)
    polls = len(run.witnessed())
    run.wait("more polls", lambda: len(run.witnessed()) > polls + 15)
    assert [row["what"] for row in run.witnessed()].count("resize") == 1
    ray.kill(occupant)
    run.wait_for_agents(3)
    assert [row["what"] for row in run.witnessed()].count("resize") == 2
    run.end()


class _Occupant:
    def ready(self) -> None:
        """Once it is there it holds its CPU."""


def test_the_controller_rests_while_it_waits_for_the_smallest_number(
    cluster: Cluster, nodes: list[Any], start: Any
) -> None:
    """The stock controller turns without a pause, on 0.7 of a core."""
    run = start(4, 4)
    turns = run.wait("turns", lambda: len(seen := run.witnessed()) > 5 and seen)
    times_s = [row["time_s"] for row in turns]
    assert {row["what"] for row in turns} == {"InitializingState"}
    assert min(later - earlier for earlier, later in itertools.pairwise(times_s)) > 0.9 * placement.POLL_S
    assert run.agents() == {}
    _add(cluster)
    run.wait_for_agents(4)
    run.end()


def test_an_agent_that_raises_again_and_again_ends_the_run(nodes: list[Any], tmp_path: Path) -> None:
    def agent(config: dict[str, Any]) -> None:
        raise ValueError("of no use")

    with pytest.raises(ray.train.TrainingFailedError, match="of no use"):
        scaling.fit(
            agent,
            {},
            name="agents",
            folder=str(tmp_path),
            workers=(1, 3),
            resources={"CPU": 1},
            max_failures=1,
        )
    wait_for("what was reserved", lambda: sum(scaling.rooms(scaling.usable_nodes(), {"CPU": 1}).values()) == 3)


_WAITING = """
import sys, ray
from forge_ray.train.nodes import scaling

def agent(config):
    raise AssertionError("there is no room for it")

ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], object_store_memory=80 << 20)
scaling.fit(agent, {}, name="agents", folder=sys.argv[1], workers=(2, 2), resources={"CPU": 1}, max_failures=0)
"""


def test_ctrl_c_ends_a_run_that_waits_for_workers(tmp_path: Path) -> None:
    """The stock controller does not hear it, for its loop never pauses."""
    folder = tempfile.mkdtemp(prefix="fr-", dir="/tmp")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "PYTHONPATH": str(ROOT),
        "RAY_TRAIN_CALLBACKS": f"{__name__}.Witness",
        WITNESS: str(tmp_path / "witness"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    }
    driver = subprocess.Popen(
        [sys.executable, "-c", _WAITING, folder], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        wait_for("the controller", lambda: driver.poll() is not None or (tmp_path / "witness").exists())
        driver.send_signal(signal.SIGINT)
        _, stderr = driver.communicate(timeout=60)
    finally:
        driver.kill()
        shutil.rmtree(folder, ignore_errors=True)
    assert stderr.decode().rstrip().endswith("KeyboardInterrupt"), stderr[-3000:]
