"""Compiled blocks compute what plain ones do, and who is forked from a process that has compiled need not."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import ConfigError, TrainError
from forge_ray.train import compiled, fitting, loop
from forge_ray.train.loop import Worker
from forge_ray.train.spec import RunSpec

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
CPU, BIG = torch.device("cpu"), ModelConfig(depth=6)


def gradient(worker: Worker) -> torch.Tensor:
    worker.sums.values.zero_()
    loop.backward(worker, torch.from_numpy(worker.loader.slot(0, 0)))
    return worker.sums.gradients.clone()


def in_a_fork(work: Callable[[], Any]) -> Any:
    """Runs it in a process forked from this one."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        try:
            theirs.send(work())
        except Exception as error:
            theirs.send(error)

    process = context.Process(target=run)
    process.start()
    found = ours.recv() if ours.poll(120) else None
    process.join()
    if isinstance(found, Exception):
        raise found
    return found


@compiler
@pytest.mark.parametrize(("experts", "precision"), [(0, "bf16"), (4, "fp32")])
def test_compiled_blocks_give_the_gradient_of_plain_ones(
    build: Callable[..., Worker], experts: int, precision: str
) -> None:
    options = {"precision": precision, "micro_batch": 2, "model": {"num_experts": experts}}
    worker = build(**options)
    plain = gradient(worker)
    compiled.apply(worker.model)
    assert (gradient(worker) - plain).norm() < (1e-5 if precision == "fp32" else 2e-2) * plain.norm()
    with torch.compiler.set_stance("fail_on_recompile"):  # not even where experts get other rows
        worker.sums.values.zero_()
        loop.backward(worker, torch.from_numpy(worker.loader.slot(1, 0)))


@compiler
def test_a_fork_of_a_process_that_has_compiled_has_the_code_and_gets_the_same_bits(
    spec: Callable[..., RunSpec], build: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from forge_ray.train import compute

    def work() -> list[float]:
        worker = compute.build(told, fit, CPU)
        with torch.compiler.set_stance("fail_on_recompile"):
            worker.model.initialise(0)
            return gradient(worker).tolist()

    monkeypatch.setattr(compiled, "_warm", False)
    told = replace(spec(), compiled=True)
    fit = next(fitting.ways(told.config))
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    compiled.warm(told, fit, CPU, forking=True)
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before, "a keeper could not fork any more"
    first, second = in_a_fork(work), in_a_fork(work)
    assert first == second
    assert any(first)


@compiler
def test_a_compiler_that_fails_says_so_and_what_to_do(
    spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    def fail(model: Any) -> None:
        raise RuntimeError("g++: fatal error: cannot execute cc1plus")

    monkeypatch.setattr(compiled, "_warm", False)
    monkeypatch.setattr(loop, "backbone", lambda *_: fail(None))
    told = replace(spec(), compiled=True)
    with pytest.raises(TrainError, match="could not be compiled") as caught:
        compiled.warm(told, next(fitting.ways(told.config)), CPU)
    assert "cc1plus" in str(caught.value.as_dict())
    assert "pretrain.compile" in str(caught.value.as_dict())


def test_long_runs_are_compiled_and_short_ones_are_not() -> None:
    assert not compiled.decide(ModelConfig(depth=2), PretrainConfig(steps=10))
    assert compiled.decide(BIG, PretrainConfig(steps=1000)) == (shutil.which("g++") is not None)
    assert not compiled.decide(BIG, PretrainConfig(steps=1000, compile="off"))


def test_without_a_compiler_auto_does_without_and_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiled.decide(BIG, PretrainConfig(steps=1000))
    with pytest.raises(ConfigError, match="cannot be compiled") as caught:
        compiled.decide(BIG, PretrainConfig(steps=1000, compile="on"))
    assert "no-such-compiler" in str(caught.value.as_dict())


def test_sharded_training_is_not_compiled() -> None:
    sharded = {"sharding": "fsdp", "reduction": "fast"}
    assert not compiled.decide(BIG, PretrainConfig(steps=1000, **sharded))
    with pytest.raises(ConfigError, match="cannot be compiled"):
        compiled.decide(BIG, PretrainConfig(steps=1000, compile="on", **sharded))
