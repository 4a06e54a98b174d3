"""Whole runs of a tiny model in one process: it learns, it stops at nonsense, and it goes on bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from forge_ray.errors import TrainError
from forge_ray.train import loop, pretrain
from forge_ray.train.checkpoint import Checkpoints
from forge_ray.train.loop import StepRecord, Worker, fit

Build = Callable[..., Worker]
ADAMW, MUON = {"kind": "adamw", "learning_rate": 4e-3}, {"kind": "muon", "learning_rate": 8e-3}


def run(worker: Worker, **callbacks: Any) -> list[StepRecord]:
    records: list[StepRecord] = []
    silent = {"checkpoint_due": lambda: False, "on_step": lambda record, save: records.append(record)}
    fit(worker, **{**silent, **callbacks})
    return records


def weights(worker: Worker) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in worker.model.named_parameters()}


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_what_the_corpus_has(build: Build, optimizer: dict[str, Any], precision: str) -> None:
    records = run(build(steps=60, optimizer=optimizer, precision=precision))
    assert records[0].loss == pytest.approx(math.log(64), rel=0.02)  # of a uniform guess
    assert sum(record.loss for record in records[-5:]) / 5 < 0.6 * records[0].loss
    assert [record.step for record in records] == list(range(1, 61))
    assert {record.tokens for record in records} == {8 * 32}


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens(build: Build) -> None:
    worker = build()
    tokens = torch.cat([torch.from_numpy(worker.loader.slot(0, slot)) for slot in range(8)])
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.inference_mode():
        logits = worker.model(inputs, loop.document_mask(inputs, worker.end_token))
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    record, _ = loop.step(worker, False)
    assert record.loss == pytest.approx(float(wanted), rel=1e-5)


def test_micro_batches_and_slots_cut_the_same_batch_alike(build: Build) -> None:
    one, other = build(slots=8, micro_batch=1, steps=3), build(slots=2, micro_batch=4, steps=3)
    for mine, theirs in zip(run(one), run(other), strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_a_checkpoint_is_due_when_asked_for_and_at_the_end(build: Build) -> None:
    for answers, wanted in (([False, True, False, False, True], [2, 5]), ([False] * 5, [5])):
        asked, due = iter(answers), []
        run(build(steps=5), checkpoint_due=asked.__next__, on_step=lambda *told, due=due: due.append(told))
        assert [record.step for record, save in due if save] == wanted


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(build: Build) -> None:
    worker = build()
    run_one = loop.step(worker, False)[0]
    with torch.no_grad():
        worker.model.norm.weight[0] = float("nan")
    before = weights(worker)
    with pytest.raises(TrainError, match="the loss is not finite") as caught:
        run(worker)
    assert f"step {run_one.step}" in str(caught.value)
    assert worker.step == 1
    assert all(torch.equal(before[name], value) or name == "norm.weight" for name, value in weights(worker).items())


def test_large_gradients_are_clipped_before_the_update(build: Build) -> None:
    worker = build(grad_clip=1e-3)
    record, _ = loop.step(worker, False)
    assert record.grad_norm > 0.1
    assert float(worker.gradients.gradients.norm()) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_run_cut_off_and_resumed_ends_in_the_same_bits(
    build: Build, spec: Callable[..., pretrain.RunSpec], optimizer: dict[str, Any], tied: bool
) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "model": {"tied_embeddings": tied}}
    straight = build(run_id="straight", **options)
    losses = [record.loss for record in run(straight)]

    class Cut(Exception):
        pass

    cut = build(run_id="cut", **options)
    reporter = pretrain._Reporter(spec(run_id="cut", **options), cut, board=None)

    def on_step(record: StepRecord, save: bool) -> None:
        if record.step == 5:
            reporter._save()
        if record.step == 8:  # three steps that no checkpoint has
            raise Cut

    with pytest.raises(Cut):
        run(cut, on_step=on_step)
    resumed = build(run_id="cut", **options)
    assert resumed.step == 5
    assert [record.loss for record in run(resumed)] == losses[5:]
    final = weights(straight)
    assert all(torch.equal(final[name], value) for name, value in weights(resumed).items())
    for name, value in straight.optimizer.tensors().items():
        assert torch.equal(resumed.optimizer.tensors()[name], value), name


def test_a_finished_run_is_read_as_the_model_that_was_trained(
    build: Build, spec: Callable[..., pretrain.RunSpec]
) -> None:
    worker = build(run_id="done", steps=3)
    run(worker)
    pretrain._Reporter(spec(run_id="done", steps=3), worker, board=None)._save()
    artifact = Checkpoints(spec().workspace, "done").newest()
    model, end = pretrain.load_model(artifact, spec().model, 32)
    assert end == worker.end_token
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), worker.model.parameters()))


def test_a_run_whose_last_checkpoint_is_damaged_trains_on(
    build: Build, spec: Callable[..., pretrain.RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = spec(run_id="hurt", steps=4)

    def train(spec_: pretrain.RunSpec) -> None:
        """What Ray Train's workers do, in this process."""
        worker = build(run_id="hurt", steps=4)
        reporter = pretrain._Reporter(spec_, worker, board=None)
        run(worker, on_step=lambda record, save: reporter._save())

    train(told)
    checkpoints = Checkpoints(told.workspace, "hurt")
    told.workspace.delete_blob(checkpoints.get(4).entry("model.safetensors"))
    monkeypatch.setattr(pretrain, "_train", train)
    shards = told.workspace.get(told.shards_ref)
    frozen = {"precision": "fp32"}
    files, metrics = pretrain.run(told.model, told.config, shards, told.workspace, run_id="hurt", frozen=frozen)
    assert {entry.name for entry in files} >= {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert metrics["steps"] == checkpoints.newest().read_json("state.json")["step"] == 4


def test_workers_that_die_without_progress_end_the_run_and_progress_gives_new_chances() -> None:
    board = pretrain.Board()
    chances = pretrain._STARTS_WITHOUT_PROGRESS - 1
    assert [board.started(0) for _ in range(chances)] == [None] * chances
    assert [board.started(50) for _ in range(chances)] == [None] * chances
    assert isinstance(board.started(50), TrainError)
    assert board.news()[1] is board.started(60)
