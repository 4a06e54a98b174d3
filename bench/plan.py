"""How well a ladder of small runs foretells a large one: bits per byte on held-out documents, time and memory.

Six rungs of a quarter of the target's size and less, with as many tokens per parameter, on AWS's service descriptions;
the target has 2.8 million parameters in its blocks and sees 2.5 million tokens. `value` is the largest miss in shares
of what it may be: 2 % of the loss, 15 % of the time and of the memory; goal 1.

    python bench/plan.py ladder --data FOLDER     trains the ladder, writes bench/plan.prediction.json: commit it
    python bench/plan.py target --data FOLDER     refuses unless that file is committed; trains the target and compares

The folder keeps the workspace, so that what was cut off goes on. The ladder is 13 TFLOP and the target 70: on two cores
that multiply 48 GFLOP/s in fp32 together 29 minutes at their peak, 45 at 0.65 of it. On a machine with other work the
time says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PREDICTION = ROOT / "bench" / "plan.prediction.json"
LIMITS = {"bits_per_byte": 0.02, "seconds": 0.15, "peak_bytes": 0.15}
JOB: dict[str, Any] = {
    "ingest": {"sources": [{"kind": "botocore"}], "held_out_frac": 0.05},
    "curate": {"exact": {"enabled": True}, "decontaminate": {"enabled": True, "max_overlap_frac": 0.5}},
    "tokenizer": {"vocab_size": 4096, "sample_bytes": 16_000_000},
    "model": {"depth": 4, "tied_embeddings": True},
    "pretrain": {
        "steps": 300,
        "slots": 2,
        "micro_batch": 16,
        "seq_len": 256,
        "min_workers": 2,
        "max_workers": 2,
        "optimizer": {"kind": "muon"},
    },
    "plan": {"ladder_step": 1.4},
    "evaluate": {"max_bytes": 1_000_000, "baselines": [], "prompts": []},
}
Row = dict[str, Any]


def forge(data: Path, *words: str) -> Row:
    """What a command prints with --json."""
    job = data / "job.yaml"
    job.write_text(json.dumps(JOB))  # JSON is YAML
    command = [sys.executable, "-m", "forge_ray.cli", *words, str(job), f"--workspace={data / 'workspace'}", "--json"]
    command += ["--ray.address=local", "--ray.dashboard=false", "--ray.num_cpus=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def ladder(data: Path) -> None:
    """Trains the rungs and writes down what they say."""
    said = forge(data, "plan", "fit")
    if not said["before_training"]:
        raise SystemExit(f"{said['target']} is trained already in {data}: take another folder")
    PREDICTION.write_text(json.dumps(said, indent=1) + "\n")
    print(f"written to {PREDICTION.relative_to(ROOT)}: commit it, then train the target", file=sys.stderr)


def target(data: Path) -> Row:
    """Trains the target and holds it beside the committed prediction."""
    name = str(PREDICTION.relative_to(ROOT))
    if not PREDICTION.exists() or git("status", "--porcelain", "--", name):
        raise SystemExit(f"{name} is not committed: the prediction comes first")
    expected = json.loads(PREDICTION.read_text())
    stages = forge(data, "evaluate")["stages"]
    trained, scored = stages["pretrain"]["metrics"], stages["evaluate"]["metrics"]
    if stages["pretrain"]["ref"] != expected["target"]:
        raise SystemExit(f"the prediction is of {expected['target']}, this is {stages['pretrain']['ref']}")
    prediction = expected["prediction"]
    found = {
        "bits_per_byte": (prediction["bits_per_byte"]["median"], scored["bits_per_byte"]["model"]),
        "seconds": (prediction["hours"] * 3600, trained["tokens"] / trained["tokens_per_s"]),
        "peak_bytes": (prediction["peak_bytes"], trained["peak_bytes"]),
    }
    misses = {what: came / wanted - 1 for what, (wanted, came) in found.items()}
    value = max(abs(miss) / LIMITS[what] for what, miss in misses.items())
    low, high = prediction["bits_per_byte"]["low"], prediction["bits_per_byte"]["high"]
    return {
        "name": "plan",
        "value": round(value, 3),
        "goal": 1.0,
        "met": value <= 1.0,
        "ours": {
            what: {"expected": wanted, "came": came, "miss": round(misses[what], 4)}
            for what, (wanted, came) in found.items()
        },
        "peers": {},
        "spread": {"bits_per_byte": [low, high]},
        "committed": git("log", "-1", "--format=%h %cI", "--", name),
        "size_over_largest_rung": round(expected["size"] / max(rung["size"] for rung in expected["rungs"]), 2),
        "versions": {name: metadata.version(name) for name in ("ray", "torch", "botocore")},
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "commit": git("rev-parse", "HEAD"),
    }


def main() -> None:
    """Prints one JSON object as the last line, once the target is trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("ladder", "target"))
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    options.data.mkdir(parents=True, exist_ok=True)
    if options.part == "ladder":
        ladder(options.data.resolve())
    else:
        print(json.dumps(target(options.data.resolve())))


if __name__ == "__main__":
    main()
