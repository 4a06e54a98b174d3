"""A tiny corpus of token shards with structure to learn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from forge_ray.artifact import Artifact, Manifest, Workspace
from forge_ray.data import shards

VOCAB, END = 64, 0


def publish(workspace: Workspace) -> Artifact:
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
    inputs = {"tokenizer": "1" * 16}
    return workspace.publish(Manifest(stage="tokenize", fingerprint="0" * 16, files=tuple(files), inputs=inputs))
