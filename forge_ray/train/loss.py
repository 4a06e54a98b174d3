"""Cross-entropy fused with the output projection: the logits of the whole micro-batch never exist.

Source: the idea of Cut Your Losses (arXiv 2411.09009) and Liger's fused linear cross-entropy, written for plain
    PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forge_ray.model.transformer import Transformer

CHUNK_TOKENS = 256  # 256 x 4,096 fp32 logits are 4 MB, which stay in cache; 128 to 1,024 measured alike


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in nats of `hidden @ weight.T` against targets.

    Gradients are computed in the forward pass, chunk by chunk, so that the projection is multiplied once and not again
    for the backward pass. The exponentials and sums are fp32.

    Shapes: hidden (N, D), weight (V, D), targets (N,).
    Cost: three matrix products of N x D x V, and CHUNK_TOKENS x V fp32 values of memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over tokens, an fp32 scalar; products are computed in `dtype`."""
        weight = weight_VD.to(dtype)
        grad_hidden = torch.empty_like(hidden_ND, dtype=dtype)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, len(targets_N), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            hidden, targets = hidden_ND[rows].to(dtype), targets_N[rows, None]
            logits = (hidden @ weight.T).float()
            wanted = logits.gather(1, targets)
            top = logits.amax(dim=1, keepdim=True)
            probabilities = logits.sub_(top).exp_()
            norm = probabilities.sum(dim=1, keepdim=True)
            total += (norm.log() + top - wanted).sum()
            probabilities.div_(norm).scatter_add_(1, targets, torch.full_like(wanted, -1.0))
            grad_logits = probabilities.to(dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            grad_weight += grad_logits.T @ hidden
        ctx.save_for_backward(grad_hidden.to(hidden_ND.dtype), grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        """Scales what forward prepared."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None


def mean_loss(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy in nats per token."""
    total = LinearCrossEntropy.apply(hidden_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), dtype)
    return total / targets_BT.numel()


def objective(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is trained on, and the cross-entropy in it that is reported: they differ by the balance of experts."""
    loss = mean_loss(hidden_BTD, model.head.weight, targets_BT, dtype)
    uneven = model.imbalance()
    return (loss if uneven is None else loss + model.config.expert_balance * uneven), loss.detach()
