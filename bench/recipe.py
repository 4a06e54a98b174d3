"""What a token teaches: held-out bits per byte against compute, our recipe beside plain AdamW with a cosine.

Two corpora (AWS service descriptions, Linux kernel documents), own vocabulary of 4,096. A run is one process of one
thread that trains for a given number of floating-point operations, those of the optimizer included, and scores held-out
text. The plain recipe is AdamW on everything, a cosine down to a tenth, and the same batch; its learning rate is tuned
for each corpus and size among powers of two, further out for as long as the best lies at the edge. Ours runs at shares
of the plain one's compute, and `value` is the share at which it reaches the plain one's loss, by interpolation between
runs (each with its own schedule to the end), the larger of all corpora and sizes: goal 0.5. `extrapolated` says where
no two runs lie on both sides. `time_frac` is the same in seconds of steps, not in operations, at these sizes and with
one thread. All compute in the precision that `forge pretrain` takes here, and say it.

    python bench/recipe.py --data FOLDER                 the pair at two sizes, 3 seeds, two corpora
    python bench/recipe.py --data FOLDER --quick         the smaller size, 3 M tokens, 2 seeds, one corpus: 151 TFLOP,
                                                         55 minutes where two cores train at 48 GFLOP/s; 15 more for
                                                         each rate beyond the sweep
    python bench/recipe.py --data FOLDER --tokens N      as many tokens for the plain recipe
    python bench/recipe.py --data FOLDER --ablations     each ingredient alone, smaller size, 2 seeds, one corpus
    python bench/recipe.py --results FILE --report ...   trains nothing: what FILE has of it so far

The folder keeps corpora, the workspace and every finished run (`runs.jsonl`, or --results), so that what was cut off
goes on. Each run keeps the commit that it was made with; `commits` names all that are in a report.
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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from queue import PriorityQueue
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
QUICK_TOKENS = 3_000_000
SHARES = (0.35, 0.5, 0.7)
PLAIN_RATES = (2e-3, 4e-3, 8e-3)
MOST_RATES = 7
CORPUS = ("workspace", "shards", "documents", "tokenizer")  # where a run finds its text, which is not what it is

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
    update_flops = optimizer_flops(model, recipe["optimizer"]["kind"])
    parts = recipe.get("growing", [[1.0, 1.0]])
    counts = steps_of(words["share"] * plain_flops, per_token, update_flops, batch, parts)
    config = PretrainConfig(
        steps=sum(counts),
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
        words["precision"] == "bf16",
        Guardian(config.guard),
        step=0,
        compiled=True,
    )
    losses: list[float] = []
    step_s: list[float] = []
    first = config.steps * (1 - recipe.get("average_frac", 0.0))
    sums = [torch.zeros_like(parameter) for parameter in net.parameters()]

    def on_step(record: loop.StepRecord) -> None:
        losses.append(record.loss)
        step_s.append(record.wall_s)
        if record.step > first:
            torch._foreach_add_(sums, [parameter.detach() for parameter in net.parameters()])

    if "growing" in recipe:
        grow(worker, counts, parts, on_step)
    else:
        loop.fit(worker, loop.Alone(), on_step, lambda verdict: None)
    if first < config.steps:
        with torch.no_grad():
            for parameter, total in zip(net.parameters(), sums, strict=True):
                parameter.copy_(total / (config.steps - math.floor(first)))
    loader.reader.close()
    texts = [row["text"] for row in vocabulary.sample(documents, "heldout", SCORED_BYTES)]
    tokenizer = vocabulary.load(workspace.get(words["tokenizer"]))
    tokens = sum(count * round(batch * factor) for count, (_, factor) in zip(counts, parts, strict=True))
    return {
        "bits_per_byte": bits_per_byte(net.eval(), tokenizer, texts, SEQ_LEN),
        "train_loss": statistics.mean(losses[-20:]),
        "steps": config.steps,
        "tokens": tokens,
        "flops": per_token * tokens + update_flops * config.steps,
        "optimizer_flops_frac": round(
            update_flops * config.steps / (per_token * tokens + update_flops * config.steps), 4
        ),
        "step_s": round(statistics.median(step_s), 4),
        "steps_s": round(statistics.median(step_s) * len(step_s), 1),
        "parameters": num_parameters(model, VOCAB),
    }


def steps_of(flops: float, per_token: float, update: float, batch: float, parts: list[list[float]]) -> list[int]:
    """Steps of each part of a run for this compute, every step's optimizer included.

    Args:
        flops: All that the run may cost.
        per_token: Operations of a token.
        update: Operations of the optimizer in a step, whatever its batch.
        batch: Tokens of a whole batch.
        parts: `[share of the tokens, share of the batch]`, one after the other.
    """
    per_run_token = per_token + update * sum(share / (batch * factor) for share, factor in parts)
    return [round(share * flops / per_run_token / (batch * factor)) for share, factor in parts]


class Grown:
    """What `loop` reads while the batch grows: the run's sequences in their order, each once, whatever the batch."""

    def __init__(self, inner: Any) -> None:
        inner.micro_batch = inner.slots = 1
        self._inner, self._position, self._read = inner, 0, 0
        self._slots = self._micro_batch = 0

    def begin(self, position: int, slots: int, micro_batch: int) -> None:
        """Another batch from this position on."""
        self._read += (position - self._position) * self._slots * self._micro_batch
        self._position, self._slots, self._micro_batch = position, slots, micro_batch

    def slot(self, position: int, slot: int) -> Any:
        """As a `SlotLoader`'s."""
        import numpy as np

        first = self._read + ((position - self._position) * self._slots + slot) * self._micro_batch
        return np.concatenate([self._inner.slot(first + row, 0) for row in range(self._micro_batch)])


