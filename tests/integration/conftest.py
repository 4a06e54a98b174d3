"""Real parts, started once for the session: a private Ray head, a published tiny model, an endpoint that serves it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import LIMIT_S, wait_for

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.yaml")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts something real."""
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.integration)


@dataclass(frozen=True)
class Finished:
    """What a `forge` command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """Its `--json` object."""
        assert self.stdout, self.stderr
        return json.loads(self.stdout)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_tree(started: subprocess.Popen[Any]) -> None:
    """`kill -9` for a process and all below it, some of which may just be ending by themselves."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(started.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    started.kill()
    started.wait()


class Forge:
    """Runs `forge` as a user does, in a process of its own."""

    def __init__(self, workspace: Path, environment: dict[str, str]) -> None:
        self.workspace, self.environment = workspace, environment

    def command(self, words: Sequence[str]) -> list[str]:
        """The whole command line."""
        return [sys.executable, "-m", "forge_ray.cli", *words, f"--workspace={self.workspace}"]

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Starts it and returns at once."""
        return subprocess.Popen(self.command(words), env=self.environment, cwd=ROOT, text=True, **options)

    def __call__(self, *words: str) -> Finished:
        """Runs it to its end."""
        done = subprocess.run(
            self.command(words),
            env=self.environment,
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def in_copy(self, folder: Path) -> Forge:
        """The same over a copy of the workspace, to be damaged at will."""
        shutil.copytree(self.workspace, folder / "workspace")
        return Forge(folder / "workspace", self.environment)


def clean_environment(cache: Path) -> dict[str, str]:
    """This process's environment without what would point forge or Ray elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FORGE_", "RAY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}


@dataclass(frozen=True)
class Head:
    """A running Ray head: environment for clients, and its dashboard."""

    environment: dict[str, str]
    dashboard: str
    token: str

    def get(self, path: str) -> Any:
        """Asks the dashboard for JSON."""
        request = urllib.request.Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A private head with two CPUs, own ports, own folder and own token."""
    folder = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32))
    token_file.chmod(0o600)
    environment = clean_environment(folder / "cache") | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    started = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--block",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1",
            "--num-cpus=2",
            "--object-store-memory=268435456",
            f"--temp-dir={folder}/ray",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=environment,
        stdout=(folder / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    found = Head(
        environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, f"http://127.0.0.1:{dashboard}", token_file.read_text()
    )
    try:
        wait_for("the Ray head", lambda: _answers(found) or _ended(started, folder / "head.log"))
        yield found
    finally:
        # All of it is ours and holds nothing to keep; Ray's own shutdown takes 20 s.
        kill_tree(started)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(head: Head) -> bool:
    with contextlib.suppress(OSError):
        return bool(head.get("/api/version"))
    return False


def _ended(process: subprocess.Popen[Any], log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-3000:]
    return False


@pytest.fixture(scope="session")
def forge(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """`forge` on the session's head and workspace."""
    return Forge(tmp_path_factory.mktemp("session") / "workspace", head.environment)


@pytest.fixture(scope="session")
def ran(forge: Forge) -> Finished:
    """`forge run` from documents to an answer, once."""
    done = forge("run", str(TINY), "--json", f"--serve.port={free_port()}")
    assert done.code == 0, done.stderr[-4000:]
    return done
