"""What both peers of `bench/chaos.py` train: our model, loss, data and schedule, and the line that they write per step.

A worker computes its share of the global batch in one forward and backward pass, as their users would; who has which
share is each peer's own business. SPEC (JSON): workspace, shards_ref, model, pretrain, precision, log (a folder),
workers, minutes.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forge_ray.artifact import Workspace
from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.data.loader import SlotLoader
from forge_ray.model.transformer import Transformer, document_mask
from forge_ray.train.loss import mean_loss
from forge_ray.train.optimizer import rate_frac

Spec = dict[str, Any]


class Loss(nn.Module):
    """The model with its loss, so that a wrapper such as DDP sees one forward pass."""

    def __init__(self, model: Transformer, end_token: int, bf16: bool) -> None:
        super().__init__()
        self.model, self.end_token, self.bf16 = model, end_token, bf16

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss in nats per token of sequences (B, T + 1)."""
        inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else nullcontext():
            hidden_BTD = self.model.hidden(inputs_BT, document_mask(inputs_BT, self.end_token))
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return mean_loss(hidden_BTD, self.model.head.weight, targets_BT, dtype)


class Workload:
    """Model, optimizer and data of one worker, before any step."""

    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(1)
        self.config = config = PretrainConfig(**spec["pretrain"])
        self.loader = SlotLoader.of(config, Workspace(spec["workspace"]).get(spec["shards_ref"]))
        index = self.loader.order.index
        model = Transformer(ModelConfig(**spec["model"]), index.vocab_size, config.seq_len).initialise(config.seed)
        self.loss = Loss(model, index.end_token, spec["precision"] == "bf16")
        adamw = config.optimizer
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": adamw.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=adamw.learning_rate,
            betas=(adamw.beta1, adamw.beta2),
            fused=True,
        )
        self._log = Path(spec["log"], f"{os.getpid()}.jsonl").open("a", buffering=1)  # noqa: SIM115 (its life is ours)

    def samples(self, step: int, slots: range) -> Tensor:
        """The sequences of these slots of a step."""
        return torch.from_numpy(np.concatenate([self.loader.slot(step, slot) for slot in slots]))

    def tokens(self, slots: int) -> int:
        """How many tokens so many slots train."""
        return slots * self.config.micro_batch * self.config.seq_len

    def prepare_step(self, step: int) -> None:
        """Clips the gradients and sets the rate of a step."""
        torch.nn.utils.clip_grad_norm_(self.loss.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * rate_frac(step, self.config)

    def log(self, event: str, **fields: Any) -> None:
        """Writes a line with the time."""
        self._log.write(json.dumps({"time_s": time.time(), "event": event, **fields}) + "\n")


def share(rank: int, world_size: int, slots: int) -> range:
    """A worker's slots: contiguous, and as even as the numbers allow."""
    return range(slots * rank // world_size, slots * (rank + 1) // world_size)
