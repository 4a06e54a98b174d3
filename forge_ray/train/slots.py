"""Who computes which slots, and how their gradients become one sum.

A step is a fixed number of slots, whatever the number of workers; a worker owns a contiguous run of them. Gradients
live in one flat fp32 buffer, so that the sum over workers is one collective call.

This is fast mode: the communication library chooses the order of the sum, so bits may depend on the number of workers.
The aligned binary tree of exact mode belongs here too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def owned(rank: int, world_size: int, slots: int) -> range:
    """The slots of a worker: contiguous, and as even as the numbers allow."""
    return range(slots * rank // world_size, slots * (rank + 1) // world_size)


class FlatGradients:
    """One fp32 buffer behind every parameter's `.grad`, with a tail of scalars that are summed along.

    Args:
        model: Its parameters' gradients become views of the buffer.
        num_scalars: Length of the tail.
    """

    def __init__(self, model: nn.Module, num_scalars: int) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in parameters)
        self._buffer = torch.zeros(count + num_scalars, dtype=torch.float32, device=parameters[0].device)
        self.gradients, self.scalars = self._buffer[:count], self._buffer[count:]
        offset = 0
        for parameter in parameters:
            parameter.grad = self._buffer[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def clear(self) -> None:
        """Zeros for the next step."""
        self._buffer.zero_()

    def sum_over_workers(self) -> None:
        """Adds up gradients and scalars of all workers, in place, on each of them."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._buffer)

    def clip(self, max_norm: float) -> float:
        """Scales the gradients down to a largest norm; returns the norm before."""
        norm = float(self.gradients.norm())
        if norm > max_norm:
            self.gradients.mul_(max_norm / norm)
        return norm
