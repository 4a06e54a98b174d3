"""Imports point down: `lint-imports` with the layers that stand in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


def _layer_of(contract: dict[str, list[str]]) -> dict[str, int]:
    """Module name to its layer; rows as `(serve) | (cluster)`."""
    rows = [row.replace("(", "").replace(")", "").replace(":", "|").split("|") for row in contract["layers"]]
    return {name.strip(): depth for depth, row in enumerate(rows) for name in row}


@pytest.fixture
def contracts(repository: Path) -> list[dict[str, list[str]]]:
    path = repository / "pyproject.toml"
    config = tomllib.loads(path.read_text())["tool"].get("importlinter", {}) if path.exists() else {}
    if not config:
        pytest.skip("pyproject.toml configures no import-linter")
    return [contract for contract in config["contracts"] if contract["type"] == "layers"]


def test_imports_point_down(repository: Path, contracts: list[dict[str, list[str]]]) -> None:
    words = ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=repository)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(contracts)} kept, 0 broken" in run.stdout


def test_the_layers_keep_the_order_of_the_architecture(contracts: list[dict[str, list[str]]]) -> None:
    depth = _layer_of(contracts[0])
    down = ["cli", "pipeline", "serve", "train", "data", "runtime", "artifact", "storage", "config", "errors"]
    assert [depth[name] for name in down] == sorted({depth[name] for name in down})
