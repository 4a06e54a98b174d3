"""A tiny corpus with structure to learn, and workers on it, all in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from forge_ray.artifact import Artifact, Manifest, Workspace
from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.data import shards
from forge_ray.train import pretrain
from forge_ray.train.loop import Worker

VOCAB, END = 64, 0
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
    """Two shards of documents in which each token mostly decides the next."""
    draw = np.random.default_rng(0)
    follower = draw.permutation(np.arange(1, VOCAB))
    files, index = [], []
    for i, documents in enumerate((40, 25)):
        pieces = []
        for _ in range(documents):
            ids = [int(draw.integers(1, VOCAB))]
            while len(ids) < 60:
                ids.append(int(follower[ids[-1] - 1]) if draw.random() < 0.9 else int(draw.integers(1, VOCAB)))
            pieces += [*ids, END]
        table = pa.table({"id": ["x"], "offset": [0], "length": [len(pieces)], "source": ["x"], "licence": ["x"]})
        with workspace.new_file(f"train-{i:05d}.tok") as build:
            shards.write(build.stream, np.array(pieces, dtype=np.uint16), table, vocab_size=VOCAB, end_token=END)
        files.append(build.entry)
        size_bytes = build.entry.size_bytes
        index.append(shards.ShardInfo(build.entry.name, build.entry.sha256, size_bytes, len(pieces), 1, "made"))
    content = shards.ShardIndex(tuple(index), VOCAB, END).to_json()
    files.append(workspace.put_bytes(shards.INDEX, content))
    return workspace.publish(Manifest(stage="tokenize", fingerprint="0" * 16, files=tuple(files)))


@pytest.fixture
def spec(corpus: Artifact) -> Callable[..., pretrain.RunSpec]:
    """What a run of some configuration is told."""

    def make(run_id: str = "run", model: dict[str, Any] | None = None, **config: Any) -> pretrain.RunSpec:
        shape = ModelConfig(**{"num_layers": 2, "d_model": 32, "num_heads": 1, "d_ff": 48, **(model or {})})
        settings = {"steps": 12, "slots": 8, "micro_batch": 1, "seq_len": 32, "optimizer": ADAMW, **config}
        precision = settings.get("precision", "fp32")
        return pretrain.RunSpec(run_id, corpus.workspace, corpus.ref, shape, PretrainConfig(**settings), precision)

    return make


@pytest.fixture
def build(spec: Callable[..., pretrain.RunSpec]) -> Callable[..., Worker]:
    """A worker as every Ray Train worker builds it: from the newest checkpoint of its run, or from the seed."""

    def make(rank: int = 0, world_size: int = 1, **options: Any) -> Worker:
        return pretrain._build(spec(**options), rank, world_size, torch.device("cpu"))

    return make
