"""Products in 8 bits come near to those in full precision, forward and backward; GPUs without them are refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import TrainError
from forge_ray.model import fp8
from forge_ray.model.transformer import Transformer
from forge_ray.train import compute, loop

gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.CAPABILITY, reason="no GPU with fp8"
)


def off_by(device: str) -> list[float]:
    """Relative errors of a product and both its gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, wanted = (torch.randn(shape, generator=generator) for shape in ((2, 32, 64), (48, 64), (2, 32, 48)))
    results = []
    for product in (nn.functional.linear, fp8.Float8Product.apply):
        inputs = [t.detach().to(device).requires_grad_() for t in (x * 3e-4, weight * 50)]
        y = product(*inputs)
        y.backward(wanted.to(device, y.dtype) * 1e-6)
        results.append([y.detach(), *(t.grad for t in inputs)])
    return [float((b.float() - a).norm() / a.norm()) for a, b in zip(*results, strict=True)]


def test_products_and_gradients_are_near_the_real_ones_whatever_their_scale() -> None:
    assert max(off_by("cpu")) < 0.08


@gpu
def test_on_a_gpu_too() -> None:
    assert max(off_by("cuda")) < 0.08


def test_a_model_learns_with_them_and_keeps_its_names_and_fp32_weights() -> None:
    model = Transformer(ModelConfig(depth=1), 64, 32).initialise(0)
    names = [name for name, _ in model.named_parameters()]
    fp8.apply(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model.blocks[0].mlp.gate, fp8.Float8Linear)
    assert not isinstance(model.head, fp8.Float8Linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(33).repeat(2, 1)
    losses = []
    for _ in range(12):
        losses.append(float(loop.learn(model, tokens, 63, bf16=True, weight=1.0)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "gpus_per_worker"),
        ({"gpus_per_worker": 1, "seq_len": 100}, "multiple of 16"),
        ({"gpus_per_worker": 1, "sharding": "fsdp", "reduction": "fast"}, "fsdp"),
    ],
)
def test_where_it_cannot_work_it_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        PretrainConfig(precision="fp8", **options)


def test_an_older_gpu_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(TrainError, match="no fp8") as caught:
        compute.check_device("fp8", torch.device("cuda", 0))
    assert "A100" in str(caught.value.as_dict())
    compute.check_device("bf16", torch.device("cuda", 0))
