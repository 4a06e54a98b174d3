"""The fused loss beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from forge_ray.train.loss import CHUNK_TOKENS, mean_loss


def both(rows: int, scale: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(loss, gradient of hidden, gradient of weight), ours and torch's."""
    draw = torch.Generator().manual_seed(rows)
    hidden, weight = torch.randn(1, rows, 24, generator=draw) * scale, torch.randn(70, 24, generator=draw)
    targets = torch.randint(0, 70, (1, rows), generator=draw)
    out = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = mean_loss(h, w, targets, torch.float32) if ours else F.cross_entropy((h @ w.T)[0], targets[0])
        (value * 3).backward()  # a scale behind the loss must reach the gradients
        out.append((value.detach(), h.grad, w.grad))
    return out


@pytest.mark.parametrize("rows", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 7])
def test_value_and_gradients_are_those_of_cross_entropy(rows: int) -> None:
    ours, wanted = both(rows)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    ours, wanted = both(50, scale=300.0)
    assert torch.isfinite(ours[0])
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
