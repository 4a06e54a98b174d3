"""What ends a run for good: deaths again and again without a step, but not those that were ordered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from forge_ray.errors import TrainError
from forge_ray.train.elastic.coordinator import LOST_EXIT, Coordinator
from forge_ray.train.elastic.membership import Seat

LIMITS = {"min_workers": 1, "max_workers": 4, "hang_s": 45.0, "data_wait_s": 600.0}


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator("run", str(tmp_path), LIMITS)


def _die(coordinator: Coordinator, seats: int, *, code: int = -9, ordered: bool = False) -> None:
    for number in range(seats):
        name = f"host/{number}"
        coordinator._writers.setdefault(name, None)  # type: ignore[arg-type]
        seat = coordinator._membership.seats.setdefault(name, Seat(name, 0.0))
        seat.pid, seat.state, seat.replaced_s = 1, "in", 1.0 if ordered else None
        coordinator._hear(name, {"kind": "died", "pid": 1, "code": code, "why": "killed", "tail": "the last line"})


def _error(coordinator: Coordinator) -> Any:
    coordinator._send = lambda name, message: None  # type: ignore[method-assign]
    return asyncio.run(coordinator.news())[1]


def _ended_after(coordinator: Coordinator, times: int, seats: int, **how: Any) -> int:
    """How often all seats died before the run was given up; 0 if it was not."""
    coordinator._send = lambda name, message: None  # type: ignore[method-assign]
    for time in range(1, times + 1):
        _die(coordinator, seats, **how)
        if _error(coordinator):
            return time
    return 0


def test_deaths_again_and_again_end_it_and_in_a_large_group_not_at_the_first_blow(coordinator: Coordinator) -> None:
    assert _ended_after(coordinator, 20, seats=2) == 5
    error = _error(coordinator)
    assert isinstance(error, TrainError)
    assert "the last line" in str(error.got)


def test_in_a_large_group_one_blow_does_not_end_it(coordinator: Coordinator) -> None:
    assert _ended_after(coordinator, 20, seats=16) == 3


def test_deaths_that_were_ordered_do_not_count(coordinator: Coordinator) -> None:
    assert _ended_after(coordinator, 20, seats=4, ordered=True) == 0


def test_a_group_that_breaks_for_ever_is_given_up_too(coordinator: Coordinator) -> None:
    assert _ended_after(coordinator, 30, seats=2, code=LOST_EXIT) == 20


def test_a_step_between_begins_the_count_anew(coordinator: Coordinator) -> None:
    for _ in range(20):
        _die(coordinator, 4)
        coordinator._hear("host/0", {"kind": "event", "record": {"event": "step", "step": 1, "wall_s": 1.0}})
    assert _error(coordinator) is None


def test_keepers_that_do_not_start_end_it(coordinator: Coordinator) -> None:
    for _ in range(10):
        asyncio.run(coordinator.tell("host/0", "no memory"))
    assert "no memory" in str(_error(coordinator).got)
