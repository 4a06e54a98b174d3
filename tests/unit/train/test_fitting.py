"""How much of a slot is computed at once: what fits, the same gradient, and an error that says what would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import TrainError
from forge_ray.train import compute, fitting, loop
from forge_ray.train.fitting import Fit
from forge_ray.train.loop import Worker
from forge_ray.train.spec import RunSpec

SHAPE, VOCAB, CPU = ModelConfig(depth=6), 512, torch.device("cpu")


def config(**changes: Any) -> PretrainConfig:
    return PretrainConfig(**{"slots": 8, "micro_batch": 8, "seq_len": 128, **changes})


def never(fit: Fit) -> None:
    raise AssertionError(f"{fit} was tried on a CPU")


def with_memory(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    monkeypatch.setattr(fitting, "_share_of_memory", lambda config: size_bytes)


def test_with_room_a_slot_is_computed_at_once() -> None:
    assert fitting.choose(SHAPE, config(), VOCAB, "bf16", CPU, never) == Fit(8, False)


@pytest.mark.parametrize("wanted", [Fit(4, False), Fit(1, False), Fit(2, True)])
def test_in_just_enough_memory_the_fastest_way_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch, wanted: Fit) -> None:
    told = config(seq_len=4096)
    with_memory(monkeypatch, fitting.cpu_bytes(SHAPE, told, VOCAB, "bf16", wanted))
    assert fitting.choose(SHAPE, told, VOCAB, "bf16", CPU, never) == wanted


def test_fp32_takes_the_memory_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, fitting.cpu_bytes(SHAPE, config(), VOCAB, "bf16", Fit(8, False)))
    assert fitting.choose(SHAPE, config(), VOCAB, "bf16", CPU, never) == Fit(8, False)
    assert fitting.choose(SHAPE, config(), VOCAB, "fp32", CPU, never) != Fit(8, False)


def test_what_the_user_decides_is_not_tried_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting.choose(SHAPE, config(at_once=2, recompute="on"), VOCAB, "bf16", CPU, never) == Fit(2, True)
    with_memory(monkeypatch, fitting.cpu_bytes(SHAPE, config(), VOCAB, "bf16", Fit(2, True)))
    with pytest.raises(TrainError):
        fitting.choose(SHAPE, config(recompute="off", at_once=8), VOCAB, "bf16", CPU, never)


def test_a_model_that_does_not_fit_at_all_is_refused_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 10_000_000)
    with pytest.raises(TrainError, match="one sequence at a time") as caught:
        fitting.choose(SHAPE, config(), VOCAB, "bf16", CPU, never)
    assert "10.0 MB" in str(caught.value.as_dict())
    assert "fsdp" in str(caught.value.as_dict())


def test_on_a_gpu_ways_are_tried_until_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Fit] = []

    def attempt(fit: Fit) -> None:
        tried.append(fit)
        if fit.at_once > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for name, answer in (("empty_cache", None), ("reset_peak_memory_stats", None), ("max_memory_reserved", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 100))
    assert fitting.choose(SHAPE, config(), VOCAB, "bf16", torch.device("cuda", 0), attempt) == Fit(2, False)
    assert tried == [Fit(8, False), Fit(4, False), Fit(2, False)]


def test_a_part_that_does_not_divide_the_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="at_once 3 does not divide micro_batch 8"):
        config(at_once=3)


@pytest.mark.parametrize("fit", [Fit(2, False), Fit(4, True), Fit(1, True)], ids=str)
def test_parts_and_recomputing_give_the_gradient_of_the_whole_slot(build: Callable[..., Worker], fit: Fit) -> None:
    gradients, losses = [], []
    for each in (Fit(4, False), fit):
        worker = build(micro_batch=4)
        worker.fit, worker.model.recompute = each, each.recompute
        losses.append(loop.backward(worker, torch.from_numpy(worker.loader.slot(0, 0))))
        gradients.append(worker.sums.gradients.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-7
    if fit.at_once == 4:
        assert torch.equal(*gradients)


def test_arithmetic_counts_what_recomputing_keeps() -> None:
    from forge_ray.model.arithmetic import activation_bytes
    from forge_ray.model.transformer import Transformer

    shape = ModelConfig(depth=4)
    model = Transformer(shape, VOCAB, 256).initialise(0)
    model.recompute = True
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.hidden(torch.zeros((2, 256), dtype=torch.int64))
    blocks = sum(size for at, size in kept.items() if size == 2 * 256 * shape.d_model * 4)
    inside = activation_bytes(shape.replace(depth=None, num_layers=1), 256, 2, precision="bf16")
    told = activation_bytes(shape, 256, 2, precision="bf16", recompute=True)
    assert told >= blocks + inside - 3 * 2 * 256 * shape.d_model * 4
    assert told < 0.5 * activation_bytes(shape, 256, 2, precision="bf16")


def test_what_is_tried_on_a_gpu_holds_the_sums_that_the_run_holds(
    spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Worker] = []

    def kept(*args: Any) -> Worker:
        tried.append(real(*args))
        return tried[-1]

    def choose(*args: Any) -> Fit:
        args[-1](Fit(1, False))
        return Fit(1, False)

    real = compute._worker
    monkeypatch.setattr(compute, "_worker", kept)
    monkeypatch.setattr(fitting, "choose", choose)
    for min_workers, sums in ((1, 4), (2, 3)):
        compute._fit(spec(slots=16, min_workers=min_workers), CPU)
        assert len(tried[-1].sums._spare) + len(tried[-1].sums._tree) == sums
