"""A tiny corpus with structure to learn, and workers on it, all in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from forge_ray.artifact import Artifact, Workspace
from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.train import compute, fitting
from forge_ray.train.guardian import Verdict
from forge_ray.train.loop import Alone, Worker
from forge_ray.train.record import Record
from forge_ray.train.spec import RunSpec
from tests.unit.train.tiny_corpus import VOCAB, publish

ADAMW = {"kind": "adamw", "learning_rate": 4e-3}
MUON = {"kind": "muon", "learning_rate": 8e-3}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The number of threads changes bits."""
    torch.set_num_threads(1)


@pytest.fixture
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(str(tmp_path_factory.mktemp("workspace")))


@pytest.fixture
def corpus(workspace: Workspace) -> Artifact:
    """See `tiny_corpus`."""
    return publish(workspace)


@pytest.fixture
def spec(corpus: Artifact) -> Callable[..., RunSpec]:
    """What a run of some configuration is told."""

    def make(run_id: str = "run", model: dict[str, Any] | None = None, **config: Any) -> RunSpec:
        shape = ModelConfig(**{"num_layers": 2, "d_model": 32, "num_heads": 1, "d_ff": 48, **(model or {})})
        settings = {"steps": 12, "slots": 8, "micro_batch": 1, "seq_len": 32, "optimizer": ADAMW, **config}
        precision = settings.get("precision", "fp32")
        return RunSpec(run_id, corpus.workspace, corpus.ref, shape, PretrainConfig(**settings), VOCAB, precision, False)

    return make


class Silent:
    """A coordinator's side of which a worker hears nothing."""

    host_class = "this"

    def event(self, record: dict[str, Any]) -> None:
        """Not wanted."""


class Recorded(Alone):
    """A worker's team of itself, with the record and the checkpoints of a run."""

    trusted_step, stands = -1, True

    def __init__(self, told: RunSpec, worker: Worker) -> None:
        super().__init__()
        self.record = Record(told, worker, Silent())
        self.record.team = self

    def go_back(self, worker: Worker, verdict: Verdict) -> None:
        """As in a team of many, without the others."""
        judged = worker.guardian.state()
        self.record.resume(worker, verdict)
        earlier = worker.guardian.state()
        worker.guardian.load(judged)
        worker.guardian.roll_back(verdict, worker.step, earlier)
        self.record.distrust(worker.step)


@pytest.fixture
def build(spec: Callable[..., RunSpec]) -> Callable[..., Worker]:
    """A worker with the state of the newest checkpoint of its run, or of a new run."""

    def make(**options: Any) -> Worker:
        told = spec(**options)
        worker = compute.build(told, next(fitting.ways(told.config)), torch.device("cpu"))
        worker.team = Recorded(told, worker)
        worker.team.record.resume(worker, None)
        return worker

    return make