def grow(worker: Any, counts: list[int], parts: list[list[float]], on_step: Any) -> None:
    """Trains with a batch that grows: so many steps at `[share of the tokens, share of the batch]` of each part."""
    from dataclasses import replace

    from forge_ray.train import loop

    whole, done = worker.config, 0
    loop.rate_frac = lambda step, _, own=loop.rate_frac: own(step, whole)
    worker.loader = Grown(worker.loader)
    for count, (_, factor) in zip(counts, parts, strict=True):
        micro_batch = round(whole.micro_batch * factor)
        worker.config = whole.replace(micro_batch=micro_batch, steps=done + count)
        worker.fit = replace(worker.fit, at_once=micro_batch)
        worker.loader.begin(worker.position, whole.slots, micro_batch)
        loop.fit(worker, loop.Alone(), on_step, lambda verdict: None)
        done += count


def cosine(step: int, config: Any) -> float:
    """The plain schedule: linear warm-up, then half a cosine down to a tenth."""
    warmup = config.warmup_frac * config.steps
    if step < warmup:
        return float((step + 1) / warmup)
    done = (step - warmup) / (config.steps - warmup)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))


# ------------------------------------------------------------------------------------------------------------- driving


class Runs:
    """Runs by what they are, in a file, a few at a time.

    Args:
        path: The file, a JSON line each.
        cpus: Runs at a time; 0 to train nothing.
        commit: That finished runs are marked with.
    """

    def __init__(self, path: Path, cpus: int, commit: str) -> None:
        self._path, self._lock, self._commit = path, Lock(), commit
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows: dict[str, Row] = dict(json.loads(line) for line in lines)
        self._pool = ThreadPoolExecutor(cpus) if cpus else None
        self._queue: PriorityQueue[tuple[int, int, str]] = PriorityQueue()
        self._begun: dict[str, Future[Row]] = {}
        self.commits: set[str] = set()
        self.missing = 0

    def begin(self, wanted: list[Row], urgency: int) -> None:
        """Has runs made when a CPU is free; the lowest number first."""
        for key in (json.dumps(words, sort_keys=True) for words in wanted):
            if self._pool and key not in self._begun:
                self._begun[key] = Future()
                self._queue.put((urgency, len(self._begun), key))
                self._pool.submit(self._next)

    def all(self, wanted: list[Row]) -> list[Row]:
        """The results, in the order of what is wanted; where nothing is trained, those that there are."""
        if self._pool:
            self.begin(wanted, 0)
            try:
                found = [self._begun[json.dumps(words, sort_keys=True)].result() for words in wanted]
            except BaseException:
                self._pool.shutdown(wait=False, cancel_futures=True)
                raise
        else:
            kept = {self._without_corpus(json.loads(key)): row for key, row in self._rows.items()}
            found = [kept.get(self._without_corpus(words)) for words in wanted]
        rows = [{**words, **row} for words, row in zip(wanted, found, strict=True) if row]
        self.missing += len(wanted) - len(rows)
        self.commits |= {row.get("commit", "unknown") for row in rows}
        return rows

    def _next(self) -> None:
        _, _, key = self._queue.get()
        try:
            self._begun[key].set_result(self._get(key))
        except Exception as error:
            self._begun[key].set_exception(error)

    @staticmethod
    def _without_corpus(words: Row) -> str:
        return json.dumps({name: value for name, value in words.items() if name not in CORPUS}, sort_keys=True)

    def _get(self, key: str) -> Row:
        if key not in self._rows:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, __file__, "--serve", key], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1]) | {"commit": self._commit}
            with self._lock:
                self._rows[key] = found
                with self._path.open("a") as sink:
                    sink.write(json.dumps([key, found]) + "\n")
            bits, tokens = found["bits_per_byte"], found["tokens"] / 1e6
            say(f"  {describe(json.loads(key))}: {bits:.4f} bits per byte, {tokens:.1f} M tokens")
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


