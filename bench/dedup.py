"""Near-deduplication against datasketch's MinHashLSH: the same clusters, and how much time each takes.

100,000 documents of some 600 characters: windows over the distinct lines of the service descriptions in botocore, and
copies of them with words replaced, left out and put in at known rates. Both sides use the same bands and rows, and
shingles of five words. Clusters are compared as sets of pairs. A pair near the threshold is found with a probability of
about a half, whatever the hash functions are, so the yardstick is how well datasketch agrees with itself under another
seed: we are to agree with it as well, to within a hundredth.

    python bench/dedup.py            100,000 documents; about 6 minutes of one core, most of them datasketch's
    python bench/dedup.py --quick    10,000 documents
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.artifact import Workspace
from forge_ray.config import BotocoreSource, CurateConfig, IngestConfig
from forge_ray.data.curation.dedup import Part, across, features
from forge_ray.data.reading import botocore_docs
from forge_ray.data.reading.documents import Document

ROOT = Path(__file__).parents[1]
EDIT_RATES = (0.0, 0.01, 0.02, 0.05, 0.1)
COPIES_FRAC = 0.4
DOCUMENT_CHARS = 600
NEAR = {"enabled": True, "ngram_words": 5, "bands": 14, "rows": 8}
SLACK = 0.01
_WORD = re.compile(r"\w+")

Clusters = Sequence[int]
"""For each document a number that its cluster has."""


def planted(count: int, seed: int = 0) -> tuple[list[str], list[int], list[float]]:
    """Documents in random order, the original that each is or copies, and the rate of its edits (-1: an original)."""
    draw = random.Random(seed)
    originals = _originals(count - int(count * COPIES_FRAC))
    words = sorted({word for text in originals[:2000] for word in text.split()})
    rows = [(text, i, -1.0) for i, text in enumerate(originals)]
    while len(rows) < count:
        # A third of the originals have copies, so that clusters have three documents on average, and some ten.
        source, rate = draw.randrange(len(originals) // 3), draw.choice(EDIT_RATES)
        rows.append((_edited(originals[source], rate, words, draw), source, rate))
    draw.shuffle(rows)
    texts, sources, rates = zip(*rows, strict=True)
    return list(texts), list(sources), list(rates)


def _originals(count: int) -> list[str]:
    """Windows over the distinct lines: in their order, then over the shuffled lines, so that no two share much."""
    source = BotocoreSource(kind="botocore")
    distinct: dict[str, None] = {}
    for row in botocore_docs.listing(source):
        for item in botocore_docs.read(botocore_docs.unit(source, [row]), IngestConfig(sources=(source,))):
            if isinstance(item, Document):
                distinct.update(dict.fromkeys(line for line in item.text.split("\n") if len(line) >= 40))
    texts: list[str] = []
    lines, draw = list(distinct), random.Random(1)
    while True:
        window: list[str] = []
        size = 0
        for line in lines:
            window.append(line)
            size += len(line)
            if size >= DOCUMENT_CHARS:
                texts.append("\n".join(window))
                window, size = [], 0
            if len(texts) == count:
                return texts
        draw.shuffle(lines)


def _edited(text: str, rate: float, words: list[str], draw: random.Random) -> str:
    found: list[str] = []
    for word in text.split(" "):
        if draw.random() >= rate:
            found.append(word)
            continue
        kind = draw.randrange(3)  # replaced, left out, or another before it
        found += [[draw.choice(words)], [], [draw.choice(words), word]][kind]
    return " ".join(found)


def our_clusters(texts: list[str]) -> tuple[Clusters, dict[str, float]]:
    """What curation decides, and CPU seconds of features and of what comes across documents."""
    config = CurateConfig.model_validate({"near": NEAR})
    began = time.process_time()
    table = features(texts, config)
    signed = time.process_time()
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as folder:
        workspace = Workspace(folder)
        with workspace.new_file("features") as build, pa.ipc.new_stream(build.stream, table.schema) as writer:
            writer.write_table(table)
        with workspace.new_file("clean") as clean:
            pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], "text": texts}), clean.stream)
        part = Part("part", "train", 0, len(texts), clean.entry, build.entry)
        (entry,) = across([part], config, workspace)
        decided = pq.read_table(workspace.verified(entry, "decisions")).to_pylist() if entry else []
    ended = time.process_time()
    clusters = list(range(len(texts)))
    for row in decided:
        clusters[row["row"]] = int(row["other"])
    return clusters, {"signature_s": signed - began, "across_s": ended - signed, "total_s": ended - began}


def datasketch_clusters(texts: list[str], seed: int = 1) -> tuple[Clusters, dict[str, float]]:
    """Components of what the index answers for each document, and CPU seconds."""
    from datasketch import MinHash, MinHashLSH

    began = time.process_time()
    sets = []
    for text in texts:
        words = [word.encode() for word in _WORD.findall(text.lower())]
        sets.append({b" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))})
    hashes = MinHash.bulk(sets, num_perm=NEAR["bands"] * NEAR["rows"], seed=seed)
    signed = time.process_time()
    index = MinHashLSH(num_perm=NEAR["bands"] * NEAR["rows"], params=(NEAR["bands"], NEAR["rows"]))
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, minhash in enumerate(hashes):
        for other in index.query(minhash):
            a, b = root(i), root(other)
            parent[max(a, b)] = min(a, b)
        index.insert(i, minhash)
    clusters = [root(i) for i in range(len(texts))]
    ended = time.process_time()
    return clusters, {"signature_s": signed - began, "across_s": ended - signed, "total_s": ended - began}


def agreement(found: Clusters, wanted: Clusters) -> dict[str, float]:
    """Of the pairs that share a wanted cluster the share that is found, and of those found the share wanted."""

    def pairs(sizes: Counter[Any]) -> int:
        return sum(size * (size - 1) // 2 for size in sizes.values())

    both = pairs(Counter(zip(found, wanted, strict=True)))
    return {"recall": both / max(pairs(Counter(wanted)), 1), "precision": both / max(pairs(Counter(found)), 1)}


def recall_by_rate(found: Clusters, sources: list[int], rates: list[float]) -> dict[str, float]:
    """Of the copies of each rate, the share that shares the cluster of its original."""
    original = {source: i for i, (source, rate) in enumerate(zip(sources, rates)) if rate < 0}
    hits: dict[float, list[bool]] = defaultdict(list)
    for i, (source, rate) in enumerate(zip(sources, rates)):
        if rate >= 0:
            hits[rate].append(found[i] == found[original[source]])
    return {f"{rate:g}": round(sum(one) / len(one), 4) for rate, one in sorted(hits.items())}


def compare(count: int) -> dict[str, Any]:
    """Both sides over the same documents."""
    texts, sources, rates = planted(count)
    num_bytes = sum(len(text.encode()) for text in texts)
    result: dict[str, Any] = {"documents": count, "bytes": num_bytes}
    clusters, seconds = our_clusters(texts)
    reference, reference_seconds = datasketch_clusters(texts)
    again, _ = datasketch_clusters(texts, seed=2)
    for name, found, spent in (("ours", clusters, seconds), ("datasketch", reference, reference_seconds)):
        result[name] = {
            "planted": agreement(found, sources),
            "copies_found_by_edit_rate": recall_by_rate(found, sources, rates),
            "cpu": {key: round(value, 2) for key, value in spent.items()},
            "signature_mb_per_s": round(num_bytes / 1e6 / spent["signature_s"], 1),
            "documents_per_s": round(count / spent["total_s"]),
        }
    result["ours"]["against_datasketch"] = agreement(clusters, reference)
    result["datasketch"]["against_itself"] = agreement(again, reference)
    return result


def main() -> None:
    """Prints one JSON object as the last line."""
    result = compare(10_000 if "--quick" in sys.argv[1:] else 100_000)
    value = min(result["ours"]["against_datasketch"].values())
    goal = min(result["datasketch"]["against_itself"].values()) - SLACK
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "name": "dedup",
                "value": round(value, 4),
                "goal": round(goal, 4),
                "met": value >= goal,
                "ours": result["ours"],
                "peers": {"datasketch": result["datasketch"]},
                "spread": {"documents": result["documents"], "bytes": result["bytes"], "seeds_of_reference": [1, 2]},
                "versions": {name: metadata.version(name) for name in ("datasketch", "numpy", "pyarrow", "botocore")},
                "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
                "commit": commit.stdout.strip(),
            }
        )
    )


if __name__ == "__main__":
    main()
