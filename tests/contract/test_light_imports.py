"""What a light command may load: measured in a fresh interpreter, through `sys.modules`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ML = {"ray", "torch", "vllm", "transformers"}
_RUN_AND_TELL = """
import runpy, sys
sys.argv = ["forge", *sys.argv[1:]]
try:
    runpy.run_module("forge_ray.cli", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("\\nLOADED", *{name.partition(".")[0] for name in sys.modules})
"""


def _loaded(code: str, *words: str, cwd: Path) -> set[str]:
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, cwd=cwd)
    assert run.returncode == 0, run.stderr
    marker, *names = run.stdout.splitlines()[-1].split()
    assert marker == "LOADED"
    assert "forge_ray" in names
    return set(names)


def test_help_loads_next_to_nothing(repository: Path) -> None:
    heavy = ML | {"pydantic", "pydantic_settings", "yaml", "numpy", "pyarrow", "fsspec", "rich"}
    assert _loaded(_RUN_AND_TELL, "--help", cwd=repository) & heavy == set()


def test_help_can_be_run_as_a_module(repository: Path) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "forge_ray.cli", "--help"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=repository)
    assert run.returncode == 0
    assert run.stdout.startswith("usage: forge ")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "forge_ray" in imported
    assert imported & (ML | {"pydantic", "yaml", "numpy"}) == set()


LIGHT = ["config", "settings", "errors", "artifact", "storage", "telemetry", "pipeline", "doctor", "summary"]
LIGHT += ["plan_verbs", "plan.planner", "plan.fit", "model.arithmetic"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_no_framework(repository: Path, module: str) -> None:
    code = f"import sys, forge_ray.{module}\nprint('LOADED', *{{name.partition('.')[0] for name in sys.modules}})"
    assert _loaded(code, cwd=repository) & ML == set()


@pytest.mark.parametrize("verb", ["run", "pretrain", "serve"])
def test_a_dry_run_of_the_demo_loads_no_framework(repository: Path, verb: str) -> None:
    assert _loaded(_RUN_AND_TELL, verb, "jobs/demo.yaml", "--dry-run", cwd=repository) & ML == set()


def test_a_plan_loads_no_framework(repository: Path) -> None:
    words = ("plan", "--plan.usd", "500", "--plan.corpus_bytes", "8e9")
    assert _loaded(_RUN_AND_TELL, *words, cwd=repository) & ML == set()
