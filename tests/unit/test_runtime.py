"""What runtime does without Ray: the folder of a private cluster and the token that guards it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forge_ray import runtime
from forge_ray.errors import ConfigError, StorageError

# Holds a folder as a process of another container does, says so, and waits.
_HOLDS = """
import sys
from forge_ray.runtime import _own_folder
with _own_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that it is restored, whoever sets it
        monkeypatch.delenv(name)
    path = tmp_path / "home" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


def test_the_folder_of_a_living_owner_stays_and_that_of_a_killed_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.setattr(runtime, "_FOLDER_PREFIX", prefix := f"forge-test-{os.getpid()}-")
    code = _HOLDS.replace("with _own", f"import forge_ray.runtime as r; r._FOLDER_PREFIX = {prefix!r}\nwith _own")
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": "/tmp"},
    ) as other:
        theirs = Path(other.stdout.readline().strip())
        try:
            with runtime._own_folder() as ours:
                assert (theirs.exists(), ours.exists(), theirs != ours) == (True, True, True)
            assert not ours.exists()
        finally:
            other.send_signal(signal.SIGKILL)
    assert theirs.exists()
    with runtime._own_folder():
        assert not theirs.exists()


def test_a_folder_without_a_lock_is_not_ours_to_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.setattr(runtime, "_FOLDER_PREFIX", f"forge-test-{os.getpid()}-")
    foreign = Path(f"/tmp/forge-test-{os.getpid()}-x")
    foreign.mkdir()
    try:
        with runtime._own_folder():
            assert foreign.exists()
    finally:
        foreign.rmdir()


def test_a_new_token_is_for_its_owner_alone_and_stays(token: Path) -> None:
    runtime._require_token()
    first = token.read_text()
    assert (token.stat().st_mode & 0o777, len(first), os.environ["RAY_AUTH_MODE"]) == (0o600, 64, "token")
    del os.environ["RAY_AUTH_MODE"]
    runtime._require_token()
    assert token.read_text() == first


def test_a_token_that_others_can_read_is_tightened(token: Path) -> None:
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    runtime._require_token()
    assert (token.stat().st_mode & 0o777, token.read_text()) == (0o600, "secret")


@pytest.mark.parametrize(("mode", "refused"), [(0o644, True), (0o440, False)])
def test_a_token_whose_mode_is_fixed_is_refused_if_everybody_can_read_it(
    token: Path, monkeypatch: pytest.MonkeyPatch, mode: int, refused: bool
) -> None:
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(mode)

    def fixed(*args: object, **kwargs: object) -> None:
        raise PermissionError("a mounted secret")

    monkeypatch.setattr(Path, "chmod", fixed)
    if not refused:
        runtime._require_token()
        return
    with pytest.raises(ConfigError, match="token") as caught:
        runtime._require_token()
    assert str(token) in caught.value.got
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_home_that_cannot_be_written_says_what_to_set(token: Path) -> None:
    token.parent.write_text("a file in the way")
    with pytest.raises(ConfigError) as caught:
        runtime._require_token()
    assert "RAY_AUTH_TOKEN_PATH" in caught.value.do
    assert str(token) in caught.value.got


def test_a_dashboard_port_that_is_taken_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with runtime._claimed_port(port) as one, runtime._claimed_port(port) as other:
            assert len({port, one, other}) == 3
            assert port < min(one, other) <= max(one, other) < port + 100


def test_an_error_that_passed_through_several_processes_comes_out_as_itself() -> None:
    from ray.exceptions import RayTaskError

    error: Exception = StorageError("the store is gone", got="s3://b/x")
    for task in ("inner", "outer"):
        error = RayTaskError(task, "a traceback", error).as_instanceof_cause()
        with pytest.raises(StorageError) as caught, runtime.unwrapped():
            raise error
        assert type(caught.value) is StorageError
        assert caught.value.got == "s3://b/x"


def test_an_error_of_ours_that_another_caused_is_raised_as_it_is() -> None:
    with pytest.raises(ConfigError, match="outer"), runtime.unwrapped():
        raise ConfigError("outer") from StorageError("inner")


def test_an_error_of_somebody_else_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="theirs"), runtime.unwrapped():
        raise ValueError("theirs") from KeyError("x")
