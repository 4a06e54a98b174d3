"""Training under `kill -9`: ours, Ray Train's elastic mode and torchft, on the same model, data, machine and faults.

Each side trains on a private Ray cluster of one node for each worker, one thread each, all on this machine, while
workers are killed at seeded random times: one in every interval, the same times and the same draws for all sides.
Pieces without faults alternate with pieces with them, so that both rates come from the same minutes of the machine.
A piece with faults ends when all workers are back after its last kill, however long that takes.

    goodput   tokens/s committed in pieces with faults / tokens/s in pieces without, of one run
    stall     a kill to the next step that is done (a step that is computed again counts too, in favour of the peers)
    gap       the longest time between two steps from a kill to the next kill, or to the interval's end: it shows also
              what the return of a worker costs
    lost      steps computed again, or thrown away, as a share of the committed ones

What is killed: `compute` is the process that trains (for the peers: Ray's worker, which trains itself), `actor` the
Ray worker (ours holds nothing; the peers have no other), `node` a raylet and all that it started; another node comes
a third of the interval later; `head` the driver with all of Ray, head and agents, at once: `--supervise` starts it
again (ours only, once in a piece; `adopted` is the time from the kill until the next driver has found all workers).
For ours the SHA-256 of the final weights is compared with an undisturbed run's. `value` is the goodput of ours with 4
workers and a compute process killed every 30 s, median of the repeats.

Peers are set to what recovers soonest; `peers/ray_elastic.py` and `peers/torchft_recipe.py` say how. torchft trains
fewer samples while a worker is gone: only what it did train counts.

    python bench/chaos.py --peer PYTHON            all of it; about 5 hours
    python bench/chaos.py --peer PYTHON --quick    one run of a minute's faults each; about 10 minutes
    python bench/chaos.py --sides ours --kinds compute --every 30 --workers 4        a part of it
    python bench/chaos.py --results FILE ...       keeps each finished run in FILE, and does not repeat what is there

PYTHON is an interpreter with our packages and torchft:

    python -m venv peer
    peer/bin/pip install --no-deps -r requirements.lock
    peer/bin/pip install --no-deps torchft==0.2.0
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.integration import chaos  # noqa: E402

GOAL, GOAL_STALL_S = 0.97, 2.0
SEED, SLOTS, CALIBRATION_STEPS = 0, 8, 60
OURS, RAY, TORCHFT = "ours", "ray", "torchft"
HEAD = "head"
START_S, LONGEST_STEP_S, ENDLESS = 240.0, 5.0, 1_000_000
Row = dict[str, Any]

SERVICES = ("ec2", "glue", "iam", "lambda", "quicksight", "rds", "redshift", "s3", "sagemaker", "sns", "ssm", "wafv2")
INGEST = {"sources": [{"kind": "botocore", "services": SERVICES}], "held_out_frac": 0.0, "held_out_groups": ["sns"]}
TOKENIZER = {"vocab_size": 4096, "sample_bytes": 4_000_000}
MODEL = {"num_layers": 4, "d_model": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "d_ff": 640}
# One rate from the first step to the last, so that a run's loss at a step does not depend on how many it has.
PRETRAIN: Row = {
    "slots": SLOTS,
    "micro_batch": 1,
    "seq_len": 256,
    "optimizer": {"kind": "adamw", "learning_rate": 0.001},
    "warmup_frac": 0.0,
    "decay_frac": 0.0,
    "seed": SEED,
    "compile": "off",  # as the peers: what is measured is recovery
    "min_workers": 1,
}
# Young's interval for Ray Train, which goes back to its checkpoint after every death; torchft does so only when all of
# its workers are gone. Ours go to disk at their default interval.
PEER_CHECKPOINT_S = {RAY: 4.0, TORCHFT: 15.0}
# A node that dies without a word is found after 3 s and not after 30; the same for all sides.
CLUSTER = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Size:
    """Seconds of a piece without and with faults, and how many pairs of them a run has.

    Peers have longer pieces without: they are still coming back when one begins.
    """

    quiet_s: float
    quiet_peers_s: float
    faults_s: float
    pairs: int
    pairs_else: int
    repeats: int
    warm_s: float

    def quiet(self, side: str) -> float:
        """Seconds of a side's piece without faults."""
        return self.quiet_s if side == OURS else self.quiet_peers_s

    def whole(self, cell: Cell) -> float:
        """Seconds of all pieces of a run but the last."""
        return cell.pairs * (self.quiet(cell.side) + self.faults_s)


