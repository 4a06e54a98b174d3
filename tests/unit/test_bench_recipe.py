"""The benchmarks of recipe and step: what they read, what they charge, what they conclude from the runs there are."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from forge_ray.config import ModelConfig
from forge_ray.train import loop

CORPUS = {"workspace": "w", "shards": "s", "documents": "d", "tokenizer": "t"}
COMMON = {"precision": "fp32", "tokens": 1000}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", Path(__file__).parents[2] / "bench" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load("recipe")


# --------------------------------------------------------------------------------------------------------------- a run


def test_while_the_batch_grows_every_sequence_is_read_once_by_whichever_slot(recipe: ModuleType) -> None:
    inner = SimpleNamespace(slot=lambda position, slot: np.array([[position]]))
    grown, read = recipe.Grown(inner), []
    for position, steps, slots, micro_batch in ((0, 3, 2, 1), (3, 2, 2, 4)):
        grown.begin(position, slots, micro_batch)
        for step in range(position, position + steps):
            rows = [grown.slot(step, slot) for slot in range(slots)]
            assert {row.shape for row in rows} == {(micro_batch, 1)}
            read += np.concatenate(rows).flatten().tolist()
    assert read == list(range(3 * 2 + 2 * 8))


@pytest.mark.parametrize("parts", [[[1.0, 1.0]], [[0.05, 0.25], [0.15, 0.5], [0.8, 1.0]]])
def test_a_step_of_muon_costs_its_newton_schulz_however_small_the_batch(
    recipe: ModuleType, parts: list[list[float]]
) -> None:
    update, per_token, batch, flops = recipe.optimizer_flops(ModelConfig(depth=2), "muon"), 7e6, 4096, 7e6 * 3e6
    counts = recipe.steps_of(flops, per_token, update, batch, parts)
    tokens = [count * batch * factor for count, (_, factor) in zip(counts, parts, strict=True)]
    assert per_token * sum(tokens) + update * sum(counts) == pytest.approx(flops, rel=2e-3)
    for share, (wanted, _) in zip(tokens, parts, strict=True):
        assert share / sum(tokens) == pytest.approx(wanted, abs=2e-3)
    assert update > 0 == recipe.optimizer_flops(ModelConfig(depth=2), "adamw")


# --------------------------------------------------------------------------------------------------------- conclusions


@pytest.mark.parametrize(
    ("wanted", "share", "extrapolated"), [(1.0, 0.5, False), (1.1, 0.25, False), (1.2, 0.125, True), (0.8, 2.0, True)]
)
def test_a_share_beyond_the_runs_is_called_extrapolated(
    recipe: ModuleType, wanted: float, share: float, extrapolated: bool
) -> None:
    assert recipe.share_needed({0.25: 1.1, 0.5: 1.0, 1.0: 0.9}, wanted) == (pytest.approx(share), extrapolated)


def scored(runs: list[dict[str, Any]], best_rate: float) -> list[dict[str, Any]]:
    """What runs might give: a plain one is worse by its distance from the best rate, ours by its share."""
    found = []
    for words in runs:
        optimizer, share = words["recipe"]["optimizer"], words["share"]
        off = abs(np.log2(optimizer["learning_rate"] / best_rate)) / 100 if "learning_rate" in optimizer else 0
        bits = (1.0 + off if optimizer["kind"] == "adamw" else 1.2 - 0.4 * share) + 0.01 * words["seed"]
        found.append(
            {
                "bits_per_byte": bits,
                "steps_s": 100.0 * share,
                "step_s": 0.1,
                "tokens": 1000,
                "parameters": 7,
                "optimizer_flops_frac": 0.04,
                "commit": "c",
            }
        )
    return found


class Made:
    """Runs that are made at once."""

    def __init__(self, best_rate: float) -> None:
        self.best_rate, self.asked = best_rate, []

    def begin(self, wanted: list[dict[str, Any]], urgency: int) -> None:
        pass

    def all(self, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.asked += [words["name"] for words in wanted]
        return [words | row for words, row in zip(wanted, scored(wanted, self.best_rate), strict=True)]


@pytest.mark.parametrize(
    ("best", "rates", "at_edge"),
    [
        (4e-3, [2e-3, 4e-3, 8e-3], False),
        (8e-3, [2e-3, 4e-3, 8e-3, 16e-3], False),
        (1e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], False),
        (1.0, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3, 128e-3], True),
    ],
)
def test_the_sweep_goes_on_while_the_best_rate_lies_at_its_edge(
    recipe: ModuleType, best: float, rates: list[float], at_edge: bool
) -> None:
    row = recipe.pair(Made(best), CORPUS, "aws", "1M", range(2), COMMON)
    assert list(row["plain_tuning"]) == rates
    assert row["plain_rate_at_edge"] is at_edge
    assert row["plain_rate"] == (max(rates) if at_edge else best)
    assert row["runs"] == {"plain": 2, "ours": 6, "wanted": 8}


def test_a_pair_states_compute_and_time(recipe: ModuleType) -> None:
    row = recipe.pair(Made(4e-3), CORPUS, "aws", "1M", range(2), COMMON)
    assert row["compute_frac"] == row["time_frac"] == pytest.approx(0.5, abs=0.001)
    assert (row["extrapolated"], row["by_seed"], row["by_seed_extrapolated"]) == (False, [0.5, 0.5], [False, False])
    assert row["step_s"] == {"plain": 0.1, "ours": 0.1}


# ------------------------------------------------------------------------------------------------------- what is kept


def kept(path: Path, recipe: ModuleType, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """A file of the runs of a pair, those that are wanted."""
    made, rows = Made(4e-3), []
    all_, made.all = made.all, lambda runs: (rows.extend(zip(runs, found := all_(runs), strict=True)), found)[1]
    recipe.pair(made, CORPUS, "aws", "1M", range(2), COMMON)
    lines = [json.dumps([json.dumps(words, sort_keys=True), row]) for words, row in rows if wanted(words)]
    path.write_text("\n".join(lines) + "\n")


def test_what_is_there_so_far_is_reported_without_a_corpus(recipe: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    kept(path, recipe, lambda words: words["seed"] == 0 or words["share"] == 1.0)
    runs = recipe.Runs(path, 0, "now")
    row = recipe.pair(runs, {}, "aws", "1M", range(2), COMMON)
    assert (row["by_seed"], row["runs"]["ours"], runs.missing, runs.commits) == ([0.5], 3, 3, {"c"})
    assert row["plain"] == 1.0  # of the seed that ours has too
    assert recipe.pair(recipe.Runs(path, 0, ""), {}, "kernel", "1M", range(2), COMMON) is None
    assert recipe.pair(recipe.Runs(path, 0, ""), {}, "aws", "1M", range(2), {**COMMON, "precision": "bf16"}) is None


def test_a_report_of_an_edge_does_not_ask_for_more(recipe: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    kept(path, recipe, lambda words: words["name"] != "plain 0.002")
    row = recipe.pair(recipe.Runs(path, 0, ""), {}, "aws", "1M", range(2), COMMON)
    assert row["plain_rate_at_edge"] is True


def test_runs_are_made_once_the_most_urgent_first_and_kept(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "runs.jsonl", []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        told = json.loads(words[-1])
        order.append(told["name"])
        return SimpleNamespace(returncode=0, stdout=json.dumps({"bits_per_byte": 1.0, "tokens": 5}), stderr="")

    monkeypatch.setattr(recipe.subprocess, "run", run)
    told = [recipe.words("aws", "1M", name, {}, 1.0, 0, COMMON) for name in "abcd"]
    runs = recipe.Runs(path, 1, "now")
    pending, runs._pool.submit = [], lambda call: pending.append(call)
    runs.begin(told[:2], 1)
    runs.begin(told[2:], 0)
    runs.begin(told, 0)
    for call in pending:
        call()
    assert [row["commit"] for row in runs.all(told)] == ["now"] * 4
    assert order == ["c", "d", "a", "b"]
    assert [row["name"] for row in recipe.Runs(path, 0, "").all(told)] == ["a", "b", "c", "d"]


# --------------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_sides_of_a_step_and_the_peak_compute_in_one_precision(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = load("step")
    monkeypatch.setenv("BENCH_PRECISION", precision)
    monkeypatch.setenv("BENCH_SHAPE", json.dumps({"2M": {}}))
    bf16 = precision == "bf16"
    setting = step.Setting("litgpt", "2M", 64, 1, False, 128)
    built: list[bool] = []
    monkeypatch.setattr(loop, "Worker", lambda *args, **options: built.append(args[5]))
    step.ours(setting, 0, "")
    assert built == [bf16]

    seen: list[bool] = []

    def loss_of(model: Any, x: Any, y: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return model.weight.sum()

    monkeypatch.setitem(step.MODELS, "litgpt", lambda shape, seq_len: (torch.nn.Linear(2, 2), loss_of))
    step.peer(setting, 0, "")()
    assert seen == [bf16]

    drawn: list[torch.dtype] = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, dtype: (drawn.append(dtype), randn(1, dtype=dtype))[1])
    step.peak()
    assert set(drawn) == {torch.bfloat16 if bf16 else torch.float32}
