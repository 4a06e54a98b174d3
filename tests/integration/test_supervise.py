"""`--supervise` over real training: the driver killed, Ray's head lost. Nobody but the supervisor helps."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from forge_ray.events import Events
from forge_ray.storage import Storage
from tests.integration.conftest import ROOT, TINY, Forge, clean_environment, free_port, kill_tree
from tests.waiting import wait_for

STEPS = 200
LONG = (f"--pretrain.steps={STEPS}", "--pretrain.checkpoint_every_s=0.5", "--ray.dashboard=false")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """A workspace that holds everything before pretraining."""
    folder = tmp_path_factory.mktemp("supervise")
    forge = Forge(folder / "workspace", clean_environment(folder / "cache"))
    done = forge("tokenize", str(TINY))
    assert done.code == 0, done.stderr[-3000:]
    return forge


class Run:
    """A supervised `forge pretrain` under way."""

    def __init__(self, forge: Forge, folder: Path) -> None:
        self.forge, self.told = forge, folder / "stderr"
        self.process = forge.start(
            "pretrain",
            str(TINY),
            "--json",
            "--supervise",
            *LONG,
            stdout=subprocess.PIPE,
            stderr=self.told.open("w"),
            start_new_session=True,
        )

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self.told.read_text()

    def driver(self) -> psutil.Process:
        """The child that trains now."""
        return psutil.Process(self.process.pid).children()[0]

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints in the store."""
        names = self.forge.workspace.glob("runs/*/checkpoints/*.json")
        return sorted(int(path.stem) for path in names)

    def finish(self) -> str:
        """Waits for the end; gives the published artifact's reference."""
        out, _ = self.process.communicate(timeout=400)
        assert self.process.returncode == 0, self.stderr[-3000:]
        return json.loads(out)["stages"]["pretrain"]["ref"]


@contextlib.contextmanager
def supervised(forge: Forge, folder: Path) -> Iterator[Run]:
    """A run that has trained for a while; whatever is left of it at the end is killed."""
    run = Run(forge, folder)
    try:
        wait_for("a checkpoint", lambda: run.checkpoints() or _not_ended(run))
        yield run
    finally:
        kill_tree(run.process)


def _not_ended(run: Run) -> bool:
    assert run.process.poll() is None, run.stderr[-3000:]
    return False


def _trained_steps(forge: Forge, ref: str) -> set[int]:
    events = Events.read(Storage(str(forge.workspace)), ref.partition("/")[2])
    return {event["step"] for event in events if event["event"] == "step"}


def test_a_killed_driver_is_started_again_and_the_run_comes_to_its_end(shards: Forge, tmp_path: Path) -> None:
    forge = shards.in_copy(tmp_path)
    with supervised(forge, tmp_path) as run:
        first = run.driver()
        first.kill()
        wait_for("another driver", lambda: run.process.poll() is not None or _successor(run, first))
        ref = run.finish()
    assert run.stderr.count("was ended by signal 9") == 1
    assert _trained_steps(forge, ref) == set(range(1, STEPS + 1))


def _successor(run: Run, first: psutil.Process) -> bool:
    return any(child.pid != first.pid for child in psutil.Process(run.process.pid).children())


def test_a_lost_head_is_waited_for(shards: Forge, tmp_path: Path) -> None:
    port, token = free_port(), tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = shards.environment | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        # A driver waits a minute for its head by default.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }
    forge = shards.in_copy(tmp_path)
    with _head(port, environment, tmp_path / "head1"):
        run_of = contextlib.ExitStack()
        run = run_of.enter_context(supervised(Forge(forge.workspace, environment), tmp_path))
    with run_of:
        wait_for("the driver's end", lambda: "it starts again" in run.stderr or _not_ended(run))
        with _head(port, environment, tmp_path / "head2"):
            ref = run.finish()
    assert _trained_steps(forge, ref) == set(range(1, STEPS + 1))


@contextlib.contextmanager
def _head(port: int, environment: dict[str, str], log: Path) -> Iterator[None]:
    """A Ray head on this port, which ends without a farewell."""
    words = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"),
        *("--include-dashboard=false", "--num-cpus=2", "--object-store-memory=100000000"),
        *(f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
    ]
    head = subprocess.Popen(
        words, env=environment, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        wait_for("Ray's head", lambda: _answers(port))
        yield
    finally:
        kill_tree(head)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
