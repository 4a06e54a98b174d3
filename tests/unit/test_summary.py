"""What a person is told to do next can be pasted: the right program, artifact and workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray import summary
from forge_ray.artifact import Artifact, Manifest, Workspace
from forge_ray.pipeline import Outcome


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `forge` in `.venv/bin` of the current directory, called by its path."""
    program = tmp_path / ".venv" / "bin" / "forge"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(program), "run"])
    return program


def test_the_program_is_named_as_it_can_be_called_again(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary.command("show", "export", "./workspace") == ".venv/bin/forge show export"
    monkeypatch.setenv("PATH", str(installed.parent))
    assert summary.command("show", "export", "./workspace") == "forge show export"
    monkeypatch.setattr("sys.argv", ["/somewhere/forge_ray/cli.py"])
    assert summary.command("show", "export", "./workspace") == "forge show export"


def test_a_workspace_is_named_unless_it_is_the_default(installed: Path, tmp_path: Path) -> None:
    assert "--workspace" not in summary.command("show", "export", str(tmp_path / "workspace"))
    assert summary.command("show", "export", "s3://b/w").endswith("show export --workspace=s3://b/w")
    assert summary.command("show", "export", "/a b").endswith("show export '--workspace=/a b'")


def test_next_serves_the_export_and_shows_the_last_artifact(installed: Path, tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path / "elsewhere"))
    manifests = [
        Manifest(stage=stage, fingerprint=digit * 16, files=()) for stage, digit in (("x", "a"), ("export", "b"))
    ]
    outcomes = {m.stage: Outcome(Artifact(workspace, m), skipped=True, wall_s=0.0) for m in manifests}
    text = summary.as_text(outcomes, workspace.uri, ("Ask: ", "answer"))
    where = f"export/{'b' * 16} --workspace={workspace.uri}  "
    assert f"\n  .venv/bin/forge serve {where}" in text
    assert f"\n  .venv/bin/forge show {where}" in text
    assert "  | Ask: answer" in text
    del outcomes["export"]
    assert "forge serve" not in summary.as_text(outcomes, workspace.uri)


@pytest.mark.parametrize(("context", "label"), [(256, "(4-bit)  0.8"), (1024, "(4-bit), 1,024-token windows  0.8")])
def test_a_general_model_that_sees_another_length_says_so(tmp_path: Path, context: int, label: str) -> None:
    metrics = {
        "bits_per_byte": {"model": 0.9, "smollm2": 0.8},
        "skipped": {},
        "heldout_bytes": 1000,
        "heldout_seen_frac": 0.0,
        "context_tokens": 256,
        "smollm2_context_tokens": context,
        "samples": [],
    }
    assert f"SmolLM2-135M-Instruct {label}" in summary._learned(metrics)