# 10 minutes of faults where 4 workers of ours lose compute processes, 5 for the others.
FULL = Size(quiet_s=25, quiet_peers_s=50, faults_s=100, pairs=6, pairs_else=3, repeats=3, warm_s=15)
QUICK = Size(quiet_s=20, quiet_peers_s=20, faults_s=60, pairs=1, pairs_else=1, repeats=1, warm_s=8)


@dataclass(frozen=True)
class Cell:
    """What one run measures."""

    side: str
    workers: int
    kind: str
    every_s: int
    pairs: int
    repeat: int = 0


@dataclass(frozen=True)
class Fault:
    """When, in seconds from the begin of the measurement, and which of the candidates, as a share of their number."""

    at_s: float
    draw: float


def schedule(cell: Cell, size: Size) -> list[Fault]:
    """One fault at a random time in each interval of the pieces with faults; the same for every side."""
    draw = random.Random(f"{SEED}/{cell.every_s}/{cell.repeat}")
    faults = []
    for pair in range(cell.pairs):
        begin_s = pair * (size.quiet(cell.side) + size.faults_s) + size.quiet(cell.side)
        for number in range(int(size.faults_s // cell.every_s)):
            faults.append(Fault(begin_s + (number + draw.random()) * cell.every_s, draw.random()))
    return faults


# ----------------------------------------------------------------------------------------------------------- the sides


class Side:
    """A driver of one side on a cluster, and the steps that it has done so far."""

    processes = {"compute": chaos.AGENT, "actor": chaos.AGENT}

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.folder = folder
        self.driver = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=(folder / "out.txt").open("w"),
            stderr=(folder / "err.txt").open("w"),
            start_new_session=True,
        )

    def rows(self) -> list[Row]:
        """Events `step` (step, time_s, loss, tokens, world_size, group) and `aborted`, in the order of time."""
        raise NotImplementedError

    def result(self) -> Row:
        """What only this side tells of a run that has ended."""
        return {}

    def stop(self) -> None:
        """Ends the driver."""
        with suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()

    def tail(self) -> str:
        """What the driver said last."""
        return (self.folder / "err.txt").read_text()[-3000:]


class Ours(Side):
    """`forge pretrain` through its command line."""

    processes = {"compute": chaos.COMPUTE, "actor": chaos.AGENT}

    def __init__(self, bench: Bench, nodes: chaos.Nodes, cell: Cell, steps: int, folder: Path) -> None:
        self.workspace = folder / "workspace"
        shutil.copytree(bench.workspace, self.workspace)
        self.known = {path.name for path in (self.workspace / "runs").glob("*")}
        self.environment = dict(nodes.environment)
        words = [f"--pretrain.max_workers={cell.workers}", f"--pretrain.steps={steps}", "--pretrain.max_failures=-1"]
        if cell.kind == HEAD:
            del self.environment["RAY_ADDRESS"]
            words += ["--supervise", "--ray.address=local", "--ray.dashboard=false", f"--ray.num_cpus={cell.workers}"]
        else:
            words.append(f"--ray.address={nodes.address}")
        command = [*bench.forge, "pretrain", str(bench.job), "--json", *words, f"--workspace={self.workspace}"]
        super().__init__(command, self.environment, folder)

    def events(self) -> list[Row]:
        """Of the run."""
        from forge_ray.events import Events
        from forge_ray.storage import Storage

        runs = [path.name for path in (self.workspace / "runs").glob("*") if path.name not in self.known]
        return [row for run in runs for row in Events.read(Storage(str(self.workspace)), run)]

    def rows(self) -> list[Row]:
        """From the run's events."""
        return _once(self.events())

    def result(self) -> Row:
        """Digest of the final weights, and how often a worker was said to hang, which none did."""
        from forge_ray.artifact import Workspace

        if self.driver.poll() != 0:
            raise SystemExit(
                f"forge pretrain should have ended by now, its exit code is {self.driver.poll()}:\n{self.tail()}"
            )
        ref = json.loads((self.folder / "out.txt").read_text())["stages"]["pretrain"]["ref"]
        weights = Workspace(str(self.workspace)).get(ref).local_path("model.safetensors")
        events = self.events()
        return {
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "recomputed_s": sum(row["recomputed_s"] for row in _once(events)),
            "false_alarms": sum(row["event"] == "seat" and row["what"] == "hang" for row in events),
            "came_s": sorted(row["time_s"] for row in events if row["event"] == "seat" and row["what"] == "came"),
        }


def _once(events: list[Row]) -> list[Row]:
    """Events of steps, each that was done once, in the order of time.

    What a worker had not published when it was killed, another one writes later, with the time at which it was done,
    and marks with `again`.
    """
    steps = [event for event in events if event["event"] == "step"]
    first = {(row["generation"], row["step"]) for row in steps if "again" not in row}
    late = {(row["generation"], row["step"]): row for row in steps if "again" in row}
    rows = [row for row in steps if "again" not in row] + [row for key, row in late.items() if key not in first]
    return sorted(rows, key=lambda row: row["time_s"])


class Peer(Side):
    """A script of `peers/`, whose workers write a line for each step."""

    def __init__(self, bench: Bench, nodes: chaos.Nodes, cell: Cell, steps: int, folder: Path) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir()
        python, script = (sys.executable, "ray_elastic.py") if cell.side == RAY else (bench.peer, "torchft_recipe.py")
        spec = {
            "workspace": str(bench.workspace),
            "shards_ref": bench.shards_ref,
            "model": MODEL,
            "pretrain": PRETRAIN | {"steps": ENDLESS, "max_workers": cell.workers},
            "precision": bench.precision,
            "workers": cell.workers,
            "checkpoint_every_steps": max(1, round(PEER_CHECKPOINT_S[cell.side] / bench.step_s)),
            "log": str(self.logs),
            "storage": str(folder / "storage"),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        words = [str(python), str(ROOT / "bench" / "peers" / script), str(folder / "spec.json")]
        super().__init__(words, nodes.environment, folder)

    def rows(self) -> list[Row]:
        """Steps of all workers as one: the first to say so counts, the loss is their mean."""
        lines: list[Row] = []
        for path in self.logs.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # a line that its writer did not survive
                    lines.append(json.loads(line))
        steps: dict[tuple[str, int], list[Row]] = {}
        for line in sorted(lines, key=lambda line: line["time_s"]):
            if line["event"] == "step":
                steps.setdefault((line["group"], line["step"]), []).append(line)
        rows = [{**found[0], "loss": statistics.fmean(row["loss"] for row in found)} for found in steps.values()]
        return sorted([*rows, *(row for row in lines if row["event"] != "step")], key=lambda row: row["time_s"])


# ------------------------------------------------------------------------------------------------------ a run of a cell


class Bench:
    """The data that all sides train on, and runs on it."""

    def __init__(self, folder: Path, size: Size, peer: str | None, *, keep: bool) -> None:
        self.folder, self.size, self.peer, self.keep = folder, size, peer, keep
        self.workspace, self.job = folder / "workspace", folder / "job.yaml"
        # JSON is YAML.
        self.job.write_text(
            json.dumps({"ingest": INGEST, "tokenizer": TOKENIZER, "model": MODEL, "pretrain": PRETRAIN})
        )
        self.forge = [sys.executable, "-m", "forge_ray.cli"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FORGE_", "RAY_"))}
        self.environment = {**kept, "PYTHONPATH": str(ROOT), **CLUSTER}
        self.step_s = 0.5
        self.precision, self.shards_ref = "fp32", ""
        self.number = 0

    def prepare(self) -> None:
        """Documents, vocabulary and shards, by our own stages."""
        from forge_ray.config import PretrainConfig
        from forge_ray.train import pretrain

        command = [*self.forge, "tokenize", str(self.job), "--json", f"--workspace={self.workspace}"]
        command += ["--ray.address=local", "--ray.dashboard=false"]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        self.shards_ref = json.loads(done.stdout)["stages"]["tokenize"]["ref"]
        self.precision = pretrain.precision_of(PretrainConfig(**PRETRAIN, max_workers=SLOTS))

    @contextmanager
    def running(self, cell: Cell, steps: int) -> Iterator[tuple[chaos.Nodes, Side]]:
        """A side on a fresh cluster; both end with the block."""
        short = chaos.short_folder()
        while (folder := self.folder / f"run-{self.number}").exists():  # kept by an earlier call
            self.number += 1
        folder.mkdir()
        python = str(self.peer) if cell.side == TORCHFT else sys.executable
        try:
            # torchft's lighthouse takes a CPU beside Ray Train's controller.
            with chaos.Nodes(short, self.environment, python, head_cpus=int(cell.side == TORCHFT)) as nodes:
                for node in range(1, cell.workers + 1) if cell.kind != HEAD else ():
                    nodes.add(node)
                side = (Ours if cell.side == OURS else Peer)(self, nodes, cell, steps, folder)
                try:
                    yield nodes, side
                finally:
                    side.stop()
        finally:
            chaos.remove_folder(short)
            if not self.keep:
                shutil.rmtree(folder, ignore_errors=True)

    def undisturbed(self, workers: int, steps: int) -> Row:
        """Ours without faults: seconds of a step, loss by step, digest of the final weights."""
        with self.running(Cell(OURS, workers, "none", 0, 0), steps) as (_, side):
            _wait(side, START_S + LONGEST_STEP_S * steps, lambda: False)
            found, rows = side.result(), side.rows()
        tail = rows[len(rows) // 3 :]
        found["step_s"] = (tail[-1]["time_s"] - tail[0]["time_s"]) / (len(tail) - 1)
        return found | {"loss": _losses(rows)}

    def disturbed(self, cell: Cell, steps: int) -> Row:
        """A run with faults, and what became of it."""
        with self.running(cell, steps) as (nodes, side):
            begin_s = _wait_until_warm(side, cell.workers, self.size.warm_s)
            kills = _disturb(nodes, side, cell, begin_s, schedule(cell, self.size))
            # As long again as a piece without faults, to come back from the last ones.
            end_s = begin_s + self.size.whole(cell) + self.size.quiet(cell.side)
            if cell.side == OURS:  # to its last step, for the weights
                end_s += LONGEST_STEP_S * steps
            _wait(side, end_s - time.time(), lambda: False)
            found, rows = side.result(), side.rows()
        measured = (begin_s, rows[-1]["time_s"] if cell.side == OURS else end_s)
        if cell.kind == HEAD:
            hits_s = [kill["time_s"] for kill in kills]
            found["adopted_s"] = [
                round([at for at in found["came_s"] if at > hit][cell.workers - 1] - hit, 3) for hit in hits_s
            ]
        return found | analyse(rows, kills, measured, cell, self.size) | {"kills": kills} | asdict(cell)


def _wait_until_warm(side: Side, workers: int, warm_s: float) -> float:
    """Waits for a step of all workers and `warm_s` more; gives the time."""

    def full() -> bool:
        return any(row["event"] == "step" and row["world_size"] == workers for row in side.rows())

    _wait(side, START_S, full)
    if not full():
        raise SystemExit(f"no step of {workers} workers within {START_S:.0f} s:\n{side.tail()}")
    _wait(side, warm_s, lambda: False)
    return time.time()


def _wait(side: Side, limit_s: float, done: Callable[[], bool]) -> None:
    """Waits for something while the driver lives; after the limit in vain."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s and side.driver.poll() is None and not done():
        time.sleep(min(0.5, max(0.0, deadline_s - time.monotonic())))


def _disturb(nodes: chaos.Nodes, side: Side, cell: Cell, begin_s: float, faults: list[Fault]) -> list[Row]:
    """Kills at the faults' times; gives what was killed when. Nodes come back meanwhile."""
    todo = [(fault.at_s, number, "kill", fault.draw) for number, fault in enumerate(faults)]
    kills: list[Row] = []
    fresh = itertools.count(cell.workers + 1)
    while todo:
        at_s, number, what, draw = heapq.heappop(todo)
        _wait(side, begin_s + at_s - time.time(), lambda: False)
        if side.driver.poll() is not None:
            break
        if what == "node comes":
            nodes.add(int(draw))
            continue
        if cell.kind == HEAD:
            kills.append({"time_s": time.time()})
            for process in psutil.Process(side.driver.pid).children(recursive=True):
                chaos.kill(process.pid)
            continue
        role = side.processes.get(cell.kind)
        candidates: list[Any] = nodes.nodes if cell.kind == "node" else nodes.processes(role)
        if not candidates:  # all are being replaced: there is nothing to kill, which is in favour of this side
            kills.append({"time_s": time.time(), "missed": True})
            continue
        victim = sorted(candidates, key=lambda found: getattr(found, "node", found))[int(draw * len(candidates))]
        kills.append({"time_s": time.time(), "node": getattr(victim, "node", victim)})
        if cell.kind == "node":
            nodes.kill(victim)
            heapq.heappush(todo, (at_s + cell.every_s / 3, number, "node comes", next(fresh)))
        else:
            chaos.kill(victim.pid)
    return kills


# ----------------------------------------------------------------------------------------------- what became of it


def analyse(rows: list[Row], kills: list[Row], measured: tuple[float, float], cell: Cell, size: Size) -> Row:
    """Rates, stalls and losses of a run from its steps and kills; see this file's docstring.

    What had not come back when the measurement ended counts as if it had then.
    """
    begin_s, end_s = measured
    hits_s = [kill["time_s"] for kill in kills if "missed" not in kill and kill["time_s"] < end_s]
    done = sorted((row for row in rows if row["event"] == "step"), key=lambda row: row["time_s"])
    committed, again, newest = [], 0, 0
    for row in done:
        if row["step"] > newest:
            committed.append(row)
            newest = row["step"]
        else:
            again += 1
    aborted = sum(row["event"] == "aborted" for row in rows) / cell.workers
    back_s = _until_full(committed, hits_s, end_s, cell.workers)
    hits = [(hit, hit + back) for hit, back in zip(hits_s, back_s)]
    quiet, faults = _pieces(hits, measured, cell, size)
    whole = [row for row in committed if row["time_s"] >= begin_s]
    full_tokens = max(row["tokens"] for row in committed)
    rates = {name: _rate(committed, pieces) for name, pieces in (("quiet", quiet), ("faults", faults))}
    return {
        "goodput": rates["faults"] / rates["quiet"] if rates["quiet"] else None,
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "stalls_s": _stalls(done, hits_s, end_s),
        "gaps_s": _gaps(done, hits_s, end_s, cell.every_s),
        "back_s": [round(back, 3) for back in back_s],
        "lost_steps": again + round(aborted, 2),
        "lost_frac": (again + aborted) / len(committed),
        "untrained_frac": 1 - sum(row["tokens"] for row in whole) / (full_tokens * max(1, len(whole))),
        "steps": newest,
        "loss": _losses(committed),
        "missed_kills": sum("missed" in kill for kill in kills),
    }


def _losses(rows: list[Row]) -> dict[str, float]:
    """By step, whose number is a text, as in JSON."""
    return {str(row["step"]): round(row["loss"], 4) for row in rows}


def _loss_at(run: Row, step: int) -> float | None:
    """Mean over the last 20 steps up to this one, of those that are on record."""
    last = [run["loss"][key] for key in map(str, range(step - 19, step + 1)) if key in run["loss"]]
    return statistics.fmean(last) if last else None


def _pieces(hits: list[tuple[float, float]], measured: tuple[float, float], cell: Cell, size: Size) -> tuple[Any, Any]:
    """Pieces without and with faults as (from, to); one with faults ends when all workers are back, or the next begins.

    Args:
        hits: When each kill was, and when all workers were back.
    """
    from_s, end_s = measured
    quiet_s, quiet, faults = size.quiet(cell.side), [], []
    for pair in range(cell.pairs):
        to_s = measured[0] + pair * (quiet_s + size.faults_s) + quiet_s
        over_s = to_s + size.faults_s
        back_s = max((back for hit, back in hits if to_s <= hit < over_s), default=over_s)
        quiet.append((from_s, min(to_s, end_s)))
        from_s = min(max(over_s, back_s), over_s + quiet_s)
        faults.append((to_s, min(from_s, end_s)))
    quiet.append((from_s, end_s))
    return [piece for piece in quiet if piece[1] > piece[0]], [piece for piece in faults if piece[1] > piece[0]]


def _until_full(committed: list[Row], hits_s: list[float], end_s: float, workers: int) -> list[float]:
    """For each kill the seconds until the first of five steps in a row with all workers."""
    found = []
    for hit_s in hits_s:
        after = [row for row in committed if row["time_s"] > hit_s]
        fives = zip(*(after[shift:] for shift in range(5)))
        times = (five[0]["time_s"] for five in fives if all(row["world_size"] == workers for row in five))
        found.append(next(times, end_s) - hit_s)
    return found


def _rate(committed: list[Row], pieces: list[tuple[float, float]]) -> float:
    """Tokens per second in pieces of time."""
    tokens = sum(row["tokens"] for row in committed for begin, end in pieces if begin < row["time_s"] <= end)
    return tokens / max(1e-9, sum(end - begin for begin, end in pieces))


def _stalls(done: list[Row], hits_s: list[float], end_s: float) -> list[float]:
    """Seconds from each kill to the next step."""
    times = [row["time_s"] for row in done]
    return [round(min((at for at in times if at > hit), default=end_s) - hit, 3) for hit in hits_s]


def _gaps(done: list[Row], hits_s: list[float], end_s: float, every_s: float) -> list[float]:
    """The longest time between two steps from each kill on, up to the next kill or the end of the interval."""
    times = [row["time_s"] for row in done]
    found = []
    for hit, following in zip(hits_s, [*hits_s[1:], float("inf")]):
        upto = min(following, hit + every_s)
        before = max((at for at in times if at <= hit), default=hit)
        after = min((at for at in times if at > upto), default=end_s)
        marks = [before, *(at for at in times if hit < at <= upto), after]
        found.append(round(max(late - early for early, late in itertools.pairwise(marks)), 3))
    return found


# -------------------------------------------------------------------------------------------------------------- report


def quantile(values: list[float], share: float) -> float:
    """The smallest value that is not exceeded by this share of them."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else float("nan")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 4) if known else None


def summary(runs: list[Row]) -> Row:
    """Several runs of one cell as one."""
    stalls, gaps, back = ([value for run in runs for value in run[key]] for key in ("stalls_s", "gaps_s", "back_s"))
    goodputs = [run["goodput"] for run in runs if run["goodput"] is not None]
    found = {
        "repeats": len(runs),
        "goodput": round(statistics.median(goodputs), 4) if goodputs else None,
        "goodput_spread": [round(min(goodputs), 4), round(max(goodputs), 4)] if goodputs else None,
        "kills": len(stalls),
        "missed_kills": sum(run["missed_kills"] for run in runs),
        "stall_p50_s": round(quantile(stalls, 0.5), 3),
        "stall_p95_s": round(quantile(stalls, 0.95), 3),
        "gap_p50_s": round(quantile(gaps, 0.5), 3),
        "gap_p95_s": round(quantile(gaps, 0.95), 3),
        "back_p50_s": round(quantile(back, 0.5), 2),
        "lost_steps": round(sum(run["lost_steps"] for run in runs), 2),
        "lost_frac": round(statistics.fmean(run["lost_frac"] for run in runs), 5),
        "untrained_frac": round(statistics.fmean(run["untrained_frac"] for run in runs), 5),
        "tokens_per_s": [run["tokens_per_s"] for run in runs],
        "steps": [run["steps"] for run in runs],
        "final_loss": _mean([run["final_loss"] for run in runs]),
        "loss_at_step": [run["loss_at_step"] for run in runs],
    }
    if "adopted_s" in runs[0]:
        found["adopted_s"] = [run["adopted_s"] for run in runs]
    if "loss_undisturbed" in runs[0]:
        found["loss_undisturbed"] = _mean([run["loss_undisturbed"] for run in runs])
    if "sha256" in runs[0]:
        found["recomputed_s"] = round(sum(run["recomputed_s"] for run in runs), 3)
        found["false_alarms"] = sum(run["false_alarms"] for run in runs)
        found["sha256"] = sorted({run["sha256"] for run in runs})
        found["sha256_undisturbed"] = sorted({run["sha256_undisturbed"] for run in runs})
        found["same_weights"] = found["sha256"] == found["sha256_undisturbed"]
    return found


def name_of(run: Row) -> str:
    """`4 workers, compute every 30 s`."""
    return f"{run['workers']} workers, {run['kind']} every {run['every_s']} s"


def table(by_side: dict[str, dict[str, Row]]) -> None:
    """For people, on stderr."""
    columns = ("goodput", "kills", "stall_p50_s", "stall_p95_s", "gap_p95_s", "back_p50_s", "lost_steps", "final_loss")
    columns += ("loss_undisturbed", "same_weights")
    say(f"\n{'':42}" + "".join(f"{column:>17}" for column in columns))
    for side, cells in by_side.items():
        for name, found in cells.items():
            say(f"{side:8}{name:34}" + "".join(f"{found.get(column, '')!s:>17}" for column in columns))


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def report(runs: list[Row], size: Size, versions: dict[str, str]) -> Row:
    """Prints the table, gives the last line."""
    by_side: dict[str, dict[str, list[Row]]] = {}
    for run in runs:
        by_side.setdefault(run["side"], {}).setdefault(name_of(run), []).append(run)
    found = {side: {name: summary(every) for name, every in cells.items()} for side, cells in by_side.items()}
    table(found)
    ours = found.pop(OURS, {})
    goal = ours.get("4 workers, compute every 30 s")
    met = goal is not None and goal["goodput"] >= GOAL and goal["stall_p95_s"] < GOAL_STALL_S
    met = met and not goal["lost_steps"] and goal["same_weights"] and goal["repeats"] >= size.repeats
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "name": "chaos",
        "value": goal and goal["goodput"],
        "goal": GOAL,
        "met": met,
        "ours": ours,
        "peers": found,
        "spread": goal and goal["goodput_spread"],
        "size": asdict(size),
        "seed": SEED,
        "versions": {name: metadata.version(name) for name in ("ray", "torch", "numpy")} | versions,
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "commit": commit.stdout.strip(),
    }


# ---------------------------------------------------------------------------------------------------------------- plan


def cells(options: argparse.Namespace, size: Size) -> list[Cell]:
    """What is measured, in this order: the goal's figure first, then sides in turn."""
    found = []
    for workers in options.workers:
        for kind in options.kinds:
            for every_s in options.every:
                if workers == 2 and kind in ("actor", HEAD):
                    continue
                if kind == HEAD:  # once in a piece: the next driver needs a while
                    if OURS in options.sides and every_s == options.every[0]:
                        found.append(Cell(OURS, workers, kind, int(size.faults_s), size.pairs_else))
                    continue
                for side in options.sides:
                    if side == OURS and (workers, kind) == (4, "compute"):
                        found += [Cell(side, workers, kind, every_s, size.pairs, n) for n in range(size.repeats)]
                    elif side == OURS or kind != "actor":
                        found.append(Cell(side, workers, kind, every_s, size.pairs_else))
    return found


class Finished:
    """Runs that are kept in a file, a JSON line each."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._rows: Row = dict(json.loads(line) for line in lines)

    def get(self, key: str, measure: Callable[[], Row]) -> Row:
        """What is kept under the key, or is measured now and kept."""
        if key not in self._rows:
            self._rows[key] = measure()
            if self._path:
                with self._path.open("a") as sink:
                    sink.write(json.dumps([key, self._rows[key]]) + "\n")
        found: Row = self._rows[key]
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._rows


def measure(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Runs every cell, and ours undisturbed for each number of steps that cells of ours have.

    Peers may get further than ours: losses are compared at the last step that both have done.
    """
    size, finished, runs = bench.size, Finished(options.results), []
    longest: Row = {}
    name = "quick" if options.quick else "full"
    # Another state of our code may have other bits.
    words = ["git", "rev-parse", "--short", "HEAD:forge_ray"]
    tree = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    with_ours = OURS in options.sides
    if with_ours:
        kept = finished.get(f"{name} calibration {tree}", partial(bench.undisturbed, 4, CALIBRATION_STEPS))
        bench.step_s = kept["step_s"]
        say(f"a step of ours takes {bench.step_s:.3f} s")
    for cell in cells(options, size):
        steps = round(1.05 * (size.warm_s + size.whole(cell)) / bench.step_s)
        key = f"{name} {cell}{f' {tree}' * (cell.side == OURS)}"
        if options.report and key not in finished:
            continue
        if cell.side == OURS:
            reference = finished.get(f"{name} undisturbed {steps} {tree}", partial(bench.undisturbed, 4, steps))
            longest = max(longest, reference, key=lambda found: len(found.get("loss", ())))
        run = finished.get(key, partial(bench.disturbed, cell, steps))
        upto = min(run["steps"], max(map(int, longest["loss"]))) if longest else run["steps"]
        run |= {"loss_at_step": upto, "final_loss": _loss_at(run, upto)}
        if longest:
            run["loss_undisturbed"] = _loss_at(longest, upto)
        if "sha256" in run:
            run["sha256_undisturbed"] = reference["sha256"]
        found = summary([run])
        say(f"{cell.side:8} {name_of(run)}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
        runs.append(run)
    return runs


def main() -> None:
    """Prints a table on stderr, then one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has torchft")
    parser.add_argument("--sides", nargs="+", choices=(OURS, RAY, TORCHFT), help="default: all, torchft with --peer")
    parser.add_argument("--kinds", nargs="+", choices=("compute", "actor", "node", HEAD))
    parser.add_argument("--every", nargs="+", type=int, metavar="SECONDS", help="default: 30 10")
    parser.add_argument("--workers", nargs="+", type=int, choices=(2, 4), help="default: 4 2")
    parser.add_argument("--results", type=Path, metavar="FILE", help="finished runs are kept here")
    parser.add_argument("--report", action="store_true", help="measures no further run: what FILE has is reported")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="logs and workspaces of the runs are kept here")
    options = parser.parse_args()
    if options.report and not options.results:
        parser.error("--report wants --results FILE")
    options.sides = options.sides or [OURS, RAY, *([TORCHFT] if options.peer else [])]
    options.kinds = options.kinds or (["compute"] if options.quick else ["compute", "actor", "node", HEAD])
    options.every = options.every or ([30] if options.quick else [30, 10])
    options.workers = options.workers or ([4] if options.quick else [4, 2])
    if TORCHFT in options.sides and not options.peer:
        parser.error("torchft wants --peer PYTHON")
    versions = {}
    if TORCHFT in options.sides:
        ask = "from importlib.metadata import version; print(version('torchft'))"
        done = subprocess.run([options.peer, "-c", ask], capture_output=True, text=True, check=True)
        versions["torchft"] = done.stdout.strip()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing that was started stays behind
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(exist_ok=True)
        size = QUICK if options.quick else FULL
        bench = Bench(folder, size, options.peer, keep=options.keep is not None)
        if not options.report:
            bench.prepare()
        last = report(measure(bench, options), size, versions)
    print(json.dumps(last))


if __name__ == "__main__":
    main()
