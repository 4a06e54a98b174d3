"""How fast a training step is: ours beside Hugging Face, LitGPT, torchtitan, nanoGPT and nanochat, on the same machine
in the same minutes.

Every side is a process (or one for each worker) that takes a step when it is told to: forward, backward, clipping and
AdamW over the same number of tokens, products over fp32 weights in the precision that `forge pretrain` takes here: bf16
where the CPU multiplies it natively, else fp32. Ours is the step that `forge pretrain` takes, with its document
boundaries, exact sums and guardian. Peers run as their own recipes run them: Hugging Face, LitGPT and
torchtitan compute the same model (Qwen3), nanoGPT and nanochat their own shape at the same width and depth. Each is
tried compiled and not, with micro-batches of about 1,024 and 4,096 tokens, and its best setting counts.

What is compared is the rate of a model's floating-point operations, six for each weight of a matrix product and token
and those of attention without regard to its mask, as PaLM, nanoGPT and torchtitan count them (arXiv 2204.02311,
appendix B), so that another shape's smaller model is no advantage; for the same model that is tokens/s. `share_causal`
counts half of attention. `value` is ours over the best peer's, 1 worker, 10 M parameters, T = 512: the median of rounds
in which all take turns. One worker is timed in CPU seconds of its one thread, two by the clock. The peak that shares
are told of is the best of several matrix products in that precision, measured in each round.

    python bench/step.py --peer PYTHON --nanogpt FOLDER --nanochat FOLDER      all cells; about two hours
    python bench/step.py --quick ...                                           10 M, T = 512, 1 worker; 15 minutes

PYTHON has transformers, litgpt, torchtitan 0.2.2 (later ones train language models with kernels for GPUs only); the
folders are clones. A side that is not there is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOAL, GOAL_SHARE = 1.35, 0.75
OURS, PEERS = "ours", ("huggingface", "litgpt", "torchtitan", "nanogpt", "nanochat")
VOCAB, END, STEP_TOKENS, DOCUMENT_TOKENS, SEED = 4096, 3, 8192, 300, 0
DEPTHS = {"2M": 3, "10M": 6, "50M": 10}  # 2.0, 11.0 and 45.6 million parameters
TRIAL_STEPS, ROUNDS = 2, 7
_ANSWER_S = 1200
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One side as it is run. `micro` sequences are computed at a time."""

    side: str
    size: str
    seq_len: int
    workers: int
    compiled: bool
    micro: int


# ------------------------------------------------------------------------------------------------ a side's own process


def shape(size: str) -> Any:
    """What all sides compute, or come near to: the shape of our own dial, taken from there by who has it."""
    return json.loads(os.environ["BENCH_SHAPE"])[size]


def bf16() -> bool:
    """Whether all sides, and the peak, compute in bf16; the driver says."""
    return os.environ["BENCH_PRECISION"] == "bf16"


