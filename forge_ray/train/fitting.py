"""How much of a slot is computed at once, so that it fits into memory: no run ends for want of it.

A slot is what the run is made of; its sequences may be computed some at a time, their gradients added up. The sum's
last bits depend on how many, so all workers of a run do alike (`compute.host_class`). On a GPU the real step is tried,
from the whole slot downwards; in CPU memory, where a try that fails ends the process, the arithmetic decides.

No test executes without a GPU: `_on_gpu`'s use of torch's figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import TrainError
from forge_ray.model.arithmetic import activation_bytes, state_bytes, sums_bytes
from forge_ray.telemetry import format_bytes

if TYPE_CHECKING:
    import torch

# Of the memory that is there: the rest is the library's, the allocator's waste, and the loader's.
_USABLE_FRAC = 0.9
_PROCESS_BYTES = 600 << 20


@dataclass(frozen=True)
class Fit:
    """How a slot is computed: so many sequences at a time, blocks recomputed in the backward pass or not."""

    at_once: int
    recompute: bool


def ways(config: PretrainConfig) -> Iterator[Fit]:
    """What may be tried, the fastest first: all at once, then fewer, then recomputing, as far as the user leaves it
    open."""
    counts = [config.at_once] if config.at_once else _divisors(config.micro_batch)
    recomputing = {"on": [True], "off": [False], "auto": [False, True]}[config.recompute]
    return (Fit(count, recompute) for recompute in recomputing for count in counts)


def choose(
    model: ModelConfig,
    config: PretrainConfig,
    vocab_size: int,
    precision: str,
    device: torch.device,
    attempt: Callable[[Fit], None],
) -> Fit:
    """The fastest way that fits.

    Args:
        precision: `bf16`, `fp32` or `fp8`; not `auto`.
        attempt: Takes a step's forward and backward pass in this way on the device; only called on a GPU.

    Raises:
        TrainError: None fits.
    """
    if config.sharding == "fsdp":  # shares the state out: its own arithmetic is the planner's
        return next(ways(config))
    if device.type == "cpu":
        free, needed = _share_of_memory(config), lambda fit: cpu_bytes(model, config, vocab_size, precision, fit)
        fitting = (fit for fit in ways(config) if needed(fit) <= free)
    else:
        free, needed = 0, lambda fit: 0
        fitting = (fit for fit in ways(config) if _on_gpu(fit, device, attempt))
    if found := next(fitting, None):
        return found
    least = min(needed(fit) for fit in ways(config))
    raise TrainError(
        "the model does not fit into memory, not even one sequence at a time",
        got=f"{format_bytes(free)} for this worker" if free else str(device),
        wanted=format_bytes(least) if least else "more memory",
        do="leave pretrain.at_once and pretrain.recompute to auto, shorten pretrain.seq_len, share the state out with "
        "pretrain.sharding fsdp, or take a smaller model (forge plan says which fits)",
    )


def cpu_bytes(model: ModelConfig, config: PretrainConfig, vocab_size: int, precision: str, fit: Fit) -> int:
    """What a worker needs, be there as few as there may: its process, the state, sums of slots, and activations."""
    exact = config.reduction == "exact"
    workers = config.min_workers if exact else config.max_workers
    sums = sums_bytes(model, vocab_size, config.slots, workers, exact=exact)
    state = state_bytes(model, vocab_size, muon=config.optimizer.kind == "muon", precision=precision)
    kept = activation_bytes(model, config.seq_len, fit.at_once, precision=precision, cpu=True, recompute=fit.recompute)
    return _PROCESS_BYTES + state + sums + kept


def _share_of_memory(config: PretrainConfig) -> int:
    """Of this machine or container, for one of the workers that its CPUs are enough for."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # no such limit
            continue
    workers = max(1, min(config.max_workers, (os.cpu_count() or 1) // config.cpus_per_worker))
    return int(_USABLE_FRAC * total / workers)


def _on_gpu(fit: Fit, device: torch.device, attempt: Callable[[Fit], None]) -> bool:
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        attempt(fit)
    except torch.OutOfMemoryError:
        return False
    taken = torch.cuda.max_memory_reserved(device)
    return bool(taken <= _USABLE_FRAC * torch.cuda.mem_get_info(device)[1])


def _divisors(count: int) -> list[int]:
    return [part for part in range(count, 0, -1) if count % part == 0]
