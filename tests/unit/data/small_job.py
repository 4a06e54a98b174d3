"""A job over a few files, from sources to token shards in this process: what the ledger's verbs are asked about."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import random
import shutil
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from forge_ray import pipeline, runtime
from forge_ray.artifact import Artifact, Workspace
from forge_ray.config import ForgeConfig
from forge_ray.data import curate, ingest, shards, tokenizer  # noqa: F401  (their `map_rows` is replaced)
from forge_ray.data.curation import dedup  # noqa: F401  (their `map_rows` is replaced)
from forge_ray.data.shards import Shard

MAIL = "jane.roe@corp-mail.com"
WORDS = (
    "the",
    "order",
    "of",
    "a",
    "ship",
    "and",
    "that",
    "to",
    "be",
    "with",
    "have",
    "river",
    "stone",
    "light",
    "under",
)


class Job:
    """Files, a YAML and a workspace."""

    def __init__(self, folder: Path) -> None:
        self.docs, self.yaml, self.workspace = folder / "docs", folder / "job.yaml", Workspace(str(folder / "ws"))
        self.docs.mkdir()
        self._write_all()
        self.settings: dict[str, Any] = {
            "workspace": self.workspace.uri,
            "ingest": {
                "sources": [{"kind": "files", "uri": str(self.docs), "name": "docs", "licence": "CC-BY-4.0"}],
                "held_out_frac": 0.1,
            },
            "curate": {"exact": {"enabled": True}, "privacy": {"enabled": True}},
            "tokenizer": {"vocab_size": 300, "sample_bytes": 100_000},
            "tokenize": {"shard_tokens": 2000},
        }
        self.save()

    def copied(self, folder: Path) -> Job:
        """The same job and the same files over a copy of its workspace, which may be changed at will."""
        other = copy.copy(self)
        other.yaml, other.workspace = folder / "job.yaml", Workspace(str(folder / "ws"))
        shutil.copytree(self.workspace.uri, other.workspace.uri)
        other.settings = json.loads(json.dumps(self.settings)) | {"workspace": other.workspace.uri}
        other.save()
        return other

    def _write_all(self) -> None:
        draw = random.Random(7)
        for i in range(40):
            self.write(f"guide/{i:02d}.txt", text(draw, i))
        self.write("guide/copy.txt", (self.docs / "guide/05.txt").read_text())  # after guide/05.txt, so dropped
        self.write("zz-mail.txt", f"Please write to {MAIL} about it. {text(draw, 90)}")
        self.write("short.txt", "short")
        rows = [{"text": text(draw, 100 + i), "licence": "MIT"} for i in range(4)]
        self.write("posts.jsonl", "\n".join(json.dumps(row) for row in rows))
        with tarfile.open(self.docs / "old.tar.gz", "w:gz") as archive:
            for i in range(3):
                data = text(draw, 200 + i).encode()
                info = tarfile.TarInfo(f"inner/{i}.md")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        with gzip.open(self.docs / "note.txt.gz", "wb") as packed:
            packed.write(text(draw, 300).encode())

    def write(self, name: str, content: str) -> None:
        """A file of the source."""
        path = self.docs / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    def save(self) -> None:
        """Writes the YAML."""
        self.yaml.write_text(yaml.safe_dump(self.settings))

    @property
    def config(self) -> ForgeConfig:
        """Its configuration."""
        return ForgeConfig(**self.settings)

    def run(self) -> dict[str, Artifact]:
        """Everything up to token shards."""
        return {name: outcome.artifact for name, outcome in pipeline.run(self.config, "tokenize").items()}

    def text_of(self, key: str) -> str:
        """What a document says, as ingest read it."""
        build = self.workspace.resolve("ingest")
        for name in build.names(".parquet"):
            if name.startswith(("train-", "heldout-")):
                for row in pq.read_table(build.local_path(name)).to_pylist():
                    if row["key"] == key:
                        return str(row["text"])
        raise AssertionError(key)


def text(draw: random.Random, number: int) -> str:
    """A document that shares no long run of words with another."""
    return f"Number {number}. " + " ".join(draw.choices(WORDS, k=120)) + f" {draw.getrandbits(64):x}"


def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's tasks run here, in order: `ray.remote(f).remote(x)` is `f(x)`, and `map_rows` is a loop with its memory."""
    fake = types.ModuleType("ray")
    parts = {
        "get": lambda found: found,
        "remote": lambda **_: lambda call: types.SimpleNamespace(remote=call),
        "exceptions": types.SimpleNamespace(RayTaskError=RuntimeError, RayError=RuntimeError),
    }
    vars(fake).update(parts)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(runtime, "cluster", lambda config: contextlib.nullcontext())
    for name, module in list(sys.modules.items()):
        if name.startswith("forge_ray.data.") and getattr(module, "map_rows", None) is runtime.map_rows:
            monkeypatch.setattr(module, "map_rows", map_rows_here)


def map_rows_here(
    name: str, task: Callable[[dict[str, Any]], Any], rows: Any, memo: Any = None
) -> list[dict[str, Any]]:
    """`runtime.map_rows` in this process: a loop with its memory."""
    results: list[dict[str, Any]] = []
    for row in rows:
        found = memo.get(row) if memo else None
        if found is None:
            found = task(row)
            if memo:
                memo.put(row, found)
        results += found
    return results


def holders(workspace: Workspace, said: str) -> list[str]:
    """Files of the workspace that hold this text: raw, in any Parquet column, or as tokens of any of its vocabularies.

    Tokens are compared without a document's first and last words, whose tokens depend on their neighbours.
    """
    needles = [_ids(artifact, said) for artifact in _vocabularies(workspace)]
    found = []
    for path in sorted(Path(workspace.uri).rglob("*")):
        if path.is_file() and (said.encode() in path.read_bytes() or any(_holds(path, said, ids) for ids in needles)):
            found.append(path.relative_to(workspace.uri).as_posix())
    return found


def _vocabularies(workspace: Workspace) -> Iterator[Artifact]:
    for ref in workspace.refs_of_artifacts():
        if ref.startswith("tokenizer/"):
            yield workspace.get(ref)


def _ids(artifact: Artifact, said: str) -> list[int]:
    middle = said[said.index(" ", 20) : said.rindex(" ", 0, -20)]
    return list(tokenizer.load(artifact).encode(middle, add_special_tokens=False).ids)


def _holds(path: Path, said: str, ids: list[int]) -> bool:
    with path.open("rb") as stream:
        magic = stream.read(8)
    if magic.startswith(b"PAR1"):
        table = pq.read_table(path)
        return any(said in str(value) for name in table.column_names for value in table[name].to_pylist())
    if magic == shards.MAGIC:
        tokens = Shard(path).tokens
        return tokens.tobytes().find(np.array(ids, dtype=tokens.dtype).tobytes()) >= 0
    return False
