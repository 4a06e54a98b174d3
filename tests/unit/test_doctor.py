"""What `forge doctor` finds on a machine that has something to mend."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_ray import cli, doctor
from forge_ray.config import ForgeConfig
from forge_ray.doctor import Check


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def _imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading torch and vLLM takes 10 s; what doctor says of a load is tested with smaller modules."""
    monkeypatch.setattr(doctor, "_IMPORTS", "import json")


def _examine(workspace: Path, **serve: Any) -> dict[str, Check]:
    config = ForgeConfig.model_validate({"workspace": str(workspace), "serve": serve})
    return {check.name: check for check in doctor.examine(config)}


def test_a_busy_port_is_found_and_named_and_is_free_again_afterwards(tmp_path: Path, busy_port: int) -> None:
    check = _examine(tmp_path, port=busy_port)["endpoint"]
    assert not check.ok
    assert f"127.0.0.1:{busy_port}" in check.found
    assert "--serve.port" in check.do


def test_a_free_port_is_not_held_by_the_examination(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert _examine(tmp_path, port=port)["endpoint"].ok
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("why", ["below a file", "read-only", "unknown scheme"])
def test_a_workspace_that_cannot_be_written_is_named(tmp_path: Path, why: str) -> None:
    place = tmp_path / "file" / "workspace"
    if why == "read-only":
        tmp_path.chmod(0o500)
        if os.access(tmp_path, os.W_OK):
            pytest.skip("root may write anywhere")
    elif why == "below a file":
        (tmp_path / "file").write_bytes(b"")
    uri = "nosuchscheme://bucket" if why == "unknown scheme" else str(place)
    config = ForgeConfig.model_validate({"workspace": uri})
    check = next(check for check in doctor.examine(config) if check.name == "workspace")
    assert not check.ok
    assert uri in check.found
    assert check.do


def test_a_good_workspace_is_left_as_it_was(tmp_path: Path) -> None:
    check = _examine(tmp_path / "workspace")["workspace"]
    assert str(tmp_path / "workspace") in check.found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "workspace").mkdir()
    assert str(tmp_path / "workspace") in _examine(tmp_path / "workspace")["workspace"].found
    assert list((tmp_path / "workspace").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "told"),
    [("import json", "torch and vllm load in"), ("import no_such_module", "No module named 'no_such_module'")],
)
def test_an_installation_that_does_not_load_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    monkeypatch.setattr(doctor, "_IMPORTS", code)
    check = _examine(tmp_path)["imports"]
    assert (check.ok, told in check.found) == ("no_such" not in code, True)
    assert code in check.do or check.ok


def test_an_installation_that_hangs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_IMPORTS", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_IMPORTS_S", 0.1)
    assert "not loaded after 0.1 s" in _examine(tmp_path)["imports"].found


def test_each_source_is_listed(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A document.")
    sources = [{"kind": "files", "uri": str(tmp_path)}, {"kind": "files", "uri": str(tmp_path / "none")}]
    config = ForgeConfig.model_validate({"workspace": str(tmp_path), "ingest": {"sources": sources}})
    found = {check.name: check for check in doctor.examine(config)}
    assert found["source 0"].ok
    assert found["source 0"].found == f"{tmp_path}: 1 files, 11 B"
    assert not found["source 1"].ok
    assert str(tmp_path / "none") in found["source 1"].found


@pytest.mark.parametrize("how", ["ray.address", "RAY_ADDRESS"])
def test_a_named_cluster_is_called(tmp_path: Path, busy_port: int, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    for address, ok in ((f"127.0.0.1:{busy_port}", True), ("ray://127.0.0.1:1", False)):
        monkeypatch.setenv("RAY_ADDRESS", address if how == "RAY_ADDRESS" else "127.0.0.1:2")
        ray = {"address": address} if how == "ray.address" else {}
        config = ForgeConfig.model_validate({"workspace": str(tmp_path), "ray": ray})
        check = next(check for check in doctor.examine(config) if check.name == "ray cluster")
        assert (check.ok, address.removeprefix("ray://") in check.found) == (ok, True)


def test_a_private_cluster_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    config = ForgeConfig.model_validate({"workspace": str(tmp_path), "ray": {"address": "local"}})
    assert "ray cluster" not in {check.name for check in doctor.examine(config)}


@pytest.mark.parametrize(("version", "ok"), [((3, 10, 9), False), ((3, 13, 1), True), ((3, 14, 0), False)])
def test_the_range_of_pythons(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], ok: bool) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", version)
    assert doctor._python().ok == ok


def test_whatever_is_to_be_mended_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    checks = _examine(tmp_path)
    missing = {name for name, check in checks.items() if not check.ok and check.found == "not installed"}
    assert missing == {"ray", "torch", "transformers", "vllm", "s3://", "gs://", "abfs://"}
    assert [name for name in missing if not checks[name].do] == []


def test_the_command_fails_as_long_as_something_is_to_be_mended(
    tmp_path: Path, busy_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", f"--workspace={tmp_path}", f"--serve.port={busy_port}"]
    assert cli.main(words) == 1
    assert f"MEND  endpoint     127.0.0.1:{busy_port}" in capsys.readouterr().out
    cli.main([*words, "--json"])
    rows = {row["name"]: row["ok"] for row in json.loads(capsys.readouterr().out)}
    assert (rows["endpoint"], rows["python"]) == (False, True)
