"""Running, marking, skipping and publishing stages, with a small stage in place of the real ones and no Ray."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import pytest

from forge_ray import pipeline, runtime
from forge_ray.artifact import Artifact, Workspace
from forge_ray.config import ForgeConfig
from forge_ray.errors import DataError


class _Small:
    """A stage that stores the configured share as text, and notes what it was given."""

    def __init__(self) -> None:
        self.markers: list[str] = []
        self.frozen: list[Any] = []
        self.fails = False

    def run(self, config: ForgeConfig, workspace: Workspace, planned: pipeline.Planned) -> tuple[list[Any], Any]:
        self.markers.append(workspace.storage.read_bytes(f"runs/{planned.fingerprint}/active").decode())
        self.frozen.append(dict(planned.frozen))
        if self.fails:
            raise DataError("no documents")
        return [workspace.put_bytes("out", str(config.ingest.held_out_frac).encode())], {}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> _Small:
    small = _Small()
    stage = pipeline.Stage(
        "ingest",
        "small",
        (),
        config=lambda c: c.ingest.fingerprinted(),
        call=lambda m, c, i, w, p: small.run(c, w, p),
        observe=lambda m, c, w: {"seen": 1},
    )
    monkeypatch.setattr(pipeline, "STAGES", (stage,))
    monkeypatch.setattr(pipeline.Stage, "load", lambda self: types.SimpleNamespace(FORMAT_VERSION=1))
    monkeypatch.setattr(runtime, "cluster", lambda config: contextlib.nullcontext())
    return small


def job(workspace: Path, held_out_frac: float = 0.1) -> ForgeConfig:
    ingest = {"sources": [{"kind": "botocore"}], "held_out_frac": held_out_frac}
    return ForgeConfig.model_validate({"workspace": str(workspace), "ingest": ingest})


def ingested(config: ForgeConfig) -> Artifact:
    return pipeline.run(config, "ingest")["ingest"].artifact


def test_a_stage_is_marked_while_it_runs_and_not_after(small: _Small, tmp_path: Path) -> None:
    made = ingested(job(tmp_path))
    assert '"stage": "ingest"' in small.markers[0]
    assert not (tmp_path / "runs" / made.manifest.fingerprint / "active").exists()
    small.fails = True
    with pytest.raises(DataError):
        ingested(job(tmp_path, 0.2))
    assert not [path for path in tmp_path.rglob("active")]


def test_a_second_run_touches_no_file(small: _Small, tmp_path: Path) -> None:
    ingested(job(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ingested(job(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(small.markers) == 1


def test_a_skipped_stage_is_the_latest_again(small: _Small, tmp_path: Path) -> None:
    first, second = ingested(job(tmp_path)), ingested(job(tmp_path, 0.2))
    assert Workspace(str(tmp_path)).resolve("ingest").ref == second.ref
    assert ingested(job(tmp_path)).ref == first.ref
    assert Workspace(str(tmp_path)).resolve("ingest").ref == first.ref


def test_ingest_is_given_what_was_observed_when_it_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def run(config: Any, workspace: Workspace, frozen: Any) -> tuple[list[Any], dict[str, Any]]:
        given.update(frozen)
        return [], {}

    ingest = pipeline.STAGES[0].load()
    monkeypatch.setattr(ingest, "run", run)
    monkeypatch.setattr(runtime, "cluster", lambda config: contextlib.nullcontext())
    made = ingested(job(tmp_path))
    assert given == made.manifest.frozen
    assert given["files"] > 400
