"""Rules, schedule, and a state that is nothing but tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forge_ray.config import AdamWConfig, ModelConfig, MuonConfig, PretrainConfig
from forge_ray.model.arithmetic import newton_schulz_flops
from forge_ray.model.transformer import Transformer
from forge_ray.train.elastic.group import Group
from forge_ray.train.optimizer import Optimizer, rate_frac, shared_out
from tests.unit.train.groups import in_group

CONFIGS = {
    "adamw": AdamWConfig(kind="adamw", learning_rate=0.01),
    "muon": MuonConfig(kind="muon", learning_rate=0.02, adamw=AdamWConfig(kind="adamw", learning_rate=0.005)),
}
both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(seed: int = 0, **shape: object) -> Transformer:
    config = ModelConfig(**{"num_layers": 2, "d_model": 32, "num_heads": 1, "d_ff": 48, **shape})
    return Transformer(config, 40, 16).initialise(seed)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Steps whose gradients depend on the step and the weights."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw) + 0.1 * p.detach()
        optimizer.step(rate_frac=1.0 / (step + 1))


@both
@pytest.mark.parametrize("tied", [True, False])
def test_a_state_carried_over_continues_bit_for_bit(config: AdamWConfig | MuonConfig, tied: bool) -> None:
    straight = build(tied_embeddings=tied)
    train(straight, Optimizer(straight, config), range(8))

    first = build(tied_embeddings=tied)
    optimizer = Optimizer(first, config)
    train(first, optimizer, range(5))
    kept = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    second = build(seed=9, tied_embeddings=tied)
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, config)
    resumed.adopt(kept)
    train(second, resumed, range(5, 8))

    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters()))
    train(first, Optimizer(first, config), range(5, 8))  # and the state matters: without it the weights differ
    assert not all(torch.equal(a, b) for a, b in zip(straight.parameters(), first.parameters()))


@both
def test_the_state_is_there_before_the_first_step_as_torch_would_make_it(config: AdamWConfig | MuonConfig) -> None:
    model = build()
    optimizer = Optimizer(model, config)
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in optimizer.tensors().items()}
    assert not any(tensor.any() for tensor in optimizer.tensors().values())
    train(model, optimizer, range(1))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in optimizer.tensors().items()} == before


@both
def test_every_parameter_has_a_state_and_moves(config: AdamWConfig | MuonConfig) -> None:
    model = build(tied_embeddings=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, config)
    train(model, optimizer, range(1))
    assert {key.rpartition("/")[0] for key in optimizer.tensors()} == set(before)
    assert all((p != before[name]).any() for name, p in model.named_parameters())


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = build(tied_embeddings=False)
    optimizer = Optimizer(model, CONFIGS["muon"])
    train(model, optimizer, range(1))
    muon = {key.rpartition("/")[0] for key in optimizer.tensors() if key.endswith("momentum_buffer")}
    adamw = {key.rpartition("/")[0] for key in optimizer.tensors() if key.endswith("exp_avg_sq")}
    assert {"embedding.weight", "head.weight", "norm.weight", "blocks.0.attention.q_norm.weight"} <= adamw
    assert {"blocks.0.attention.q.weight", "blocks.1.mlp.down.weight"} <= muon
    assert muon.isdisjoint(adamw)


@both
def test_only_matrices_decay(config: AdamWConfig | MuonConfig) -> None:
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    Optimizer(model, config).step(1.0)
    assert {bool((p < 1.0).all()) for p in model.parameters() if p.ndim == 2} == {True}
    assert all((p == 1.0).all() for p in model.parameters() if p.ndim == 1)


def test_the_schedule_rises_stays_and_falls_to_a_last_step_that_still_learns() -> None:
    config = PretrainConfig(steps=100, warmup_frac=0.1, decay_frac=0.4)
    rates = [rate_frac(step, config) for step in range(100)]
    rising, flat, falling = rates[:10], rates[10:60], rates[60:]
    assert rising == sorted(rising)
    assert rising[0] == pytest.approx(0.1)
    assert set(flat) == {1.0}
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(1 / 40)
    assert sum(rates) == pytest.approx(5.5 + 50 + 20.5)


@pytest.mark.parametrize("fracs", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.001, 0.001)])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_any_schedule_stays_within_zero_and_the_peak(steps: int, fracs: tuple[float, float]) -> None:
    config = PretrainConfig(steps=steps, warmup_frac=fracs[0], decay_frac=fracs[1])
    assert all(0 < rate_frac(step, config) <= 1 for step in range(steps))


def test_workers_who_share_newton_schulz_move_as_torch_does_bit_for_bit() -> None:
    def moved(size: int) -> list[bytes]:
        def body(group: Group) -> bytes:
            model = build(num_layers=3)
            optimizer = Optimizer(model, CONFIGS["muon"])
            for step in range(3):
                draw = torch.Generator().manual_seed(step)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=draw)
                directions = optimizer.directions(group)
                assert (directions is None) == (size == 1)
                optimizer.step(0.5, directions)
            values = [*model.parameters(), *optimizer.tensors().values()]
            return torch.cat([value.detach().flatten() for value in values]).numpy().tobytes()

        return in_group(size, body)

    (alone,) = moved(1)
    assert moved(2) == [alone] * 2
    assert moved(3) == [alone] * 3


def test_newton_schulz_is_shared_out_evenly_and_alike() -> None:
    matrices = [torch.empty(shape) for shape in [(64, 64), (16, 64), (16, 64), (64, 64), (176, 64), (64, 176)] * 3]
    shares = shared_out(matrices, 4)
    assert sorted(id(m) for share in shares for m in share) == sorted(map(id, matrices))
    costs = [sum(min(m.shape) ** 2 * (2 * max(m.shape) + min(m.shape)) for m in share) for share in shares]
    assert max(costs) < 1.25 * sum(costs) / 4
    assert [len(share) for share in shared_out(matrices[:2], 4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("experts", [0, 3])
def test_arithmetic_counts_the_operations_of_newton_schulz(experts: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = build(num_experts=experts)
    optimizer = Optimizer(model, CONFIGS["muon"])
    with FlopCounterMode(display=False) as counter:
        train(model, optimizer, range(1))
    assert counter.get_total_flops() == newton_schulz_flops(model.config)
