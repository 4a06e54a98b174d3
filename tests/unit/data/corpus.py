"""A corpus of counted tokens in small shards, published without the stages before, and stores that misbehave."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from forge_ray.artifact import Artifact, Manifest, Workspace
from forge_ray.data import shards
from forge_ray.data.shards import ShardIndex, ShardInfo
from forge_ray.storage import Listed, Storage

VOCAB = 1 << 20
Before = Callable[[str, Path], bool | None]


def publish(workspace: Workspace, sizes: list[int], origins: str = "") -> Artifact:
    """Shards of so many tokens, which count on from one to the next, so that a token tells where it stands."""
    rows, base = [], 0
    for i, (size, origin) in enumerate(zip(sizes, origins or "a" * len(sizes), strict=True)):
        table = pa.table({"id": ["x"], "offset": [0], "length": [size], "key": ["x"], "licence": ["x"]})
        with workspace.new_file(f"train-{i:05d}.tok") as build:
            tokens = np.arange(base, base + size, dtype=np.uint32)
            shards.write(build.stream, tokens, table, vocab_size=VOCAB, end_token=0)
        entry = build.entry
        rows.append(ShardInfo(entry.name, entry.sha256, entry.size_bytes, size, 1, origin))
        base += size
    index = ShardIndex(tuple(rows), VOCAB, 0)
    files = (*(row.entry for row in rows), workspace.put_bytes(shards.INDEX, index.to_json()))
    return workspace.publish(Manifest(stage="tokenize", fingerprint="0" * 16, files=files))


class RemoteFolder(Storage):
    """A folder that is read as an object store is, from any process: nothing in it may be mapped where it lies.

    Args:
        folder: Where it is.
        log: Each fetch becomes a line of this file, so that those of all processes are counted.
        before: Called first, with the name and the target; may raise, or write something else there and return True.
    """

    def __init__(self, folder: Path, log: Path, before: Before = lambda name, target: None) -> None:
        self._inner, self._log, self._before = Storage(str(folder)), log, before
        self.local, self.uri = None, f"remote:/{folder}"

    def read_bytes(self, name: str) -> bytes:
        """The whole content."""
        return self._inner.read_bytes(name)

    def listing(self, prefix: str) -> list[Listed]:
        """What lies below a folder."""
        return self._inner.listing(prefix)

    def fetch(self, name: str, target: Path) -> None:
        """Copies the content to a local file, and says so."""
        with self._log.open("a") as sink:
            sink.write(f"{name.rpartition('/')[2]}\n")
        if not self._before(name, target):
            self._inner.fetch(name, target)

    def local_path(self, name: str) -> Path | None:
        """None: it is remote."""
        return None


def remote(corpus: Artifact, log: Path, before: Before = lambda name, target: None) -> Artifact:
    """The same artifact, read from afar."""
    workspace = Workspace(corpus.workspace.uri)
    workspace.storage = RemoteFolder(Path(corpus.workspace.uri), log, before)
    return workspace.get(corpus.ref)


def fetched(log: Path) -> list[str]:
    """Digests of the shards that were fetched, in order."""
    return log.read_text().split() if log.exists() else []


def until(what: str, ready: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits for something that happens in another thread or process."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.01)
