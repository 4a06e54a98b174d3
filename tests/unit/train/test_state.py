"""All state in one buffer: views, copies, and a state that belongs to another model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from forge_ray.errors import CorruptError
from forge_ray.train.loop import Worker
from forge_ray.train.state import ALIGNED, FlatState

Build = Callable[..., Worker]


def test_every_tensor_is_a_view_of_the_buffer_aligned_and_none_overlaps(build: Build) -> None:
    worker = build()
    state = worker.state
    tensors = [*state.weights.values(), *state.optimizer.values()]
    state.buffer.fill_(0.0)
    for tensor in tensors:
        assert not tensor.any()
        assert (tensor.data_ptr() - state.buffer.data_ptr()) % (4 * ALIGNED) == 0
        tensor.fill_(1.0)
    assert state.buffer.sum() == sum(tensor.numel() for tensor in tensors)
    assert all((p == 1.0).all() for p in worker.model.parameters())
    assert all((t == 1.0).all() for t in worker.optimizer.tensors().values())
    assert state.buffer[state.num_weights :].sum() == sum(tensor.numel() for tensor in state.optimizer.values())


def test_a_step_changes_the_buffer_and_nothing_else_holds_state(build: Build) -> None:
    one, other = build(), build()
    for worker in (one, other):
        for p in worker.model.parameters():
            p.grad.fill_(0.25)
    one.optimizer.step(0.5)
    kept = one.state.buffer.clone()
    one.optimizer.step(0.5)
    other.state.buffer.copy_(kept)
    other.optimizer.step(0.5)
    assert torch.equal(one.state.buffer, other.state.buffer)
    assert not torch.equal(one.state.buffer, kept)


def test_loading_takes_exactly_its_own_tensors(build: Build) -> None:
    one, other = build(), build(model={"num_layers": 3})
    with pytest.raises(CorruptError, match=r"blocks\.2"):
        one.state.load(other.state.weights, other.state.optimizer)
    with pytest.raises(CorruptError, match="the optimizer state"):
        one.state.load(one.state.weights, build(optimizer={"kind": "muon"}).state.optimizer)
    given = {name: torch.ones_like(tensor) for name, tensor in one.state.weights.items()}
    one.state.load(given, one.state.optimizer)
    one.state.buffer.fill_(2.0)
    assert all((tensor == 1.0).all() for tensor in given.values())
    assert FlatState(one.model, one.optimizer).weights.keys() == given.keys()