def texts(setting: Setting, rank: int) -> Any:
    """Random tokens of documents of some hundreds of tokens: sequences of a step for this worker, (N, T + 1)."""
    import numpy as np

    draw = np.random.default_rng(SEED + rank)
    found = draw.integers(END + 1, VOCAB, (STEP_TOKENS // setting.seq_len, setting.seq_len + 1))
    found[draw.random(found.shape) < 1 / DOCUMENT_TOKENS] = END
    return found


def ours(setting: Setting, rank: int, address: str) -> Callable[[], float]:
    """The step of `forge pretrain`."""
    sys.path.insert(0, str(ROOT))
    import torch.distributed as dist

    from forge_ray.config import AdamWConfig, ModelConfig, PretrainConfig
    from forge_ray.model.transformer import Transformer
    from forge_ray.train import loop
    from forge_ray.train.elastic import slots
    from forge_ray.train.elastic.group import Group
    from forge_ray.train.guardian import Guardian
    from forge_ray.train.optimizer import Optimizer

    each = STEP_TOKENS // setting.seq_len // setting.micro
    config = PretrainConfig(
        steps=1_000_000,
        slots=each * setting.workers,
        micro_batch=setting.micro,
        seq_len=setting.seq_len,
        max_workers=setting.workers,
        optimizer=AdamWConfig(kind="adamw"),
    )
    model = Transformer(ModelConfig(depth=DEPTHS[setting.size]), VOCAB, setting.seq_len).initialise(SEED)
    samples = texts(setting, rank)

    class Loader:
        def slot(self, _: int, slot: int) -> Any:
            first = slot % each * setting.micro
            return samples[first : first + setting.micro]

    worker = loop.Worker(
        config,
        model,
        Optimizer(model, config.optimizer),
        Loader(),
        END,
        bf16(),
        Guardian(config.guard),
        step=0,
        compiled=setting.compiled,
    )
    team = loop.Alone()
    if setting.workers > 1:
        host, _, port = address.rpartition(":")
        store = dist.TCPStore(host, int(port), is_master=rank == 0, world_size=setting.workers)
        team.group, team.rank = Group.form(store, rank, setting.workers, team.group.device, host), rank

    def step() -> float:
        assignment = slots.assign([()] * setting.workers, config.slots, exact=worker.sums.exact)
        verdict, record = loop.step(worker, team, assignment)
        assert verdict.action == "apply", verdict.reason
        return record.loss

    return step


def peer(setting: Setting, rank: int, address: str) -> Callable[[], float]:
    """The usual loop around a peer's model: autocast, fused AdamW, clipping, DDP for more than one worker."""
    import torch

    torch.manual_seed(SEED)
    model, loss_of = MODELS[setting.side](shape(setting.size), setting.seq_len)
    if setting.compiled and setting.side == "torchtitan":  # as its own `parallelize` does it: block by block
        for block in model.layers.values():
            block.compile()
    elif setting.compiled:
        model = torch.compile(model)
    if setting.workers > 1:
        host, _, port = address.rpartition(":")
        options = {"world_size": setting.workers, "rank": rank}
        torch.distributed.init_process_group("gloo", init_method=f"tcp://{host}:{port}", **options)
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = torch.from_numpy(texts(setting, rank))
    parts = rows.split(setting.micro)
    autocast = bf16() and setting.side != "nanochat"  # which casts by itself
    mixed = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else contextlib.nullcontext

    def step() -> float:
        total = 0.0
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with model.no_sync() if setting.workers > 1 and not last else contextlib.nullcontext():
                with mixed():
                    loss = loss_of(model, part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
                loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _huggingface(shape: Any, seq_len: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    # Its loss shifts the labels itself: given the inputs it predicts all of them but the first.
    return Qwen3ForCausalLM(config), lambda model, x, _: model(input_ids=x, labels=x).loss


def _litgpt(shape: Any, seq_len: int) -> Any:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config.from_name(
        "Qwen3-0.6B",
        block_size=seq_len,
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        n_embd=shape["d_model"],
        n_query_groups=shape["num_kv_heads"],
        head_size=shape["head_dim"],
        intermediate_size=shape["d_ff"],
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    return model, lambda model, x, y: chunked_cross_entropy(model(x), y)


def _torchtitan(shape: Any, seq_len: int) -> Any:
    import torch
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
    from torchtitan.models.qwen3.model.model import Qwen3Model

    arguments = Qwen3ModelArgs(
        dim=shape["d_model"],
        n_layers=shape["num_layers"],
        n_heads=shape["num_heads"],
        n_kv_heads=shape["num_kv_heads"],
        vocab_size=VOCAB,
        head_dim=shape["head_dim"],
        hidden_dim=shape["d_ff"],
        max_seq_len=seq_len,
        enable_weight_tying=True,
    )
    model = Qwen3Model(arguments)
    with torch.no_grad():
        model.init_weights()
    return model, lambda model, x, y: cross_entropy_loss(model(x), y) / y.numel()


def _nanogpt(shape: Any, seq_len: int) -> Any:
    sys.path.insert(0, os.environ["BENCH_NANOGPT"])
    from model import GPT, GPTConfig

    config = GPTConfig(seq_len, VOCAB, shape["num_layers"], shape["d_model"] // 64, shape["d_model"], 0.0, False)
    return GPT(config), lambda model, x, y: model(x, y)[1]


def _nanochat(shape: Any, seq_len: int) -> Any:
    os.environ["NANOCHAT_DTYPE"] = "bfloat16" if bf16() else "float32"
    sys.path.insert(0, os.environ["BENCH_NANOCHAT"])
    from nanochat.gpt import GPT, GPTConfig

    heads = shape["d_model"] // 64
    model = GPT(GPTConfig(seq_len, VOCAB, shape["num_layers"], heads, heads, shape["d_model"], "L"))
    model.init_weights()
    return model, lambda model, x, y: model(x, y)


MODELS: dict[str, Callable[[Any, int], Any]] = {
    "huggingface": _huggingface,
    "litgpt": _litgpt,
    "torchtitan": _torchtitan,
    "nanogpt": _nanogpt,
    "nanochat": _nanochat,
}


def flops_per_token(side: str, shape: Any, seq_len: int, *, causal: bool = False) -> float:
    """Operations of a token, forward and backward; `causal`: attention counted for the keys that it may see."""
    d, layers = shape["d_model"], shape["num_layers"]
    attention = shape["num_heads"] * shape["head_dim"]
    block = d * attention * 2 + 2 * d * shape["num_kv_heads"] * shape["head_dim"] + 3 * d * shape["d_ff"]
    if side in ("nanogpt", "nanochat"):
        attention, block = d, 12 * d * d
    return 6.0 * (layers * block + VOCAB * d) + (6.0 if causal else 12.0) * layers * attention * seq_len


def serve(words: list[str]) -> None:
    """A side's process: takes steps when a line asks for them, and says what they cost."""
    import torch

    torch.set_num_threads(1)
    setting, rank, address = Setting(**json.loads(words[0])), int(words[1]), words[2]
    if setting.side == "peak":
        step = peak()
    else:
        step = (ours if setting.side == OURS else peer)(setting, rank, address)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps({"wall_s": 0.0, "cpu_s": 0.0, "result": profile(step)}), flush=True)
            continue
        wall_s, cpu_s, loss = time.perf_counter(), time.process_time(), 0.0
        for _ in range(int(line)):
            loss = step()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "result": loss}), flush=True)


PARTS = {
    "products": ("aten::mm", "aten::addmm"),
    "attention's products": ("aten::bmm",),
    "fused by Inductor": ("graph_", "cpp_fused"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::_foreach_copy"),
    "optimizer and clipping": ("aten::_fused_adam", "aten::_foreach", "aten::linalg"),
}


def profile(step: Callable[[], float]) -> Row:
    """Shares of the time of a step, by kind of operation."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    whole = sum(times.values())
    shares = {
        part: sum(time_us for name, time_us in times.items() if name.startswith(starts)) / whole
        for part, starts in PARTS.items()
    }
    shares["the rest, each below"] = 1.0 - sum(shares.values())
    rest = {name: t / whole for name, t in times.items() if not name.startswith(tuple(sum(PARTS.values(), ())))}
    largest = sorted(rest, key=lambda name: -rest[name])[:6]
    return {name: round(share, 4) for name, share in (shares | {name: rest[name] for name in largest}).items()}


def peak() -> Callable[[], float]:
    """Products that fit the caches; gives the best rate, in operations per CPU second."""
    import torch

    dtype = torch.bfloat16 if bf16() else torch.float32
    shapes = ((512, 512, 2048), (1024, 1024, 1024), (1024, 512, 4096), (2048, 2048, 2048))
    pairs = [(torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)) for m, k, n in shapes]

    def rate(left: Any, right: Any) -> float:
        operations, began_s, count = 2.0 * left.shape[0] * left.shape[1] * right.shape[1], time.process_time(), 0
        while time.process_time() - began_s < 0.3:
            left @ right
            count += 1
        return count * operations / (time.process_time() - began_s)

    return lambda: max(rate(*pair) for pair in pairs)


# ------------------------------------------------------------------------------------------------------------- driving


class Side:
    """The processes of a setting."""

    def __init__(self, setting: Setting, python: str, *, profiled: bool = False) -> None:
        self.setting = setting
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        words = [python, __file__, "--serve", json.dumps(asdict(setting))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment |= {"TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE": "1"} if profiled else {}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._processes = [
            subprocess.Popen([*words, str(rank), address], env=environment, **pipes) for rank in range(setting.workers)
        ]
        self.said = self._answers()

    def profile(self) -> Row:
        """Where the time of a step goes, on the first worker."""
        return self._ask("profile")[0]["result"]

    def go(self, steps: int = 1) -> Row:
        """Takes steps: seconds of the clock and CPU seconds of all workers for each, and the last result."""
        found = self._ask(str(steps))
        return {
            "wall_s": max(row["wall_s"] for row in found) / steps,
            "cpu_s": sum(row["cpu_s"] for row in found) / steps,
            "result": found[0]["result"],
        }

    def _ask(self, line: str) -> list[Row]:
        for process in self._processes:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[Row]:
        answers = []
        for process in self._processes:
            while not (line := process.stdout.readline()).startswith("{"):  # libraries print too
                if not line:
                    process.wait(_ANSWER_S)
                    raise RuntimeError(process.stderr.read()[-1500:])
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.kill()
            process.wait()


def seconds(setting: Setting, found: Row) -> float:
    """What a step costs: of one worker CPU time, of two the clock's."""
    return float(found["cpu_s"] if setting.workers == 1 else found["wall_s"])


def best(setting: Setting, python: str) -> Side | None:
    """A side at its best setting: each is tried, and the fastest's processes are kept."""
    found: list[tuple[float, Side]] = []
    for compiled in (True, False):
        for micro in sorted({max(1, tokens // setting.seq_len) for tokens in (1024, 4096)}):
            tried = replace(setting, compiled=compiled, micro=micro)
            try:
                side = Side(tried, python)
                side.go(1)
                side.go(1)
                cost = min(seconds(tried, side.go(1)) for _ in range(TRIAL_STEPS))
            except RuntimeError as error:
                say(f"  {tried}: {str(error).strip().splitlines()[-1][:200]}")
                continue
            say(f"  {setting.side:12} compiled {compiled!s:5} micro {micro}: {STEP_TOKENS / cost:8,.0f} tokens/s")
            found.append((cost, side))
            for _, slower in sorted(found, key=lambda each: each[0])[1:]:
                slower.close()
            found = [min(found, key=lambda each: each[0])]
    return found[0][1] if found else None


def measure(size: str, seq_len: int, workers: int, pythons: dict[str, str], rounds: int) -> Row:
    """One cell: all sides in turns."""
    say(f"{size}, T = {seq_len}, {workers} worker(s)")
    shapes = shape(size)
    setting = Setting("", size, seq_len, workers, False, 1)
    sides = {name: best(replace(setting, side=name), python) for name, python in pythons.items()}
    sides = {name: side for name, side in sides.items() if side}
    limit = Side(replace(setting, side="peak", workers=1), pythons[OURS])
    rates: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[float]] = {name: [] for name in sides}
    peaks: list[float] = []
    draw = random.Random(SEED)
    for _ in range(rounds):
        peaks.append(limit.go()["result"])
        for name in draw.sample(sorted(sides), len(sides)):
            per_s = workers * STEP_TOKENS / seconds(sides[name].setting, sides[name].go())
            tokens[name].append(per_s)
            rates[name].append(per_s * flops_per_token(name, shapes, seq_len))
    for side in (*sides.values(), limit):
        side.close()
    profiled = Side(sides[OURS].setting, pythons[OURS], profiled=True)
    profiled.go(2)
    shares = profiled.profile()
    profiled.close()
    others = [name for name in sides if name != OURS]
    first = max(others, key=lambda name: statistics.median(rates[name])) if others else None
    ratios = [mine / theirs for mine, theirs in zip(rates[OURS], rates[first], strict=True)] if first else []
    row: Row = {
        "size": size,
        "seq_len": seq_len,
        "workers": workers,
        "peak_gflops": round(statistics.median(peaks) / 1e9, 1),
        "sides": {
            name: {
                "tokens_per_s": round(statistics.median(tokens[name])),
                "spread": [round(min(tokens[name])), round(max(tokens[name]))],
                "share_of_peak": round(
                    statistics.median(r / workers / p for r, p in zip(rates[name], peaks, strict=True)), 3
                ),
                "share_causal": round(
                    statistics.median(t / workers / p for t, p in zip(tokens[name], peaks, strict=True))
                    * flops_per_token(name, shapes, seq_len, causal=True),
                    3,
                ),
                "ours_over": round(statistics.median(a / b for a, b in zip(rates[OURS], rates[name], strict=True)), 3),
                "compiled": sides[name].setting.compiled,
                "micro_batch": sides[name].setting.micro,
            }
            for name in sides
        },
        "profile": shares,
        "best_peer": first,
        "ratio": round(statistics.median(ratios), 3) if ratios else None,
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None,
    }
    for name, found in row["sides"].items():
        say(
            f"  {name:12}{found['tokens_per_s']:9,} tokens/s  {found['share_of_peak']:6.3f} of peak"
            f"  ours is {found['ours_over']:.2f} times  (compiled {found['compiled']}, micro {found['micro_batch']})"
        )
    return row


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def cells(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """The goal's cell first."""
    found = [(size, length, n) for n in options.workers for size in options.sizes for length in options.lengths]
    yield from sorted(found, key=lambda cell: cell != ("10M", 512, 1))


def main() -> None:
    """Prints a table on stderr, then one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has transformers, litgpt and torchtitan")
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER")
    parser.add_argument("--nanochat", type=Path, metavar="FOLDER")
    parser.add_argument("--sides", nargs="+", choices=PEERS, help="default: those that are there")
    parser.add_argument("--sizes", nargs="+", choices=DEPTHS)
    parser.add_argument("--lengths", nargs="+", type=int, choices=(512, 2048))
    parser.add_argument("--workers", nargs="+", type=int, choices=(1, 2))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    options.sizes = options.sizes or (["10M"] if options.quick else ["10M", "2M", "50M"])
    options.lengths = options.lengths or ([512] if options.quick else [512, 2048])
    options.workers = options.workers or ([1] if options.quick else [1, 2])
    pythons = {OURS: sys.executable}
    if options.peer:
        pythons |= dict.fromkeys(("huggingface", "litgpt", "torchtitan"), options.peer)
    for name, folder in (("nanogpt", options.nanogpt), ("nanochat", options.nanochat)):
        if folder:
            os.environ[f"BENCH_{name.upper()}"] = str(folder.resolve())
            pythons[name] = options.peer or sys.executable
    pythons = {name: python for name, python in pythons.items() if not options.sides or name in (OURS, *options.sides)}

    sys.path.insert(0, str(ROOT))
    from forge_ray.config.train import PretrainConfig, shape_of
    from forge_ray.train.pretrain import precision_of

    os.environ["BENCH_PRECISION"] = precision_of(PretrainConfig())
    os.environ["BENCH_SHAPE"] = json.dumps({size: shape_of(depth) for size, depth in DEPTHS.items()})
    rows = [measure(*cell, pythons, options.rounds) for cell in cells(options)]
    goal = next((row for row in rows if (row["size"], row["seq_len"], row["workers"]) == ("10M", 512, 1)), None)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "name": "step",
                "precision": os.environ["BENCH_PRECISION"],
                "value": goal and goal["ratio"],
                "goal": GOAL,
                "met": bool(
                    goal
                    and goal["ratio"]
                    and goal["ratio"] >= GOAL
                    and goal["sides"][OURS]["share_of_peak"] >= GOAL_SHARE
                ),
                "ours": {f"{r['size']} T={r['seq_len']} x{r['workers']}": r["sides"][OURS] for r in rows},
                "peers": rows,
                "spread": goal and goal["ratio_spread"],
                "versions": versions(pythons),
                "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
                "commit": commit.stdout.strip(),
            }
        )
    )


def versions(pythons: dict[str, str]) -> Row:
    """What the sides' interpreters have."""
    ask = (
        "import json; from importlib.metadata import distributions as d; w = 'torch transformers litgpt torchtitan';"
        "print(json.dumps({x.name: x.version for x in d() if x.name in w.split()}))"
    )
    found: Row = {}
    for python in {pythons[OURS], *pythons.values()}:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
        found |= json.loads(done.stdout)
    for name in ("nanogpt", "nanochat"):
        folder = os.environ.get(f"BENCH_{name.upper()}")
        if folder:
            done = subprocess.run(
                ["git", "log", "-1", "--format=%h %cs"], cwd=folder, capture_output=True, text=True, check=False
            )
            found[name] = done.stdout.strip() or "no git"
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    else:
        main()
