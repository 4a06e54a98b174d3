"""What a budget buys: within every limit, more for more, and a clear word where nothing fits."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge_ray import prices
from forge_ray.config import ForgeConfig
from forge_ray.config.train import shape_of
from forge_ray.errors import ConfigError
from forge_ray.model.arithmetic import num_parameters, state_bytes, train_flops_per_token
from forge_ray.plan import planner, text
from forge_ray.plan.law import Law
from forge_ray.plan.planner import Plan
from forge_ray.settings import resolve

CORPUS = 2e9


def made(corpus_tokens: float = CORPUS, model: dict[str, Any] | None = None, **limits: Any) -> Plan:
    config = ForgeConfig.model_validate(
        {
            "plan": limits,
            "model": model or {},
            "tokenizer": {"vocab_size": 16384},
            "pretrain": {"seq_len": 1024},
        }
    )
    return planner.make(config, prices.read(config.plan.prices), corpus_tokens)


def refused(**limits: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(**limits)
    return str(caught.value)


@pytest.mark.parametrize("usd", [20.0, 200.0, 2000.0])
def test_every_option_keeps_every_limit(usd: float) -> None:
    options = made(usd=usd, hours=48, nodes=4, max_epochs=2, served_tokens=1e8, max_ms_per_token=5).options
    assert len(options) > 10
    for option in options:
        assert option.usd <= usd * 1.01  # steps are whole
        assert option.hours <= 48 * 1.01
        assert option.epochs <= 2.01
        assert option.serving.ms_per_token <= 5
        assert option.workers <= option.slots
        assert option.parameters <= option.tokens


def test_the_figures_of_an_option_agree_with_each_other() -> None:
    option = made(usd=300, nodes=2, machines=("aws/p5.48xlarge",), market="on-demand").options[0]
    config = ForgeConfig.model_validate({"model": {"depth": option.depth}}).model
    flops = train_flops_per_token(config, 16384, 1024) * option.tokens
    reached = 2 * 8 * 989e12 * 0.40 * min(1, config.d_model / 2048)
    assert option.parameters == num_parameters(config, 16384)
    assert option.tokens == option.steps * option.slots * option.micro_batch * 1024
    assert option.hours == pytest.approx(flops / reached / 3600)
    assert option.train_usd == pytest.approx(option.hours * 2 * 55.04)
    assert option.interruptions == 0


def test_more_money_buys_a_lower_loss_until_the_corpus_ends() -> None:
    losses = [made(usd=usd).options[0].relative_loss for usd in (1, 10, 100)]
    assert losses == sorted(losses, reverse=True)
    rich = [made(usd=usd).options[0] for usd in (1e5, 1e6)]
    assert rich[0].usd == pytest.approx(rich[1].usd), "what the corpus cannot use is not spent"
    assert rich[0].epochs == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("market", ["spot", "on-demand"])
def test_every_option_fits_with_all_that_the_run_holds(market: str) -> None:
    """README's first plan: at 1.2 billion parameters each sum of slots is 5 GB."""
    config = ForgeConfig.model_validate(
        {
            "plan": {"usd": 500, "market": market},
            "tokenizer": {"vocab_size": 32768},
            "pretrain": {"seq_len": 2048},
        }
    )
    listed = prices.read(None)
    for option in planner.make(config, listed, CORPUS).options:
        if option.sharding == "fsdp":
            continue
        chip = listed.chips[listed.machines[option.machine].chip]
        shape = ForgeConfig.model_validate({"model": {"depth": option.depth}}).model
        mine = max(2, option.slots // option.min_workers)
        sums = math.log2(mine) if option.reduction == "exact" else 0
        held = state_bytes(shape, 32768, muon=True, precision="bf16") + 4 * option.parameters * sums
        assert held / 2**30 < option.memory_gib <= 0.8 * chip.memory_gib


def test_who_serves_much_gets_a_smaller_model() -> None:
    idle, busy = (made(usd=1000, served_tokens=served).options[0] for served in (0, 3e10))
    assert busy.parameters < idle.parameters
    assert idle.serve_usd == 0 < busy.serve_usd


def test_a_short_time_between_tokens_makes_the_model_smaller() -> None:
    free, bound = (made(usd=500, serve_on="aws/g6.xlarge", max_ms_per_token=ms).options[0] for ms in (None, 1.0))
    assert free.serving.ms_per_token > 1 >= bound.serving.ms_per_token
    assert bound.parameters < free.parameters


def test_what_does_not_fit_on_one_chip_is_sharded_and_what_does_not_fit_at_all_is_refused() -> None:
    depths = {"model": {"depth": 40}}
    (sharded,) = made(usd=1e5, machines=("aws/p4d.24xlarge",), market="on-demand", **depths).options
    assert (sharded.sharding, sharded.reduction, sharded.workers) == ("fsdp", "fast", 8)
    assert sharded.memory_gib < 40
    assert "GiB on each" in refused(usd=1e5, machines=("aws/g6.xlarge",), serve_on="aws/p5.48xlarge", **depths)


def test_spot_is_cheaper_and_says_what_is_taken_away() -> None:
    spot, firm = (
        made(usd=500, machines=("aws/p5.48xlarge",), market=m, model={"depth": 24}).options[0]
        for m in ("spot", "on-demand")
    )
    assert spot.train_usd < firm.train_usd
    assert spot.interruptions == pytest.approx(0.10 * spot.hours / 24)
    assert spot.hours > firm.hours, "a machine that is away computes nothing"


def test_a_small_corpus_or_budget_is_told_to_adapt_an_open_model() -> None:
    assert "the corpus allows" in made(corpus_tokens=3e6, usd=100).advice
    assert "the budget allows" in made(usd=0.02, machines=("aws/c7a.8xlarge",)).advice
    assert made(usd=100).advice == ""
    assert text.as_text(made(corpus_tokens=3e6, usd=100)).startswith("NO: Adapting an open model")


def test_the_evidence_against_is_what_readme_says() -> None:
    told = made(corpus_tokens=3e6, usd=100).advice
    assert not re.search(r"\b\d\.\d+", told), "figures are README's, where they are kept true"
    readme = Path("README.md").read_text(encoding="utf-8")
    ours = re.search(r"documents, (\d+)-token windows.*\n\s+this model +(\d\.\d+)", readme)
    general = re.search(r"in windows of ([\d,]+)\n\(.*\) it came to (\d\.\d+)", readme)
    assert ours
    assert general
    assert float(general[2]) < float(ours[2])
    assert f"ours in windows of {ours[1]} tokens, SmolLM2 in windows of {general[1]};" in told


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, "a plan needs a budget"),
        ({"usd": 1e-9}, "less than one token per parameter"),
        ({"usd": 100, "machines": ("aws/p6",)}, "did you mean aws/g6.xlarge"),
        ({"usd": 100, "market": "spot", "machines": ("onprem",)}, "a machine on the spot market"),
        ({"usd": 100, "served_tokens": 1e13}, "serving 10,000,000,000,000 tokens costs that alone"),
        ({"usd": 100, "max_ms_per_token": 1e-9}, "plan.max_ms_per_token of"),
        ({"usd": 100, "model": {"num_experts": 8}}, "plan with --model.num_experts 0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_would_do(limits: dict[str, Any], said: str) -> None:
    assert said in refused(**limits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"as_of": "soon"}, "as_of"),
        ({"machines": {"aws/x": {"chip": "b300", "count": 8, "usd_per_hour": 1}}}, "has chip b300, which is not among"),
        ({"machines": {"x": {"chip": "h100", "count": 8, "usd_per_hour": 1}}}, "wants a name like aws/p5.48xlarge"),
        ({"machines": {"aws/x": {"chip": "h100", "count": 8}}}, "usd_per_hour: Field required"),
        ({"chips": {"h100": {"peak_tflops": -1}}}, "greater than 0"),
    ],
)
def test_a_price_file_that_is_wrong_is_named_with_the_place(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    ours = yaml.safe_load(Path(prices.__file__).with_name("prices.yaml").read_text())
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump({**ours, **change}))
    told = refused(usd=100, prices=str(path))
    assert said in told
    assert str(path) in told


