"""What a person is told to do next can be pasted: the right program, artifact and workspace."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.fixture
def foretold(tmp_path: Path) -> Callable[..., dict[str, Outcome]]:
    """A finished run of which something was expected."""

    def make(price: float = 0.0, planned: bool = True) -> dict[str, Outcome]:
        workspace = Workspace(str(tmp_path / f"{price}{planned}"))
        metrics = {
            "pretrain": {
                "tokens": 36_000_000,
                "tokens_per_s": 10_000.0,
                "peak_bytes": 1_100_000_000,
                "parameters": 1,
                "epochs": 1.0,
                "precision": "fp32",
                "vocab_size": 1,
                "ledger": {"wall_s": 4500.0, "node_hours": 2.5},
            },
            "tokenizer": {"heldout_bytes_per_token": 4.0},
            "evaluate": {
                "bits_per_byte": {"model": 1.05},
                "skipped": {},
                "heldout_bytes": 1,
                "context_tokens": 1,
                "heldout_seen_frac": 0.0,
                "samples": [],
            },
        }
        config = {"pretrain": {"usd_per_node_hour": price}}
        manifests = [Manifest(stage, "a" * 16, (), config=config, metrics=found) for stage, found in metrics.items()]
        expected = {"bits_per_byte": {"median": 1.0, "low": 0.9, "high": 1.1}, "hours": 0.8, "peak_bytes": 1e9}
        fitted = Manifest("plan", "b" * 16, (), metrics={"prediction": expected, "nodes": 2.0})
        workspace.publish(fitted)
        if planned:
            workspace.set_ref(f"planned/{'a' * 16}", fitted.ref)
        return {m.stage: Outcome(Artifact(workspace, m), skipped=False, wall_s=0.0) for m in manifests}

    return make


def test_what_was_expected_stands_beside_what_came(foretold: Callable[..., dict[str, Outcome]]) -> None:
    outcomes = foretold(price=3.0)
    row = summary.as_json(outcomes)["planned"]
    assert row["ref"] == f"plan/{'b' * 16}"
    assert row["bits_per_byte"]["off_frac"] == pytest.approx(0.05)
    assert (row["steps_s"]["expected"], row["steps_s"]["came"], row["steps_s"]["clock"]) == (2880, 3600, 4500)
    assert row["peak_bytes"]["off_frac"] == pytest.approx(0.1)
    assert row["usd"] == pytest.approx({"expected": 4.8, "came": 6.0, "off_frac": 0.25, "clock": 7.5})
    text = summary.as_text(outcomes, "here")
    assert "  bits per byte  1.000 (0.900 to 1.100)  1.050  +5.0%\n" in text
    assert "+25.0%  (steps times the median step; by the clock 1 h 15 min)" in text
    assert "  money          $4.80  $6.00  +25.0%  (of that time, at $3 a node-hour; by the clock $7.50)" in text


def test_without_a_price_no_money_and_without_a_prediction_nothing_is_told(
    foretold: Callable[..., dict[str, Outcome]],
) -> None:
    assert "usd" not in summary.as_json(foretold())["planned"]
    assert "  money" not in summary.as_text(foretold(), "here")
    assert "planned" not in summary.as_json(foretold(planned=False))
    assert "Expected on" not in summary.as_text(foretold(planned=False), "here")
