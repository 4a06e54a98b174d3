"""Progress where stderr is no terminal, and how quantities are written."""

from __future__ import annotations

import contextlib

import pytest

from forge_ray import telemetry
from forge_ray.telemetry import Progress, format_bytes, format_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Set `clock[0]` to move the time that `Progress` sees."""
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    return now


def test_progress_is_told_at_intervals_and_at_the_end_on_stderr_only(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", total=100) as progress:
        for done in range(1, 101):
            clock[0] += 1.0
            progress.update(done, f"loss {done}")
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert told.out == ""
    assert [line.split(",")[0].split()[1] for line in lines[:2]] == ["10/100", "20/100"]
    assert lines[0].strip() == "train: 10/100, loss 10, 1 min 30 s left"
    assert lines[-1].strip() == "train: 100/100, loss 100"
    assert len(lines) == 11


def test_the_rate_of_a_resumed_run_does_not_count_what_was_done_before(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", total=100, start=80) as progress:
        clock[0] += telemetry.PLAIN_EVERY_S
        progress.update(90)
        assert "10.0 s left" in capsys.readouterr().err


@pytest.mark.parametrize(("done", "told"), [(0, ""), (3, "  train: 3/10, 7.0 s left\n")])
def test_work_that_fails_tells_how_far_it_came_if_it_had_begun(
    clock: list[float], capsys: pytest.CaptureFixture[str], done: int, told: str
) -> None:
    with contextlib.suppress(ZeroDivisionError), Progress("train", total=10) as progress:
        clock[0] += done
        progress.update(done)
        progress.update(1 // 0)
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.44, "9.4 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s"), (3599.6, "1 h 00 min"), (7800, "2 h 10 min")],
)
def test_durations_carry_into_the_next_unit(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (999.96e9, "1.0 TB"), (5e15, "5000.0 TB")],
)
def test_sizes_carry_into_the_next_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text