def words(domain: str, size: str, name: str, recipe: Row, share: float, seed: int, common: Row) -> Row:
    """What a run is, but for its corpus; tokens are those of a step, and of the plain recipe's run.

    Args:
        common: What all runs have in common: the precision, and tokens where they are not those of the size.
    """
    about = {"domain": domain, "size": size, "name": name, "recipe": recipe, "share": share, "seed": seed}
    return about | {"batch_tokens": BATCH[size], "tokens": TOKENS[size]} | common


def plain(rate: float) -> Row:
    """The plain recipe."""
    return {"optimizer": {"kind": "adamw", "learning_rate": rate}, "cosine": True}


def share_needed(ours: dict[float, float], wanted: float) -> tuple[float, bool]:
    """Share of the compute at which ours reaches a score: straight lines between runs, over the log of compute.

    Returns:
        The share, and whether it is extrapolated: ours is better than wanted at its least compute, or nowhere.
    """
    points = sorted((math.log(share), bits) for share, bits in ours.items())
    pairs = [pair for pair in itertools.pairwise(points) if pair[1][1] <= wanted]
    (left, above), (right, below) = pairs[0] if pairs else (points[-2], points[-1])
    outside = not below <= wanted <= above
    if above == below:
        return math.exp(right), outside
    return math.exp(left + (right - left) * (above - wanted) / (above - below)), outside


def tuned(runs: Runs, wanted: Callable[[float], Row]) -> tuple[list[Row], bool]:
    """Runs of the plain recipe by its rate, and whether the best lies at the edge after all.

    Args:
        wanted: The run at a rate.
    """
    rates = list(PLAIN_RATES)
    rows = runs.all([wanted(rate) for rate in rates])
    while rows:
        best = rate_of(min(rows, key=lambda row: row["bits_per_byte"]))
        done = [rate_of(row) for row in rows]
        if min(done) < best < max(done):
            return rows, False
        further = best / 2 if best == min(done) else best * 2
        if len(rates) >= MOST_RATES:
            return rows, True
        say(f"  the best rate so far, {best:g}, lies at the edge of the sweep: {further:g} is tried")
        rates.append(further)
        more = runs.all([wanted(further)])
        if not more:
            return rows, True
        rows += more
    return rows, True


