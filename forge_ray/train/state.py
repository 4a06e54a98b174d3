"""All that training changes, in one flat buffer: weights, the optimizer's moments, its step counters.

So a snapshot is one copy, what a newcomer gets is slices of one tensor, and a digest is one pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from forge_ray.errors import CorruptError
from forge_ray.train.optimizer import Optimizer

ALIGNED = 16  # fp32 values, 64 bytes: a cache line, and what vector units like to load


def offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes begin in a flat buffer, each aligned, and the buffer's length."""
    begins, end = [], 0
    for size in sizes:
        begins.append(end)
        end += -(-size // ALIGNED) * ALIGNED
    return begins, end


class FlatState:
    """A model's and its optimizer's tensors as views of `buffer` (N,), fp32: weights first.

    Args:
        model: Its parameters move into the buffer.
        optimizer: Its state moves into the buffer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        parameters = dict(model.named_parameters())
        moments = optimizer.tensors()
        tensors = [*parameters.values(), *moments.values()]
        begins, length = offsets(tensor.numel() for tensor in tensors)
        self.buffer = torch.zeros(length, dtype=torch.float32, device=tensors[0].device)
        self.num_weights = begins[len(parameters)] if moments else length
        self._places = {
            name: (begin, tensor.shape)
            for name, begin, tensor in zip([*parameters, *moments], begins, tensors, strict=True)
        }
        self._weight_names, self._moment_names = list(parameters), list(moments)
        views = self.views(self.buffer)
        with torch.no_grad():
            for name, parameter in parameters.items():
                views[0][name].copy_(parameter)
                parameter.data = views[0][name]
        for name, tensor in moments.items():
            views[1][name].copy_(tensor)
        optimizer.adopt(views[1])

    @property
    def weights(self) -> dict[str, Tensor]:
        """Views of the weights by name."""
        return self.views(self.buffer)[0]

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """Views of the optimizer's tensors, by `<parameter>/<quantity>`."""
        return self.views(self.buffer)[1]

    def views(self, buffer: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and optimizer tensors as views of a copy of the buffer."""

        def view(name: str) -> Tensor:
            begin, shape = self._places[name]
            return buffer[begin : begin + shape.numel()].view(shape)

        return {name: view(name) for name in self._weight_names}, {name: view(name) for name in self._moment_names}

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Takes over what a checkpoint holds, exactly these tensors, neither more nor fewer.

        Raises:
            CorruptError: Names or shapes differ.
        """
        for own, given, what in zip(
            self.views(self.buffer), (weights, optimizer), ("weights", "optimizer state"), strict=True
        ):
            wrong = sorted(set(own) ^ set(given)) or sorted(n for n in own if own[n].shape != given[n].shape)
            if wrong:
                raise CorruptError(
                    f"the {what} of the checkpoint belong to a model of another shape or another optimizer",
                    got=", ".join(wrong[:3]),
                    do="use the model and optimizer sections that the run was started with",
                )
            for name, tensor in own.items():
                tensor.copy_(given[name])