def test_prices_of_ones_own_replace_ours(tmp_path: Path) -> None:
    chip = {"peak_tflops": 100, "memory_gib": 80, "memory_gb_per_s": 1000, "train_frac": 0.5, "serve_frac": 0.2}
    machine = {"chip": "mine", "count": 2, "usd_per_hour": 1.0}
    path = tmp_path / "prices.yaml"
    mine = {"mine": {**chip, "max_tokens_per_s": 1000}}
    path.write_text(yaml.safe_dump({"as_of": "2026-11-24", "chips": mine, "machines": {"onprem/mine": machine}}))
    (option,) = made(usd=100, prices=str(path), machines=("onprem",)).options
    assert (option.machine, option.workers) == ("onprem/mine", 2)
    assert "no such file" in refused(usd=1, prices=str(tmp_path / "none.yaml")).lower()


@pytest.mark.parametrize("theirs", [{}, {"depth": 3}, {"num_layers": 3, "d_ff": 96}, {"num_experts": 8}], ids=str)
def test_the_written_plan_lies_over_any_job_and_trains_what_was_planned(tmp_path: Path, theirs: dict[str, Any]) -> None:
    option = made(usd=100, model={"tied_embeddings": False}).options[0]
    job, path = tmp_path / "job.yaml", tmp_path / "plan.yaml"
    job.write_text(yaml.safe_dump({"tokenizer": {"vocab_size": 512}, "model": theirs}))
    text.write_job(option, str(path))
    config = resolve([job, path], [], {}).config
    assert num_parameters(config.model, 16384) == option.parameters
    assert config.model.num_layers == shape_of(option.depth)["num_layers"]
    batch = config.pretrain.slots * config.pretrain.micro_batch * config.pretrain.seq_len
    assert config.pretrain.steps * batch == option.tokens


def test_a_plan_for_one_worker_lies_over_a_job_that_wants_two(tmp_path: Path) -> None:
    job, path = tmp_path / "job.yaml", tmp_path / "plan.yaml"
    job.write_text("pretrain: {min_workers: 2, max_workers: 2}")
    one, many = (made(usd=100, machines=(name,)).options[0] for name in ("aws/g6.xlarge", "aws/p5.48xlarge"))
    for option, fewest in ((one, 1), (many, 4)):
        text.write_job(option, str(path))
        pretrain = resolve([job, path], [], {}).config.pretrain
        assert (pretrain.min_workers, pretrain.max_workers) == (fewest, option.workers)


def test_the_law_is_the_published_one() -> None:
    law = Law()
    assert law.loss(70e9, 1.4e12, 1.4e12) == pytest.approx(1.974, abs=0.002)  # Chinchilla itself
    assert 10 < 1.4e12 / law.fitting_parameters(1.4e12) < 40
    size = law.fitting_parameters(1e9)
    once, four, forty = (law.loss(size, epochs * 1e9, 1e9) for epochs in (1, 4, 40))
    fresh = law.loss(size, 4e9, 4e9)
    assert fresh < four < once
    assert four - fresh < 0.25 * (once - four), "up to four passes are nearly as good as new text"
    assert forty > law.loss(size, 40e9, 40e9) + 0.05, "forty are not"
