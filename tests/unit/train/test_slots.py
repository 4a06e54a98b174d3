"""Who owns which slots, and the one buffer of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from forge_ray.train.loop import Worker, backward
from forge_ray.train.slots import FlatGradients, owned


@pytest.mark.parametrize("slots", [1, 2, 8, 16, 64])
def test_every_slot_has_one_owner_and_shares_differ_by_one_at_most(slots: int) -> None:
    for world_size in range(1, slots + 1):
        shares = [owned(rank, world_size, slots) for rank in range(world_size)]
        assert [slot for share in shares for slot in share] == list(range(slots))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) >= 1


@pytest.mark.parametrize("slots", [8, 16, 64])
def test_for_powers_of_two_a_share_is_a_node_of_the_binary_tree_over_slots(slots: int) -> None:
    nodes = {range(start, start + size) for size in (2**k for k in range(7)) for start in range(0, slots, size)}
    for world_size in (2**k for k in range(slots.bit_length())):
        assert {owned(rank, world_size, slots) for rank in range(world_size)} <= nodes


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


def test_gradients_are_views_of_the_buffer_and_add_up(model: nn.Module) -> None:
    flat = FlatGradients(model, num_scalars=2)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for times in (1, 2):
        model(x).square().sum().backward()
        torch.testing.assert_close(flat.gradients, times * torch.cat([g.flatten() for g in wanted]))
    flat.gradients.fill_(7.0)
    assert all((p.grad == 7.0).all() for p in model.parameters())
    flat.clear()
    assert all((p.grad == 0.0).all() for p in model.parameters())


def test_clip_scales_to_the_largest_norm_and_leaves_scalars_and_small_gradients(model: nn.Module) -> None:
    flat = FlatGradients(model, num_scalars=1)
    flat.gradients.copy_(torch.arange(1.0, flat.gradients.numel() + 1))
    flat.scalars[0] = 1e6
    before = flat.gradients.clone()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert flat.clip(2 * norm) == pytest.approx(norm)
    assert torch.equal(flat.gradients, before)
    assert flat.clip(0.5) == pytest.approx(norm)
    assert float(flat.gradients.norm()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(flat.gradients / flat.gradients[0], before / before[0])
    assert float(flat.scalars[0]) == 1e6


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_workers_gradients_add_up_to_the_single_workers(build: Callable[..., Worker], world_size: int) -> None:
    def contribution(rank: int, world: int) -> torch.Tensor:
        worker = build(rank, world)
        for slot in owned(rank, world, worker.config.slots):
            worker.gradients.scalars[0] += backward(worker, torch.from_numpy(worker.loader.slot(5, slot)))
        return torch.cat([worker.gradients.gradients, worker.gradients.scalars])

    alone = contribution(0, 1)
    assert alone.abs().max() > 1e-3
    together = torch.stack([contribution(rank, world_size) for rank in range(world_size)]).sum(0)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
