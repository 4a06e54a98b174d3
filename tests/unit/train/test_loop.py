"""Whole runs of a tiny model in one process: it learns, it stops at nonsense, and it goes on bit for bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from forge_ray.artifact import Artifact, Manifest
from forge_ray.errors import ForgeError, TrainError
from forge_ray.train import loop, pretrain
from forge_ray.train.elastic.group import GroupLost
from forge_ray.train.elastic.slots import Assignment, assign
from forge_ray.train.loop import StepRecord, Worker, fit
from forge_ray.train.saving.checkpoint import Checkpoints
from forge_ray.train.spec import RunSpec

Build = Callable[..., Worker]
ADAMW, MUON = {"kind": "adamw", "learning_rate": 4e-3}, {"kind": "muon", "learning_rate": 8e-3}


def run(worker: Worker, on_step: Callable[[StepRecord], None] = lambda record: None) -> list[StepRecord]:
    """Trains to the end; what is recorded of it comes back."""
    records: list[StepRecord] = []
    fit(worker, worker.team, lambda record: (records.append(record), on_step(record)), worker.team.record.on_verdict)
    return records


def one_step(worker: Worker) -> StepRecord:
    return loop.step(worker, worker.team, worker.team.settle(worker))[1]


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


def test_experts_learn_and_stay_busy(build: Build) -> None:
    def trained(balance: float) -> tuple[float, float]:
        model = {"num_experts": 4, "experts_per_token": 1, "expert_balance": balance}
        worker = build(run_id=f"balance {balance}", steps=60, optimizer=MUON, model=model)
        records = run(worker)
        return sum(record.loss for record in records[-5:]) / 5, float(worker.model.imbalance().detach())

    loss, imbalance = trained(0.05)
    assert loss < 0.6 * math.log(64)
    assert imbalance < 1.2
    assert trained(0.0)[1] > imbalance


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens(build: Build) -> None:
    worker = build()
    tokens = torch.cat([torch.from_numpy(worker.loader.slot(0, slot)) for slot in range(8)])
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.inference_mode():
        logits = worker.model(inputs, loop.document_mask(inputs, worker.end_token))
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    record = one_step(worker)
    assert record.loss == pytest.approx(float(wanted), rel=1e-5)


def test_micro_batches_and_slots_cut_the_same_batch_alike(build: Build) -> None:
    one, other = build(slots=8, micro_batch=1, steps=3), build(slots=2, micro_batch=4, steps=3)
    for mine, theirs in zip(run(one), run(other), strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_a_loss_that_is_not_finite_is_never_applied_and_ends_the_run_if_other_batches_do_not_help(build: Build) -> None:
    worker = build(guard={"max_skips": 2, "max_rollbacks": 0})
    one_step(worker)
    with torch.no_grad():
        worker.model.norm.weight[0] = float("nan")
    before = weights(worker)
    with pytest.raises(TrainError, match="stopped by its guardian") as caught:
        run(worker)
    assert "step 1" in str(caught.value)
    assert worker.step == 1
    assert worker.position == 3  # two other batches were tried
    assert all(torch.equal(before[name], value) or name == "norm.weight" for name, value in weights(worker).items())


def test_a_rollback_takes_the_earlier_state_and_other_batches(build: Build) -> None:
    worker = build(steps=8, guard={"non_finite": "rollback", "rollback_steps": 1, "rollback_skip_batches": 2})

    def on_step(record: StepRecord) -> None:
        if record.step == 3:
            worker.team.record.stop()  # a checkpoint
        if record.step == 5 and not worker.guardian.skips.windows:
            with torch.no_grad():
                worker.model.norm.weight[0] = float("nan")

    records = run(worker, on_step)
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    # Batch 5 showed the trouble; with those since the checkpoint and two more it is left out.
    assert [record.position for record in records] == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert all(math.isfinite(record.loss) for record in records)


def test_large_gradients_are_clipped_before_the_update(build: Build) -> None:
    worker = build(grad_clip=1e-3)
    clipped = []
    worker.optimizer.step = lambda rate, _: clipped.append(float(worker.sums.gradients.norm()))
    record = one_step(worker)
    assert record.grad_norm > 0.1
    assert clipped == [pytest.approx(1e-3, rel=1e-4)]


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_run_cut_off_and_resumed_ends_in_the_same_bits(build: Build, optimizer: dict[str, Any], tied: bool) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "model": {"tied_embeddings": tied}}
    straight = build(run_id="straight", **options)
    losses = [record.loss for record in run(straight)]

    class Cut(Exception):
        pass

    cut = build(run_id="cut", **options)

    def on_step(record: StepRecord) -> None:
        if record.step == 5:
            cut.team.record.stop()
        if record.step == 8:  # three steps that no checkpoint has
            raise Cut

    with pytest.raises(Cut):
        run(cut, on_step)
    resumed = build(run_id="cut", **options)
    assert resumed.step == 5
    assert [record.loss for record in run(resumed)] == losses[5:]
    final = weights(straight)
    assert all(torch.equal(final[name], value) for name, value in weights(resumed).items())
    assert torch.equal(straight.state.buffer, resumed.state.buffer)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_step_that_is_lost_after_the_sum_is_taken_again_with_the_same_bits(
    build: Build, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 4, "optimizer": MUON, "reduction": reduction}
    straight, hit = build(run_id="straight", **options), build(run_id="hit", **options)
    run(straight)
    directions, held = hit.optimizer.directions, []

    def lose(group: Any) -> None:
        hit.optimizer.directions = directions
        raise GroupLost("while directions were shared")

    def resettle(worker: Worker) -> Assignment:
        held.append(worker.sums.held())
        return assign([held[-1]], worker.config.slots, exact=worker.sums.exact)

    monkeypatch.setattr(hit.optimizer, "directions", lose)
    monkeypatch.setattr(hit.team, "settle", resettle)
    monkeypatch.setattr(hit.team, "lost", lambda error: None)
    run(hit)
    assert held == [(), ((3, 0),) if reduction == "exact" else (), (), (), ()]
    assert torch.equal(hit.state.buffer, straight.state.buffer)


def test_a_finished_run_is_read_as_the_model_that_was_trained(build: Build, spec: Callable[..., RunSpec]) -> None:
    worker = build(run_id="done", steps=3)
    run(worker)
    worker.team.record.finish()
    artifact = Checkpoints(spec().workspace, "done").newest()
    model, end = pretrain.load_model(artifact, spec().model, 32)
    assert end == worker.end_token
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), worker.model.parameters()))


@pytest.fixture
def published(
    build: Build, spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Artifact, list[StepRecord]]]:
    """The artifact of a run that is trained in this process, under the name of its options; and its steps."""

    def make(**options: Any) -> tuple[Artifact, list[StepRecord]]:
        name = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]
        told, records = spec(run_id=name, **options), []

        def train(_: RunSpec) -> None:
            worker = build(run_id=name, **options)
            records.extend(run(worker, lambda record: worker.team.record.on_step(record)))
            worker.team.record.finish()

        monkeypatch.setattr(pretrain, "_train", train)
        shards = told.workspace.get(told.shards_ref)
        frozen = {"precision": told.precision, "compiled": False}
        files, metrics = pretrain.run(told.model, told.config, shards, told.workspace, run_id=name, frozen=frozen)
        config = {"model": told.model.model_dump(mode="json"), "pretrain": told.config.model_dump(mode="json")}
        inputs = {"tokenize": told.shards_ref.partition("/")[2]}
        manifest = Manifest(
            "pretrain", name, tuple(files), config=config, inputs=inputs, metrics=metrics, frozen=frozen
        )
        return told.workspace.publish(manifest), records

    return make


def test_a_run_that_extends_another_is_the_longer_run_bit_for_bit(published: Callable[..., Any]) -> None:
    short, _ = published(steps=10, warmup_frac=0.2, decay_frac=0.4)
    longer, whole = published(steps=20, warmup_frac=0.1, decay_frac=0.4)
    extended, rest = published(steps=20, warmup_frac=0.1, decay_frac=0.4, extends=short.ref)
    assert [record.step for record in rest] == list(range(7, 21))
    assert [record.loss for record in rest] == [record.loss for record in whole[6:]]
    assert extended.entry("model.safetensors").sha256 == longer.entry("model.safetensors").sha256


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 12}, "set pretrain.steps to 15 or more"),
        ({"optimizer": MUON}, "adamw in"),
        ({"optimizer": {**ADAMW, "learning_rate": 1e-3}}, "same pretrain.optimizer.learning_rate"),
        ({"optimizer": {**ADAMW, "weight_decay": 0.0}}, "pretrain.optimizer.weight_decay 0.0 here, 0.1 in pretrain/"),
        ({"model": {"d_ff": 32}}, "same model.d_ff"),
        ({"slots": 4}, "same pretrain.slots"),
        ({"micro_batch": 2}, "same pretrain.micro_batch"),
        ({"seq_len": 16}, "same pretrain.seq_len"),
        ({"seed": 1, "slots": 4}, "pretrain.slots 4 here"),
        ({"seed": 1, "slots": 4}, "; pretrain.slots"),
        ({"mixture": {"weights": {"made": 1.0}}}, "same pretrain.mixture.weights.made"),
        ({"window_bytes": 1 << 20}, "same pretrain.window_bytes"),
        ({"grad_clip": 0.5}, "same pretrain.grad_clip"),
        ({"reduction": "fast"}, "same pretrain.reduction"),
        ({"precision": "bf16"}, "same pretrain.precision"),
        ({"extends": "pretrain/0123456789abcdef"}, "0123456789abcdef"),
    ],
)
def test_a_run_that_cannot_be_extended_says_why(
    published: Callable[..., Any], options: dict[str, Any], told: str
) -> None:
    short, _ = published(steps=10, decay_frac=0.1)
    with pytest.raises(ForgeError) as caught:
        published(**{"steps": 40, "decay_frac": 0.4, "extends": short.ref, **options})
    assert told in str(caught.value.as_dict())


def test_what_does_not_decide_the_steps_of_a_run_may_differ_where_it_extends_another(
    published: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    short, _ = published(steps=10, warmup_frac=0.2, decay_frac=0.4)
    others = {"decay_frac": 0.2, "checkpoint_every_s": 1.0, "guard": {"max_skips": 1}, "mixture": {"max_epochs": 30.0}}
    _, rest = published(steps=14, extends=short.ref, **others)
    assert [record.step for record in rest] == list(range(7, 15))
    assert "another corpus" not in capsys.readouterr().err


def test_another_corpus_and_another_way_to_compute_are_said_where_a_run_extends_another(
    published: Callable[..., Any], spec: Callable[..., RunSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    short, _ = published(steps=4, decay_frac=0.5)
    told = spec(steps=8, extends=short.ref)
    grown = told.workspace.publish(replace(told.workspace.get(told.shards_ref).manifest, fingerprint="2" * 16))
    frozen = {"precision": "fp32", "compiled": True}
    capsys.readouterr()
    assert pretrain._extended(told.config, told.model, grown, told.workspace, frozen) == 2
    said = capsys.readouterr().err
    assert f"{short.ref} has read another corpus: from step 2 on" in said
    assert f"{short.ref} was not compiled" in said


def test_a_run_whose_last_checkpoint_is_damaged_trains_on(
    build: Build, spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = spec(run_id="hurt", steps=4)

    def train(spec_: RunSpec) -> None:
        """What Ray Train's workers do, in this process."""
        worker = build(run_id=spec_.run_id, steps=4)
        run(worker, lambda record: worker.team.record.stop())
        worker.team.record.finish()

    train(told)
    checkpoints = Checkpoints(told.workspace, "hurt")
    told.workspace.delete_blob(checkpoints.get(4).entry("model.safetensors"))
    monkeypatch.setattr(pretrain, "_train", train)
    shards = told.workspace.get(told.shards_ref)
    frozen = {"precision": "fp32", "compiled": False}
    files, metrics = pretrain.run(told.model, told.config, shards, told.workspace, run_id="hurt", frozen=frozen)
    assert {entry.name for entry in files} >= {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert metrics["steps"] == checkpoints.newest().read_json("state.json")["step"] == 4
