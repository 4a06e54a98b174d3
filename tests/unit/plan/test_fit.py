"""What small runs say of a large one, where the truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import DataError
from forge_ray.model.arithmetic import newton_schulz_flops
from forge_ray.plan import fit
from forge_ray.plan.fit import Ladder, Run

SETTINGS = PretrainConfig(steps=1500, slots=4, micro_batch=8, seq_len=256)
TARGETS = {
    "dense": ModelConfig(depth=6),
    "experts": ModelConfig(depth=6, num_experts=8, expert_d_ff=128),
    "own shape": ModelConfig(num_layers=7, d_model=320, num_heads=6, num_kv_heads=3, d_ff=768),
}


def target(model: ModelConfig = TARGETS["dense"]) -> Run:
    return Run(model, SETTINGS, 4096, 2)


def ladder(of: Run, *, exponent: float = 0.33, noise: float = 0.0, seed: int = 0) -> list[Run]:
    """Rungs whose loss, time and memory follow laws that are known here."""
    generator = np.random.default_rng(seed)
    return [measured(fit.smaller(of, 0.25 / 1.6**k), exponent, generator.normal(0, noise)) for k in range(6)]


def measured(run: Run, exponent: float = 0.33, off: float = 0.0) -> Run:
    return replace(
        run,
        bits_per_byte=(0.5 + 30 * (run.size / 100) ** -exponent) * (1 + off),
        step_s=float(np.dot(run.time_features(), [7e-12, 2e-4, 5e-11, 1e-9])) * (1 + off),
        peak_bytes=(4e8 + 1.2 * run.known_bytes()) * (1 + off),
    )


@pytest.mark.parametrize("model", TARGETS.values(), ids=TARGETS)
def test_rungs_are_the_target_in_small(model: ModelConfig) -> None:
    whole = target(model)
    rungs = ladder(whole)
    for k, rung in enumerate(rungs):
        assert rung.size == pytest.approx(0.25 / 1.6**k * whole.size, rel=0.25)
        assert rung.tokens / rung.size == pytest.approx(whole.tokens / whole.size, rel=0.02)
        assert rung.config.slots == whole.config.slots
        assert rung.config.micro_batch <= whole.config.micro_batch
        assert rung.model.num_experts == whole.model.num_experts
    assert [rung.size for rung in rungs] == sorted({rung.size for rung in rungs}, reverse=True)


@pytest.mark.parametrize("step", [1.4, 1.6])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8, 16])
def test_a_larger_rung_takes_more_steps(micro_batch: int, step: float) -> None:
    whole = target()
    whole = replace(whole, config=whole.config.replace(micro_batch=micro_batch))
    runs = [whole, *(fit.smaller(whole, 0.25 / step**k) for k in range(6))]
    steps = [run.config.steps for run in runs]
    assert steps == sorted(set(steps), reverse=True)


@pytest.mark.parametrize("exponent", [0.25, 0.33, 0.45])
def test_a_law_is_carried_on(exponent: float) -> None:
    wanted = measured(target(), exponent)
    found = fit.predict(ladder(target(), exponent=exponent), target())
    assert found.bits_per_byte.median == pytest.approx(wanted.bits_per_byte, rel=0.03)
    assert found.bits_per_byte.low < wanted.bits_per_byte < found.bits_per_byte.high
    assert found.hours == pytest.approx(wanted.step_s * SETTINGS.steps / 3600, rel=1e-3)
    assert found.peak_bytes == pytest.approx(wanted.peak_bytes, rel=1e-3)


def test_the_interval_holds_what_it_says_under_noise() -> None:
    wanted = measured(target()).bits_per_byte
    found = [fit.predict(ladder(target(), noise=0.004, seed=seed), target()).bits_per_byte for seed in range(40)]
    assert sum(row.low <= wanted <= row.high for row in found) >= 34  # 36 of 40 at 90%
    assert float(np.median([abs(row.median / wanted - 1) for row in found])) < 0.03
    assert all(row.high / row.low < 1.4 for row in found), "an interval that says nothing holds everything"


def test_muons_own_work_is_carried_on() -> None:
    """With short steps Newton-Schulz is a third of a step, which it is in no larger batch."""
    short = replace(target(), config=SETTINGS.replace(slots=2, micro_batch=1))
    wanted = measured(short)
    muon = 5e-11 * newton_schulz_flops(short.model) / short.workers
    assert muon > 0.3 * wanted.step_s
    assert fit.predict(ladder(short), short).hours == pytest.approx(wanted.step_s * 1500 / 3600, rel=1e-3)
    alone = replace(short, config=short.config.replace(optimizer={"kind": "adamw"}))
    assert len(alone.time_features()) == len(short.time_features()) - 1


def test_a_published_ladder_speaks_for_runs_near_the_jobs() -> None:
    rungs, job = ladder(target()), target()
    rows = [{"size": run.size, "bits_per_byte": run.bits_per_byte} for run in rungs]
    found = Ladder.of({"size": job.size, "tokens": job.tokens, "rungs": rows})
    corpus = 100.0 * job.tokens
    same = found.expects(job.size, job.tokens, corpus)
    assert same == fit.predict(rungs, job).bits_per_byte
    longer = found.expects(job.size, 1.9 * job.tokens, corpus)
    assert longer.median < same.median
    assert longer.low < longer.median < same.median < longer.high == same.high
    assert found.expects(job.size, 2.1 * job.tokens, corpus) is None
    for size in (0.9 * rungs[-1].size, 1.6 * job.size):
        assert found.expects(size, size * job.tokens / job.size, corpus) is None


def test_three_points_are_no_ladder() -> None:
    with pytest.raises(DataError, match="too few runs"):
        fit.predict(ladder(target())[:3], target())
