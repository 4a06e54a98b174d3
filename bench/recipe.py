"""What a token teaches: held-out bits per byte against compute, our recipe beside plain AdamW with a cosine.

Two corpora (AWS service descriptions, Linux kernel documents), own vocabulary of 4,096. A run is one process of one
thread that trains for a given number of floating-point operations, those of the optimizer included, and scores held-out
text. The plain recipe is AdamW on everything, a cosine down to a tenth, and the same batch; its learning rate is tuned
for each corpus and size among powers of two. Ours runs at shares of the plain one's compute, and `value` is the share
at which it reaches the plain one's loss, by interpolation between runs (each with its own schedule to the end), the
larger of all corpora and sizes: goal 0.5.

    python bench/recipe.py --data FOLDER                 the pair at two sizes, 3 seeds, two corpora
    python bench/recipe.py --data FOLDER --quick         the smaller size, one seed, one corpus; about half an hour
    python bench/recipe.py --data FOLDER --ablations     each ingredient alone, smaller size, 2 seeds, one corpus

The folder keeps corpora, the workspace and every finished run (`runs.jsonl`), so that what was cut off goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
Row = dict[str, Any]
GOAL_FRAC = 0.5
VOCAB, SEQ_LEN, SCORED_BYTES = 4096, 512, 400_000
SIZES = {"1M": 2, "4M": 4}  # depths: 0.9 and 3.9 million parameters
TOKENS = {"1M": 9_000_000, "4M": 16_000_000}  # of the plain recipe at full compute: 2 and 4 passes over AWS
BATCH = {"1M": 4096, "4M": 8192}  # tokens of a step, of both sides
SHARES = (0.35, 0.5, 0.7)
PLAIN_RATES = (2e-3, 4e-3, 8e-3)

MUON = {"kind": "muon"}
OURS: Row = {"optimizer": MUON}
# What each ingredient is worth: ours without it, or with it where ours has it not.
ABLATIONS: dict[str, Row] = {
    "ours": OURS,
    "AdamW": {"optimizer": {"kind": "adamw"}},
    "cosine": {**OURS, "cosine": True},
    "batch x 2": {**OURS, "batch": 2.0},
    "batch / 2": {**OURS, "batch": 0.5},
    "decay 0.3": {**OURS, "decay_frac": 0.3},
    "decay 0.95": {**OURS, "decay_frac": 0.95},
    "muon rate x 2": {"optimizer": {"kind": "muon", "learning_rate": 16e-3}},
    "muon rate / 2": {"optimizer": {"kind": "muon", "learning_rate": 4e-3}},
    "embedding rate x 3": {"optimizer": {"kind": "muon", "adamw": {"kind": "adamw", "learning_rate": 12e-3}}},
    "embedding rate / 2": {"optimizer": {"kind": "muon", "adamw": {"kind": "adamw", "learning_rate": 2e-3}}},
    "weight decay 0": {"optimizer": {"kind": "muon", "weight_decay": 0.0}},
    "initial std 0.05": {**OURS, "model": {"init_std": 0.05}},
    "residual init 0": {**OURS, "scale": {"out.weight": 0.0, "down.weight": 0.0}},
    "embedding init x 5": {**OURS, "scale": {"embedding.weight": 5.0}},
    "momentum 0.9": {"optimizer": {"kind": "muon", "momentum": 0.9}},
    "beta2 0.98": {"optimizer": {"kind": "muon", "adamw": {"kind": "adamw", "beta2": 0.98}}},
    "average of the last tenth": {**OURS, "average_frac": 0.1},
    "warm-up 0.01": {**OURS, "warmup_frac": 0.01},
    "batch grows": {**OURS, "growing": [[0.05, 0.25], [0.15, 0.5], [0.8, 1.0]]},
    "clip 10": {**OURS, "grad_clip": 10.0},
}


# ------------------------------------------------------------------------------------------------------------- one run


def optimizer_flops(model: Any, kind: str) -> float:
    """Of one step: Muon's five iterations of Newton-Schulz; AdamW's few operations do not count."""
    if kind != "muon":
        return 0.0
    d, heads, kv = model.d_model, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = [(heads, d), (kv, d), (kv, d), (d, heads), (model.d_ff, d), (model.d_ff, d), (d, model.d_ff)]
    sides = [sorted(shape) for shape in shapes]
    return model.num_layers * sum(5.0 * (4 * m * m * n + 2 * m**3) for m, n in sides)


def train(words: Row) -> Row:
    """Trains for the compute and scores; in this process, with one thread."""
    import torch

    from forge_ray.artifact import Workspace
    from forge_ray.config import ModelConfig, PretrainConfig
    from forge_ray.data import tokenizer as vocabulary
    from forge_ray.data.loader import SlotLoader
    from forge_ray.evaluate.equal_compute import bits_per_byte
    from forge_ray.model.arithmetic import num_parameters, train_flops_per_token
    from forge_ray.model.transformer import Transformer
    from forge_ray.train import loop
    from forge_ray.train.guardian import Guardian
    from forge_ray.train.optimizer import Optimizer

    torch.set_num_threads(1)
    recipe, workspace = words["recipe"], Workspace(words["workspace"])
    model = ModelConfig(depth=SIZES[words["size"]], **recipe.get("model", {}))
    batch = words["batch_tokens"] * recipe.get("batch", 1.0)
    per_token = train_flops_per_token(model, VOCAB, SEQ_LEN)
    plain_flops = per_token * words["tokens"]
    step_flops = per_token * batch + optimizer_flops(model, recipe["optimizer"]["kind"])
    config = PretrainConfig(
        steps=round(words["share"] * plain_flops / step_flops),
        slots=max(1, round(batch / 8 / SEQ_LEN)),
        micro_batch=min(8, round(batch / SEQ_LEN)),
        seq_len=SEQ_LEN,
        max_workers=1,
        seed=words["seed"],
        reduction="fast",
        optimizer=recipe["optimizer"],
        **{name: recipe[name] for name in ("decay_frac", "warmup_frac", "grad_clip") if name in recipe},
    )
    if recipe.get("cosine"):
        loop.rate_frac = cosine
    shards, documents = workspace.get(words["shards"]), workspace.get(words["documents"])
    loader = SlotLoader.of(config, shards)
    index = loader.order.index
    net = Transformer(model, index.vocab_size, SEQ_LEN).initialise(config.seed)
    with torch.no_grad():
        for ending, factor in recipe.get("scale", {}).items():
            for name, parameter in net.named_parameters():
                parameter.mul_(factor if name.endswith(ending) else 1.0)
    worker = loop.Worker(
        config,
        net,
        Optimizer(net, config.optimizer),
        loader,
        index.end_token,
        True,
        Guardian(config.guard),
        step=0,
        compiled=True,
    )
    losses: list[float] = []
    first = config.steps * (1 - recipe.get("average_frac", 0.0))
    sums = [torch.zeros_like(parameter) for parameter in net.parameters()]

    def on_step(record: loop.StepRecord) -> None:
        losses.append(record.loss)
        if record.step > first:
            torch._foreach_add_(sums, [parameter.detach() for parameter in net.parameters()])

    if "growing" in recipe:
        grow(worker, words["tokens"] * words["share"], recipe["growing"], on_step)
    else:
        loop.fit(worker, loop.Alone(), on_step, lambda verdict: None)
    if first < config.steps:
        with torch.no_grad():
            for parameter, total in zip(net.parameters(), sums, strict=True):
                parameter.copy_(total / (config.steps - math.floor(first)))
    loader.reader.close()
    texts = [row["text"] for row in vocabulary.sample(documents, "heldout", SCORED_BYTES)]
    tokenizer = vocabulary.load(workspace.get(words["tokenizer"]))
    return {
        "bits_per_byte": bits_per_byte(net.eval(), tokenizer, texts, SEQ_LEN),
        "train_loss": statistics.mean(losses[-20:]),
        "steps": config.steps,
        "tokens": config.steps * round(batch),
        "flops": config.steps * step_flops,
        "parameters": num_parameters(model, VOCAB),
    }


def grow(worker: Any, tokens: float, parts: list[list[float]], on_step: Any) -> None:
    """Trains with a batch that grows: by `[share of the tokens, share of the batch]`, one after the other."""
    from dataclasses import replace

    import numpy as np

    from forge_ray.train import loop

    whole, inner = worker.config, worker.loader
    inner.micro_batch = inner.slots = 1
    steps = [round(share * tokens / (whole.micro_batch * whole.seq_len * factor)) for share, factor in parts]
    total = whole.replace(steps=sum(steps))
    loop.rate_frac = lambda step, _, own=loop.rate_frac: own(step, total)
    done = read = 0

    class Grown:
        def slot(self, position: int, _: int) -> Any:
            first = read + (position - done) * worker.config.micro_batch
            return np.concatenate([inner.slot(first + row, 0) for row in range(worker.config.micro_batch)])

    worker.loader = Grown()
    for count, (_, factor) in zip(steps, parts, strict=True):
        micro_batch = round(whole.micro_batch * factor)
        worker.config = total.replace(micro_batch=micro_batch, steps=done + count)
        worker.fit = replace(worker.fit, at_once=micro_batch)
        loop.fit(worker, loop.Alone(), on_step, lambda verdict: None)
        done, read = done + count, read + count * micro_batch


def cosine(step: int, config: Any) -> float:
    """The plain schedule: linear warm-up, then half a cosine down to a tenth."""
    warmup = config.warmup_frac * config.steps
    if step < warmup:
        return float((step + 1) / warmup)
    done = (step - warmup) / (config.steps - warmup)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))


# ------------------------------------------------------------------------------------------------------------- driving


class Runs:
    """Runs by what they are, in a file, a few at a time."""

    def __init__(self, path: Path, cpus: int) -> None:
        self._path, self._lock = path, Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows: dict[str, Row] = dict(json.loads(line) for line in lines)
        self._pool = ThreadPoolExecutor(cpus)

    def all(self, wanted: list[Row]) -> list[Row]:
        """The results, in the order of what is wanted."""
        return [{**words, **found} for words, found in zip(wanted, self._pool.map(self._get, wanted), strict=True)]

    def _get(self, words: Row) -> Row:
        key = json.dumps(words, sort_keys=True)
        if key not in self._rows:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, __file__, "--serve", key], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            with self._lock:
                self._rows[key] = found
                with self._path.open("a") as sink:
                    sink.write(json.dumps([key, found]) + "\n")
            bits, tokens = found["bits_per_byte"], found["tokens"] / 1e6
            say(f"  {describe(words)}: {bits:.4f} bits per byte, {tokens:.1f} M tokens")
        return self._rows[key]


def describe(words: Row) -> str:
    """A run in a line."""
    return f"{words['domain']} {words['size']} {words['name']} x {words['share']} seed {words['seed']}"


def corpora(data: Path, domains: list[str], cpus: int) -> dict[str, Row]:
    """Tokenizes each domain once; gives what a run needs to find it."""
    from vocabulary import fetch, kernel

    from forge_ray import pipeline
    from forge_ray.config import ForgeConfig

    fetch(data)
    sources: dict[str, Row] = {
        "aws": {"kind": "botocore"},
        "kernel": {"kind": "files", "uri": str(kernel(data)), "name": "kernel", "licence": "GPL-2.0-only"},
    }
    found = {}
    for domain in domains:
        job = {
            "workspace": str(data / "workspace"),
            "ray": {"address": "local", "num_cpus": cpus, "dashboard": False},
            "ingest": {"sources": [sources[domain]], "held_out_frac": 0.05},
            "curate": {"exact": {"enabled": True}, "near": {"enabled": True}, "lines": {"enabled": True}},
            "tokenizer": {"vocab_size": VOCAB, "sample_bytes": 16 << 20},
        }
        done = pipeline.run(ForgeConfig.model_validate(job), "tokenize", named=False)
        found[domain] = {
            "workspace": job["workspace"],
            "shards": done["tokenize"].artifact.ref,
            "documents": done["curate"].artifact.ref,
            "tokenizer": done["tokenizer"].artifact.ref,
        }
    return found


def words(domain: str, size: str, name: str, recipe: Row, share: float, seed: int) -> Row:
    """What a run is, but for its corpus; tokens are those of a step, and of the plain recipe's run."""
    about = {"domain": domain, "size": size, "name": name, "recipe": recipe, "share": share, "seed": seed}
    return about | {"batch_tokens": BATCH[size], "tokens": TOKENS[size]}


