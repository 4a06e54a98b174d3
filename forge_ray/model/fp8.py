"""Matrix products of blocks in 8-bit floating point, on GPUs that have it (Ada, Hopper and newer).

Weights stay fp32; both sides of a product get one scale each, from the largest value that they hold now. Embedding,
output projection and attention stay bf16. Owns the products and which layers get them; whether a run uses them is
`pretrain.precision`.

No test executes without a GPU: the products at full speed (CPUs emulate them).

Source: FP8 formats for deep learning (arXiv 2209.05433): E4M3 forward, E5M2 for gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from forge_ray.model.transformer import Experts, Transformer

_SMALLEST = 1e-12
CAPABILITY = (8, 9)


class Float8Product(torch.autograd.Function):
    """`x @ weight.T` and its gradients. Shapes: x (..., D), weight (F, D), with D, F and rows of x multiples of 16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product in bf16; keeps both sides in 8 bits."""
        x8, of_x = _scaled(x.flatten(0, -2), torch.float8_e4m3fn)
        w8, of_w = _scaled(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, of_x, w8, of_w)
        ctx.shape, ctx.types = x.shape, (x.dtype, weight.dtype)
        return _product(x8, w8.t(), of_x, of_w, torch.bfloat16).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Gradients of x and of the weight, in their types."""
        x8, of_x, w8, of_w = ctx.saved_tensors
        of_x_type, of_w_type = ctx.types
        g8, of_g = _scaled(grad.flatten(0, -2), torch.float8_e5m2)
        # The left side lies in rows, the right one in columns: what the hardware multiplies.
        grad_x = _product(g8, w8.t().contiguous().t(), of_g, of_w, torch.bfloat16)
        grad_w = _product(g8.t().contiguous(), x8.t().contiguous().t(), of_g, of_x, torch.float32)
        return grad_x.view(ctx.shape).to(of_x_type), grad_w.to(of_w_type)


class Float8Linear(nn.Linear):
    """A layer without bias whose products are 8-bit."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to (..., F), in bf16."""
        return Float8Product.apply(x, self.weight)  # type: ignore[no-any-return]


def apply(model: Transformer) -> None:
    """Gives the layers of a model's blocks 8-bit products. Parameters and their names stay.

    Experts stay bf16: how many rows they get is no multiple of 16.
    """
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            for layer in [] if isinstance(part, Experts) else part.modules():
                if type(layer) is nn.Linear:
                    layer.__class__ = Float8Linear


def _scaled(values: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values in 8 bits, and the fp32 scalar to multiply them with again."""
    limit = torch.finfo(kind).max
    scale = values.detach().abs().amax().float().clamp(min=_SMALLEST) / limit
    return (values.float() / scale).clamp(-limit, limit).to(kind), scale


def _product(left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(left, right, scale_a=of_left, scale_b=of_right, out_dtype=dtype)