def rate_of(row: Row) -> float:
    """The learning rate of a plain run."""
    return float(row["recipe"]["optimizer"]["learning_rate"])


def pair(runs: Runs, corpus: Row, domain: str, size: str, seeds: range, common: Row) -> Row | None:
    """Both recipes on a corpus at a size, from what there is of them; none without both."""

    def wanted(name: str, recipe: Row, share: float, seed: int) -> Row:
        return words(domain, size, name, recipe, share, seed, common) | corpus

    def plainly(rate: float) -> Row:
        return wanted(f"plain {rate:g}", plain(rate), 1.0, 0)

    # Seed by seed, so that what is cut off has whole ones; no CPU waits for the sweep to end.
    ours = [wanted("ours", OURS, share, seed) for seed in seeds for share in SHARES]
    runs.begin([plainly(rate) for rate in PLAIN_RATES], 0)
    runs.begin(ours, 1)
    sweep, at_edge = tuned(runs, plainly)
    best = min(sweep, key=lambda row: row["bits_per_byte"]) if sweep else None
    if best and at_edge:
        say(f"  {domain} {size}: the plain recipe's best rate, {rate_of(best):g}, lies at the edge of the sweep")
    base = runs.all([wanted(best["name"], best["recipe"], 1.0, seed) for seed in seeds]) if best else []
    mine = runs.all(ours)
    if not base or not mine:
        return None
    by_seed = {}
    for row in base:
        own = {other["share"]: other["bits_per_byte"] for other in mine if other["seed"] == row["seed"]}
        if len(own) == len(SHARES):
            by_seed[row["seed"]] = share_needed(own, row["bits_per_byte"])
    if by_seed:
        base, mine = ([row for row in rows if row["seed"] in by_seed] for rows in (base, mine))
    target = statistics.mean(row["bits_per_byte"] for row in base)
    curve = {
        share: statistics.mean(found)
        for share in SHARES
        if (found := [row["bits_per_byte"] for row in mine if row["share"] == share])
    }
    base_s = statistics.mean(row["steps_s"] for row in base)
    seconds = {
        statistics.mean(r["steps_s"] for r in mine if r["share"] == share) / base_s: bits
        for share, bits in curve.items()
    }
    whole = len(curve) > 1
    share, outside = share_needed(curve, target) if whole else (None, None)
    time_frac, time_outside = share_needed(seconds, target) if len(seconds) > 1 else (None, None)
    return {
        "plain": round(target, 4),
        "plain_rate": rate_of(best),
        "plain_rate_at_edge": at_edge,
        "plain_tuning": {rate_of(row): round(row["bits_per_byte"], 4) for row in sorted(sweep, key=rate_of)},
        "ours": {share: round(bits, 4) for share, bits in curve.items()},
        "compute_frac": share and round(share, 3),
        "extrapolated": outside,
        "time_frac": time_frac and round(time_frac, 3),
        "time_extrapolated": time_outside,
        "step_s": {
            "plain": round(statistics.median(row["step_s"] for row in base), 4),
            "ours": round(statistics.median(row["step_s"] for row in mine), 4),
        },
        "optimizer_flops_frac": mine[0]["optimizer_flops_frac"],
        "by_seed": [round(found, 3) for found, _ in by_seed.values()],
        "by_seed_extrapolated": [beyond for _, beyond in by_seed.values()],
        "runs": {"plain": len(base), "ours": len(mine), "wanted": len(seeds) * (1 + len(SHARES))},
        "parameters": base[0]["parameters"],
        "plain_tokens": base[0]["tokens"],
    }


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder for downloads, the workspace and the runs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), help="these ablations")
    parser.add_argument("--size", choices=SIZES, default="1M", help="of the ablations")
    parser.add_argument("--tokens", type=int, help="of the plain recipe at full compute, at every size")
    parser.add_argument("--domains", nargs="+", choices=("aws", "kernel"))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, metavar="FILE", help="finished runs are kept here, not in the folder")
    parser.add_argument("--report", action="store_true", help="trains no further run: what there is is reported")
    options = parser.parse_args()
    if not (options.data or (options.report and options.results)):
        parser.error("--data FOLDER is wanted, or --report with --results FILE")
    data = options.data and options.data.resolve()
    short = options.quick or options.ablations
    domains = options.domains or (["aws"] if short else ["aws", "kernel"])
    found: dict[str, Row] = {domain: {} for domain in domains}
    if not options.report:
        found = corpora(data, domains, options.cpus)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    runs = Runs(options.results or data / "runs.jsonl", 0 if options.report else options.cpus, commit.stdout.strip())
    tokens = options.tokens or (QUICK_TOKENS if options.quick else None)
    common = {"precision": precision()} | ({"tokens": tokens} if tokens else {})
    last: Row = {
        "name": "recipe",
        **common,
        "versions": {name: metadata.version(name) for name in ("torch", "tokenizers", "botocore")},
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "commit": commit.stdout.strip(),
    }
    if options.ablations:
        print(json.dumps(last | ablations(runs, found, options, common)))
        return
    sizes, seeds = (["1M"], range(options.seeds or 2)) if options.quick else (list(SIZES), range(options.seeds or 3))
    made = {f"{d} {size}": pair(runs, found[d], d, size, seeds, common) for d in domains for size in sizes}
    pairs = {name: row for name, row in made.items() if row}
    for name, row in pairs.items():
        beyond = ", extrapolated" if row["extrapolated"] else ""
        say(f"{name}: {row['compute_frac']} of the compute{beyond}, {row['time_frac']} of the time")
        say(f"  by seed {row['by_seed']}; plain {row['plain']} bits per byte, ours {row['ours']}")
    complete = not runs.missing and len(pairs) == len(made)
    shares = [row["compute_frac"] for row in pairs.values() if row["compute_frac"]]
    value = max(shares, default=None)
    print(
        json.dumps(
            {
                **last,
                "value": value,
                "goal": GOAL_FRAC,
                "met": complete and value is not None and value <= GOAL_FRAC,
                "complete": complete,
                "extrapolated": [name for name, row in pairs.items() if row["extrapolated"]],
                "at_edge": [name for name, row in pairs.items() if row["plain_rate_at_edge"]],
                "ours": {name: row["ours"] for name, row in pairs.items()},
                "peers": {name: {"plain": row["plain"], "rates": row["plain_tuning"]} for name, row in pairs.items()},
                "spread": {name: row["by_seed"] for name, row in pairs.items()},
                "pairs": pairs,
                "commits": sorted(runs.commits),
            }
        )
    )