def plain(rate: float) -> Row:
    """The plain recipe."""
    return {"optimizer": {"kind": "adamw", "learning_rate": rate}, "cosine": True}


def share_needed(ours: dict[float, float], wanted: float) -> float:
    """Share of the compute at which ours reaches a score: straight lines between runs, over the log of compute."""
    points = sorted((math.log(share), bits) for share, bits in ours.items())
    pairs = [pair for pair in itertools.pairwise(points) if pair[1][1] <= wanted]
    (left, above), (right, below) = pairs[0] if pairs else (points[-2], points[-1])
    if above == below:
        return math.exp(right)
    return math.exp(left + (right - left) * (above - wanted) / (above - below))


def pair(runs: Runs, corpus: Row, domain: str, size: str, seeds: range) -> Row:
    """Both recipes on a corpus at a size."""

    def wanted(name: str, recipe: Row, share: float, seed: int) -> Row:
        return words(domain, size, name, recipe, share, seed) | corpus

    tuned = runs.all([wanted(f"plain {rate:g}", plain(rate), 1.0, 0) for rate in PLAIN_RATES])
    best = min(tuned, key=lambda row: row["bits_per_byte"])
    base = runs.all([wanted(best["name"], best["recipe"], 1.0, seed) for seed in seeds])
    mine = runs.all([wanted("ours", OURS, share, seed) for share in SHARES for seed in seeds])
    target = statistics.mean(row["bits_per_byte"] for row in base)
    curve = {s: statistics.mean(r["bits_per_byte"] for r in mine if r["share"] == s) for s in SHARES}
    each = [
        share_needed({r["share"]: r["bits_per_byte"] for r in mine if r["seed"] == b["seed"]}, b["bits_per_byte"])
        for b in base
    ]
    return {
        "plain": round(target, 4),
        "plain_rate": best["recipe"]["optimizer"]["learning_rate"],
        "plain_tuning": {row["recipe"]["optimizer"]["learning_rate"]: round(row["bits_per_byte"], 4) for row in tuned},
        "ours": {share: round(bits, 4) for share, bits in curve.items()},
        "compute_frac": round(share_needed(curve, target), 3),
        "by_seed": [round(share, 3) for share in each],
        "parameters": base[0]["parameters"],
        "plain_tokens": base[0]["tokens"],
    }


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for downloads, the workspace and the runs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), help="these ablations")
    parser.add_argument("--size", choices=SIZES, default="1M", help="of the ablations")
    parser.add_argument("--domains", nargs="+", choices=("aws", "kernel"))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    data = options.data.resolve()
    short = options.quick or options.ablations
    domains = options.domains or (["aws"] if short else ["aws", "kernel"])
    found = corpora(data, domains, options.cpus)
    runs = Runs(data / "runs.jsonl", options.cpus)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    last: Row = {
        "name": "recipe",
        "versions": {name: metadata.version(name) for name in ("torch", "tokenizers", "botocore")},
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "commit": commit.stdout.strip(),
    }
    if options.ablations:
        seeds = range(options.seeds or 2)
        wanted = [
            words(d, options.size, name, ABLATIONS[name], 0.5, seed) | found[d]
            for name in options.only or ABLATIONS
            for d in domains
            for seed in seeds
        ]
        table: dict[str, list[float]] = {}
        for row in runs.all(wanted):
            table.setdefault(f"{row['domain']} {row['name']}", []).append(round(row["bits_per_byte"], 4))
        for name, bits in table.items():
            say(f"{name:32} {statistics.mean(bits):.4f}  {bits}")
        print(json.dumps({**last, "ablations": table}))
        return
    sizes, seeds = (["1M"], range(options.seeds or 1)) if options.quick else (list(SIZES), range(options.seeds or 3))
    pairs = {f"{d} {size}": pair(runs, found[d], d, size, seeds) for d in domains for size in sizes}
    for name, row in pairs.items():
        say(f"{name}: {row['compute_frac']} of the compute, by seed {row['by_seed']}")
        say(f"  plain {row['plain']} bits per byte, ours {row['ours']}")
    value = max(row["compute_frac"] for row in pairs.values())
    print(
        json.dumps(
            {
                **last,
                "value": value,
                "goal": GOAL_FRAC,
                "met": value <= GOAL_FRAC,
                "ours": {name: row["ours"] for name, row in pairs.items()},
                "peers": {name: {"plain": row["plain"], "rates": row["plain_tuning"]} for name, row in pairs.items()},
                "spread": {name: row["by_seed"] for name, row in pairs.items()},
                "pairs": pairs,
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        print(json.dumps(train(json.loads(sys.argv[2]))))
    else:
        main()
