"""The training loop: one step is forward and backward over the worker's slots, one sum over workers, one update.

Owns the order of things within a step and when a checkpoint is due. Knows nothing of Ray: a worker is (rank, world
size) and an initialised process group, so the same loop runs in a test, under Ray Train, or in a process of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from forge_ray.config import PretrainConfig
from forge_ray.data.loader import SlotLoader
from forge_ray.errors import TrainError
from forge_ray.model.transformer import Transformer, document_mask
from forge_ray.train.loss import mean_loss
from forge_ray.train.optimizer import Optimizer, rate_frac
from forge_ray.train.slots import FlatGradients, owned


@dataclass(frozen=True)
class StepRecord:
    """One finished step. Loss in nats per token; tokens of the global batch; rate as a share of the peak; `data_s` is
    the part of `wall_s` in which this worker got its samples."""

    step: int
    loss: float
    grad_norm: float
    rate_frac: float
    tokens: int
    wall_s: float
    world_size: int
    data_s: float

    def as_dict(self) -> dict[str, float | int]:
        """For an event."""
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass
class Worker:
    """What a worker holds between steps: everything that a checkpoint holds, and what it needs to compute."""

    config: PretrainConfig
    model: Transformer
    optimizer: Optimizer
    loader: SlotLoader
    end_token: int
    bf16: bool
    rank: int = 0
    world_size: int = 1
    step: int = 0

    def __post_init__(self) -> None:
        # Scalars summed with the gradients: the loss, and how many workers want a checkpoint now.
        self.gradients = FlatGradients(self.model, num_scalars=2)


def fit(worker: Worker, *, checkpoint_due: Callable[[], bool], on_step: Callable[[StepRecord, bool], None]) -> None:
    """Trains up to `config.steps`.

    Args:
        worker: State after `worker.step` finished steps; changed in place.
        checkpoint_due: Asked on rank 0 before each step; the answer reaches every worker with the gradients.
        on_step: Called on every worker after each step with the record and whether all of them save now.

    Raises:
        TrainError: The loss or the gradient is not finite.
    """
    while worker.step < worker.config.steps:
        last = worker.step + 1 == worker.config.steps
        record, due = step(worker, checkpoint_due() if worker.rank == 0 else False)
        on_step(record, due or last)


def step(worker: Worker, wants_checkpoint: bool) -> tuple[StepRecord, bool]:
    """One step: gradients of the owned slots, their sum over workers, the update; it commits on all or on none."""
    began = time.monotonic()
    config, gradients = worker.config, worker.gradients
    gradients.clear()
    data_s = 0.0
    for slot in owned(worker.rank, worker.world_size, config.slots):
        asked = time.monotonic()
        samples = torch.from_numpy(worker.loader.slot(worker.step, slot))
        data_s += time.monotonic() - asked
        gradients.scalars[0] += backward(worker, samples)
    gradients.scalars[1] = float(wants_checkpoint)
    gradients.sum_over_workers()
    loss, norm = float(gradients.scalars[0]), gradients.clip(config.grad_clip)
    if not torch.isfinite(torch.tensor([loss, norm])).all():
        raise TrainError(
            "the loss is not finite",
            got=f"loss {loss}, gradient norm {norm} at step {worker.step}",
            do="lower pretrain.optimizer.learning_rate, or set pretrain.precision to fp32",
        )
    rate = rate_frac(worker.step, config)
    worker.optimizer.step(rate)
    worker.step += 1
    tokens = config.slots * config.micro_batch * config.seq_len
    wall_s = time.monotonic() - began
    record = StepRecord(worker.step, loss, norm, rate, tokens, wall_s, worker.world_size, data_s)
    return record, bool(gradients.scalars[1] > 0)


def backward(worker: Worker, tokens: Tensor) -> float:
    """Adds a slot's share of the step's gradient; returns its share of the step's loss.

    Shapes: tokens (B, T + 1).
    """
    tokens = tokens.to(next(worker.model.parameters()).device)
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    with autocast(inputs_BT.device.type, worker.bf16):
        hidden_BTD = worker.model.hidden(inputs_BT, document_mask(inputs_BT, worker.end_token))
    dtype = torch.bfloat16 if worker.bf16 else torch.float32
    loss = mean_loss(hidden_BTD, worker.model.head.weight, targets_BT, dtype) / worker.config.slots
    loss.backward()
    return float(loss.detach())


def autocast(device_type: str, bf16: bool) -> contextlib.AbstractContextManager[None]:
    """bf16 matrix products over fp32 weights, or plain fp32."""
    return torch.autocast(device_type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