def ablations(runs: Runs, found: dict[str, Row], options: argparse.Namespace, common: Row) -> Row:
    """Each ingredient alone, at half of the plain recipe's compute."""
    wanted = [
        words(d, options.size, name, ABLATIONS[name], 0.5, seed, common) | corpus
        for name in options.only or ABLATIONS
        for d, corpus in found.items()
        for seed in range(options.seeds or 2)
    ]
    table: dict[str, list[float]] = {}
    step_s: dict[str, list[float]] = {}
    for row in runs.all(wanted):
        name = f"{row['domain']} {row['name']}"
        table.setdefault(name, []).append(round(row["bits_per_byte"], 4))
        step_s.setdefault(name, []).append(row["step_s"])
    for name, bits in table.items():
        say(f"{name:32} {statistics.mean(bits):.4f}  {bits}  {statistics.median(step_s[name]):.3f} s a step")
    times = {name: round(statistics.median(found), 4) for name, found in step_s.items()}
    return {"ablations": table, "step_s": times, "complete": not runs.missing, "commits": sorted(runs.commits)}


def precision() -> str:
    """What `forge pretrain` computes in on this machine."""
    from forge_ray.config import PretrainConfig
    from forge_ray.train.pretrain import precision_of

    return precision_of(PretrainConfig())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        print(json.dumps(train(json.loads(sys.argv[2]))))
    else:
        main()
