"""The simulation of failures: its closed forms and what it plays agree, and both know the easy cases."""

from __future__ import annotations

import importlib.util
import math
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def failures() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "failures.py"
    spec = importlib.util.spec_from_file_location("bench_failures", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("nodes", [100, 3000, 10_000])
def test_closed_forms_are_what_playing_gives(failures: ModuleType, nodes: int) -> None:
    rate = failures.RATES["RSC-1"]
    for name, closed, played in failures.schemes(failures.Ours()):
        assert closed(nodes, rate) == pytest.approx(played(nodes, rate, 20_000, 1), abs=0.012), name


def test_without_failures_only_saving_is_lost(failures: ModuleType) -> None:
    ours = failures.Ours(saving_frac=0.02)
    assert failures.ours_goodput(ours, 100, 1e-12) == pytest.approx(0.98)
    assert failures.ours_goodput(replace(ours, spare=False), 100, 1e-12) == pytest.approx(0.98)
    standby = failures.STANDBY
    assert failures.restart_goodput(standby, 100, 1e-9) == pytest.approx(10.0 / 10.09, abs=1e-4)


def test_mending_takes_as_long_as_it_takes_if_nothing_fails(failures: ModuleType) -> None:
    assert failures.mended_s([(0.9, 10.0), (0.1, 60.0)], 1e-9) == pytest.approx(15.0, rel=1e-5)
    assert failures.mended_s([(1.0, 100.0)], 1 / 50) == pytest.approx(50 * math.expm1(2.0))


def test_a_missing_node_costs_a_whole_slot(failures: ModuleType) -> None:
    ours = failures.Ours(slots_per_node=4)
    assert failures.speed(0, ours, 100) == 1.0
    assert failures.speed(1, ours, 100) == failures.speed(20, ours, 100) == 0.8
    assert failures.speed(21, ours, 100) == pytest.approx(4 / 6)
    assert failures.speed(99, ours, 100) == pytest.approx(1 / 100)


def test_the_interval_of_young_and_daly_is_close_to_the_best(failures: ModuleType) -> None:
    scheme, nodes, rate = failures.REQUEUE, 2000, failures.RATES["Llama 3"]
    chosen = failures.restart_goodput(scheme, nodes, rate)
    others = [failures.restart_goodput(replace(scheme, interval_s=float(s)), nodes, rate) for s in range(20, 4000, 20)]
    assert max(others) - 0.001 < chosen <= max(others) + 1e-6


def test_the_closed_form_agrees_with_metas_estimate(failures: ModuleType) -> None:
    found = next(row for name, row in failures.checks().items() if name.startswith("2410.21680"))
    assert found["this closed form"] == pytest.approx(found["theirs"], abs=0.005)


def test_the_plot_is_whole_and_the_committed_one(failures: ModuleType) -> None:
    plot = failures.plotted(failures.schemes(failures.Ours()))
    ElementTree.fromstring(plot)
    assert plot == (failures.ROOT / "bench" / "failures.svg").read_text(encoding="utf-8")
