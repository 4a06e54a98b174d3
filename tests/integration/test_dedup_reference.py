"""Near-duplicates against datasketch on real text with planted copies; the whole of it is `bench/dedup.py`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasketch import MinHash, MinHashLSH

from forge_ray.artifact import Workspace
from forge_ray.config import CurateConfig, NearConfig, RayConfig
from forge_ray.data.curation import near
from forge_ray.data.curation.dedup import Part, across, features
from forge_ray.data.curation.text import Texts
from forge_ray.runtime import cluster

DOCUMENTS = 2500


def load_bench() -> ModuleType:
    """The script as a module."""
    path = Path(__file__).parents[2] / "bench" / "dedup.py"
    spec = importlib.util.spec_from_file_location("bench_dedup", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_dedup"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, loaded once."""
    return load_bench()


@pytest.fixture(scope="module")
def planted(bench: ModuleType) -> tuple[list[str], list[int], list[float]]:
    """Texts, the original of each, and the rate of its edits."""
    return bench.planted(DOCUMENTS)


def test_clusters_agree_with_datasketch_as_well_as_it_agrees_with_itself(
    bench: ModuleType, planted: tuple[list[str], list[int], list[float]]
) -> None:
    texts, sources, rates = planted
    ours, _ = bench.our_clusters(texts)
    reference, _ = bench.datasketch_clusters(texts)
    again, _ = bench.datasketch_clusters(texts, seed=2)
    itself, agreed = bench.agreement(again, reference), bench.agreement(ours, reference)
    # 2,500 documents have some 600 pairs; five hundredths are three standard deviations.
    assert min(agreed.values()) > min(itself.values()) - 0.05
    by_rate = bench.recall_by_rate(ours, sources, rates)
    assert by_rate["0"] == 1.0
    assert by_rate["0.01"] > 0.9
    assert by_rate["0.1"] < 0.3


def test_given_our_signatures_datasketch_finds_exactly_our_clusters(
    bench: ModuleType, planted: tuple[list[str], list[int], list[float]], tmp_path: Path
) -> None:
    """What is left of the comparison without the luck of hash functions: bands, equal keys, components."""
    texts, config = planted[0], NearConfig()
    batch = Texts(texts)
    grams, document = near._shingles(batch.words(), len(batch), config.ngram_words)
    signature = near._signature(grams, document, len(batch), config)
    index = MinHashLSH(num_perm=len(signature), params=(config.bands, config.rows))
    clusters = list(range(len(texts)))
    for i in range(len(texts)):
        minhash = MinHash(num_perm=len(signature), hashvalues=signature[:, i].astype(np.uint64), scheme="affine32")
        names = {clusters[other] for other in index.query(minhash)}
        clusters = [min(names) if name in names else name for name in clusters] if names else clusters
        clusters[i] = min(names, default=i)
        index.insert(i, minhash)
    assert bench.our_clusters(texts)[0] == clusters


def test_tasks_on_ray_decide_alike_in_few_and_many_pieces(head: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "workspace")],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    few, many, drops = json.loads(done.stdout.splitlines()[-1])
    assert few == many
    assert set(drops) >= {"exact", "near", None}


def on_ray(folder: str) -> None:
    """Decides with one group of parts and with many, and prints both, and what for."""
    texts = load_bench().planted(DOCUMENTS)[0]
    workspace = Workspace(folder)
    steps = {name: {"enabled": True} for name in ("exact", "near", "decontaminate", "lines")}
    found = []
    with cluster(RayConfig(dashboard=False)):
        for spill_bytes in (256 << 20, 600_000):
            config = CurateConfig.model_validate({**steps, "spill_bytes": spill_bytes})
            parts = [_part(workspace, texts[i : i + 500], i, config) for i in range(0, len(texts), 500)]
            entries = across(parts, config, workspace)
            found.append([entry and entry.sha256 for entry in entries])
    tables = [pq.read_table(workspace.verified(entry, "decisions")) for entry in entries if entry]
    print(json.dumps([*found, list({reason for table in tables for reason in table["drop"].to_pylist()})]))


def _part(workspace: Workspace, texts: list[str], first: int, config: CurateConfig) -> Part:
    table = features(texts, config)
    with workspace.new_file("features") as build, pa.ipc.new_stream(build.stream, table.schema) as writer:
        writer.write_table(table)
    with workspace.new_file("clean") as clean:
        pq.write_table(pa.table({"id": [str(first + i) for i in range(len(texts))], "text": texts}), clean.stream)
    return Part("part", "train" if first else "heldout", 0, len(texts), clean.entry, build.entry)


if __name__ == "__main__":
    on_ray(sys.argv[1])
