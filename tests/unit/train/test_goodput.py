"""The ledger of a run: every second has one place, every step counts once, every fault is told."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from forge_ray.events import Events
from forge_ray.storage import Storage
from forge_ray.train import goodput
from forge_ray.train.goodput import PARTS, Account, Ledger, account

T0 = 1_790_000_000.0


class Log:
    """Records of a run whose clock the test turns."""

    def __init__(self) -> None:
        self.now, self.number, self.rows = T0, 0, []

    def add(self, kind: str, after: float = 0.0, **fields: Any) -> Log:
        self.now = round(self.now + after, 3)
        self.rows.append({"time_s": self.now, "event": kind, **fields})
        return self

    def start(self, after: float = 0.0, step: int = 0) -> Log:
        return self.add("start", after, host="head", step=step)

    def form(self, cause: str, size: int, after: float = 0.0, **fields: Any) -> Log:
        return self.add("form", after, cause=cause, world_size=size, step=self.number, **fields)

    def step(self, wall_s: float = 1.0, after: float = 0.0, number: int | None = None, **fields: Any) -> Log:
        self.number = self.number + 1 if number is None else number
        said = {"loss": 3.0, "tokens": 100, "wall_s": wall_s, **fields}
        return self.add("step", after + wall_s, step=self.number, **said)


def parts(found: Account) -> dict[str, float]:
    return {part: getattr(found, f"{part}_s") for part in PARTS if getattr(found, f"{part}_s")}


def test_an_undisturbed_run_is_useful_but_for_its_start_its_data_and_its_saving() -> None:
    log = Log().start().form("start", 2, after=4.0, joined=["a", "b"])
    log.step(data_s=0.1).step().add("checkpoint", step=2, tier="store", stall_s=0.02).step(after=0.02).add("end")
    found = account(log.rows)
    assert parts(found) == pytest.approx({"waiting": 4.0, "useful": 2.9, "data": 0.1, "saving": 0.02})
    assert found.wall_s == pytest.approx(log.now - T0)
    assert (found.num_tokens, found.num_steps, found.faults) == (300, 3, ())
    assert found.goodput_frac == pytest.approx(2.9 / 7.02)
    assert found.ettr_frac == pytest.approx(3.0 / 7.02)
    assert found.tokens_per_s == pytest.approx(300 / 7.02)


def test_a_loss_within_a_step_costs_its_stall_and_what_is_computed_again() -> None:
    log = Log().start().form("start", 3, joined=["a", "b", "c"]).step()
    log.add("seat", 0.4, seat="b", host="h2", what="died", why="signal 9").add("seat", 0.02, seat="b", what="spawned")
    log.form("lost", 2, after=0.1, lost=["b"], missing_slots=3)
    log.add("step", 1.18, step=2, tokens=100, wall_s=1.7, stall_s=0.3, recomputed_s=0.4)
    log.form("join", 3, joined=["b"], transfer_s=0.05).step(number=3)
    found = account(log.rows)
    assert parts(found) == pytest.approx({"useful": 3.0, "stalled": 0.3, "recomputed": 0.4})
    (fault,) = found.faults
    assert (fault.cause, fault.seat, fault.host, fault.why, fault.step) == ("died", "b", "h2", "signal 9", 1)
    assert (fault.world_size, fault.missing_slots) == (2, 3)
    assert fault.stall_s == pytest.approx(1.3)
    assert fault.back_s == pytest.approx(1.3)


@pytest.mark.parametrize("order", [("died", "form"), ("form", "died")])
@pytest.mark.parametrize("spawned_first", [True, False])
def test_a_loss_is_one_fault_whoever_tells_it_first(order: tuple[str, str], spawned_first: bool) -> None:
    log = Log().start().form("start", 2, joined=["a", "b"]).step()
    for what in order:
        if what == "form":
            log.form("lost", 1, after=0.1, lost=["b"], missing_slots=1)
        else:
            log.add("seat", 0.1, seat="b", what="died", why="signal 9")
            if spawned_first:
                log.add("seat", 0.01, seat="b", what="spawned")
    found = account(log.step().form("join", 2, joined=["b"]).step().rows)
    assert found.faults_by_cause == {"died": 1}
    again = account(log.add("seat", 0.1, seat="b", what="died").form("lost", 1, lost=["b"]).step().rows)
    assert again.faults_by_cause == {"died": 2}


def test_a_seat_that_dies_again_before_it_was_back_is_another_fault() -> None:
    log = Log().start().form("start", 2, joined=["a", "b"]).step()
    for _ in range(3):
        log.add("seat", 0.1, seat="b", what="died")
    log.add("seat", 0.1, seat="b", what="gone")
    assert account(log.step().rows).faults_by_cause == {"died": 3}


def test_a_hang_keeps_its_name_and_its_stacks_when_it_is_ended_by_force() -> None:
    log = Log().start().form("start", 2, joined=["a", "b"]).step()
    log.add("seat", 45, seat="b", what="hang", why="no progress for 45 s")
    log.add("seat", 0.1, seat="b", what="stacks", why="in all_reduce")
    log.add("seat", 0.1, seat="b", what="died", why="signal 9").form("lost", 1, lost=["b"])
    log.add("step", 0.9, step=2, tokens=100, wall_s=46.1, stall_s=45.3)
    found = account(log.rows)
    (fault,) = found.faults
    assert (fault.cause, fault.stacks, fault.why) == ("hang", "in all_reduce", "no progress for 45 s")
    assert fault.stall_s == pytest.approx(45.3)
    assert found.stalled_s == pytest.approx(45.3)


def test_the_first_group_comes_about_while_nobody_trains() -> None:
    log = Log().start().form("start", 2, after=6.0, joined=["a", "b"])
    found = account(log.add("step", 1.0, step=1, tokens=100, wall_s=7.0, stall_s=6.0).rows)
    assert parts(found) == pytest.approx({"useful": 1.0, "waiting": 6.0})


def test_a_preempted_node_leaves_once() -> None:
    log = Log().start()
    for seat in ("h1/0", "h2/0"):
        log.add("seat", seat=seat, host=seat[:2], what="came")
    log.form("start", 2, joined=["h1/0", "h2/0"]).step().add("seat", seat="h2/0", what="notice", why="spot")
    log.form("drain", 1, lost=[], joined=[]).add("seat", 0.2, seat="h2/0", what="gone").step(3600.0)
    found = account(log.rows)
    assert found.faults_by_cause == {"notice": 1}
    assert found.node_hours == pytest.approx(1.0, abs=0.001)
    assert found.faults[0].world_size == 1


def test_a_driver_that_comes_back_waited_and_repeats_what_was_not_saved() -> None:
    log = Log().start().form("start", 1, joined=["a"])
    for _ in range(4):
        log.step()
    log.start(after=10.0, step=2).form("start", 1, after=2.0, joined=["a"])
    for number in (3, 4, 5):
        log.step(number=number)
    found = account(log.rows)
    assert parts(found) == pytest.approx({"useful": 5.0, "recomputed": 2.0, "waiting": 12.0})
    assert (found.num_tokens, found.num_steps, found.num_repeated) == (500, 5, 2)
    (fault,) = found.faults
    assert (fault.cause, fault.stall_s) == ("restart", pytest.approx(13.0))


def test_a_driver_that_adopts_a_run_that_went_on_costs_nothing() -> None:
    log = Log().start().form("start", 1, joined=["a"]).step().step()
    log.add("start", 0.5, host="head", step=2).add("step", 0.5, step=3, tokens=100, wall_s=1.0)
    found = account(log.rows)
    assert parts(found) == pytest.approx({"useful": 3.0})
    assert found.faults_by_cause == {"restart": 1}
    assert found.node_hours == pytest.approx(3 / 3600)


def test_a_run_that_ended_and_goes_on_later_had_no_fault() -> None:
    log = Log().start().step().add("end", step=1).add("seat", 0.1, seat="a", what="died")
    found = account(log.start(after=100.0, step=1).step().rows)
    assert found.faults == ()
    assert parts(found) == pytest.approx({"useful": 2.0, "waiting": 100.1})


def test_the_same_commit_told_by_two_processes_counts_once() -> None:
    log = Log().start().step(2.0)
    log.add("step", 0.001, step=1, tokens=100, wall_s=2.0).step(2.0)
    found = account(log.rows)
    assert (found.num_tokens, found.num_repeated) == (200, 1)
    assert found.useful_s == pytest.approx(4.0)
    assert found.wall_s == pytest.approx(4.001)


def test_steps_whose_records_died_with_their_worker_were_committed_all_the_same() -> None:
    log = Log().start().step()
    log.add("seat", 5.0, seat="a", what="died").form("lost", 1, lost=["a"])
    found = account(log.step(number=7).rows)
    assert (found.num_steps, found.num_unrecorded, found.num_tokens) == (7, 5, 700)
    assert parts(found) == pytest.approx({"useful": 7.0})


def test_steps_told_again_count_where_their_first_record_was_lost() -> None:
    log = Log().start().form("start", 2, joined=["a", "b"]).step().step()
    log.add("seat", 3.2, seat="a", what="died").form("lost", 1, after=0.1, lost=["a"])  # steps 3 to 5 were not told
    for number in (1, 2, 3, 4, 5):
        log.add("step", step=number, tokens=100, wall_s=1.0, again=True)
    log.add("step", 0.9, step=6, tokens=100, wall_s=1.2, stall_s=0.1)
    found = account(log.rows)
    assert (found.num_steps, found.num_tokens, found.num_repeated, found.num_unrecorded) == (6, 600, 0, 0)
    assert parts(found) == pytest.approx({"useful": 6.1, "stalled": 0.1})
    assert found.faults[0].stall_s == pytest.approx(1.0)


def test_who_leaves_after_a_stop_is_no_fault() -> None:
    log = Log().start().form("start", 2, joined=["a", "b"]).step().add("stop").step()
    log.add("seat", 0.1, seat="a", what="gone").add("seat", 0.1, seat="b", what="died")
    log.start(after=60.0, step=2).form("resume", 2, joined=["a", "b"]).step()
    assert account(log.rows).faults == ()


def test_a_spare_that_leaves_disturbs_nobody() -> None:
    log = Log().start().form("start", 1, joined=["a"]).add("seat", seat="c", what="came").step()
    log.add("seat", seat="c", what="gone").step()
    assert account(log.rows).faults == ()


def test_a_ledger_that_begins_late_takes_the_step_from_the_group() -> None:
    log = Log().add("start", host="h")
    log.number = 40
    found = account(log.form("resume", 1, joined=["a"]).step().rows)
    assert (found.num_steps, found.num_tokens, found.num_unrecorded) == (1, 100, 0)


def test_a_rollback_makes_what_it_threw_away_recomputed() -> None:
    log = Log().start()
    for _ in range(3):
        log.step()
    said = {"verdict": "rollback", "reason": "spike", "loss": 9.0, "grad_norm": "nan", "back_to": 1}
    log.add("guard", 0.5, step=4, **said, samples=[["wiki", "d1"], ["code", "d2"]], num_samples=40)
    log.step(after=1.5, number=2).step().step()
    found = account(log.rows)
    assert parts(found) == pytest.approx({"useful": 4.0, "recomputed": 4.0})
    (verdict,) = found.verdicts
    assert (verdict.verdict, verdict.back_to, verdict.loss) == ("rollback", 1, 9.0)
    assert math.isnan(verdict.grad_norm or 0.0)
    assert verdict.samples == (("wiki", "d1"), ("code", "d2"))
    assert found.num_skipped_samples == 40


def test_saving_told_late_is_taken_from_the_step_in_which_it_is_told() -> None:
    log = Log().start().step().add("checkpoint", 0.0, step=1, stall_s=0.2, write_s=3.0).step()
    assert parts(account(log.rows)) == pytest.approx({"useful": 1.8, "saving": 0.2})


def test_an_older_run_has_an_account() -> None:
    rows = [
        {"time_s": T0, "event": "start", "step": 0, "world_size": 2, "host": "h", "shards": "x"},
        {"time_s": T0 + 3, "event": "step", "step": 1, "wall_s": 1.0, "tokens": 10, "world_size": 2, "data_s": 0.25},
        {"time_s": T0 + 7, "event": "checkpoint", "step": 1},
        {"time_s": T0 + 8, "event": "step", "step": 2, "tokens": 10},
        {"time_s": T0 + 9, "event": "from the future", "step": None},
        {"time_s": T0 + 10, "event": "seat"},
        {"time_s": T0 + 10, "event": "form"},
        {"time_s": T0 + 10, "event": "guard", "loss": math.nan},
        {"time_s": T0 + 11, "event": "step", "step": 3, "tokens": None, "wall_s": None, "stall_s": "?"},
    ]
    found = account(rows, usd_per_node_hour=1.0)
    assert found.wall_s == 11.0
    assert (found.num_tokens, found.num_steps) == (20, 3)
    assert found.waiting_s == pytest.approx(2.0)


def test_nodes_are_hosts_and_cost_while_they_are_in_the_group() -> None:
    log = Log().start()
    for seat, host in (("a", "h1"), ("b", "h1"), ("c", "h2")):
        log.add("seat", seat=seat, host=host, what="spawned")
    log.form("start", 3, joined=["a", "b", "c"]).step(1800.0)
    log.form("drain", 2, lost=["c"]).step(1800.0)
    found = account(log.rows, usd_per_node_hour=4.0)
    assert found.node_hours == pytest.approx(1.5)
    assert found.usd == pytest.approx(6.0)
    assert found.faults_by_cause == {"drained": 1}
    assert account(log.rows).usd is None


def test_nobody_pays_while_driver_and_workers_are_gone() -> None:
    log = Log().start().form("start", 2, joined=["a", "b"]).step(3600.0)
    log.start(after=7200.0, step=1).form("start", 1, after=1800.0, joined=["a"]).step(1800.0)
    assert account(log.rows).node_hours == pytest.approx(2.0 + 1.0)


def test_stalls_are_ranked_without_those_that_were_announced() -> None:
    log = Log().start().form("start", 2, joined=["a", "b"])
    for stall_s in range(1, 21):
        log.step().add("seat", seat="b", what="died").form("lost", 1, lost=["b"])
        log.add("step", stall_s, step=log.number + 1, tokens=100, wall_s=float(stall_s), stall_s=stall_s - 1)
        log.number += 1
        log.form("join", 2, joined=["b"])
    log.add("seat", seat="b", what="notice").form("drain", 1, lost=["b"]).step(0.1)
    found = account(log.rows)
    assert [found.stall_s(share) for share in (0.5, 0.95, 1.0)] == pytest.approx([10.0, 19.0, 20.0])
    assert found.faults_by_cause == {"died": 20, "notice": 1}


def test_the_worst_hour_shows_what_the_whole_run_hides() -> None:
    log = Log().start().form("start", 1, joined=["a"])
    for number in range(600):
        log.step(60.0)
        if number == 299:
            log.start(after=1800.0, step=300).form("start", 1, joined=["a"])
    found = account(log.rows)
    assert found.ettr_frac == pytest.approx(36000 / 37800)
    assert found.ettr_hour_min_frac == pytest.approx(0.5, abs=0.02)


def test_line_and_metrics_say_what_is_known() -> None:
    assert goodput.line(account([])) == ""
    assert goodput.metrics(account([]))["forge_committed_step"] == 0.0
    assert "forge_goodput_ratio" not in goodput.metrics(account([]))
    log = Log().start().form("start", 2, joined=["a", "b"]).step(9.6)
    assert goodput.line(account(log.rows)) == "goodput 1.00"
    log.add("seat", seat="b", what="died").form("lost", 1, lost=["b"]).step(0.4, stall_s=0.2)
    found = account(log.rows, usd_per_node_hour=3600.0)
    assert goodput.line(found) == "goodput 0.98, 1 fault, stall p95 0.4 s, $19.60"
    gauges = goodput.metrics(found)
    assert gauges["forge_goodput_ratio"] == pytest.approx(0.98)
    assert gauges["forge_stall_p95_seconds"] == pytest.approx(0.4)
    assert gauges["forge_cost_usd"] == pytest.approx(19.6)
    assert all(isinstance(value, float) for value in gauges.values())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_told_every_second_has_one_place(seed: int) -> None:
    draw, log = random.Random(seed), Log()
    log.add("seat", seat="s0", host="h", what="spawned").start()
    for _ in range(300):
        after, seat = draw.choice([0.0, 0.001, 0.3, 7.0]), f"s{draw.randrange(4)}"
        match draw.choice(["step"] * 6 + ["start", "form", "seat", "checkpoint", "guard", "end"]):
            case "step":
                wall_s = draw.choice([0.0, 0.2, 3.0])
                number = max(1, log.number + draw.choice([1, 1, 1, 1, -2, 3]))
                spent = {name: draw.choice([0.0, 0.1, 5.0]) for name in ("stall_s", "recomputed_s", "data_s")}
                spent["again"] = draw.random() < 0.1
                log.step(wall_s, draw.choice([-1.0, 0.0, 0.01, 4.0]), number, **spent)
            case "start":
                log.start(after, log.number)
            case "form":
                cause = draw.choice(["start", "lost", "join", "drain", "resume"])
                log.form(cause, draw.randrange(1, 5), after, lost=[seat], joined=[f"s{draw.randrange(4)}"])
            case "seat":
                log.add("seat", after, seat=seat, what=draw.choice(["died", "hang", "notice", "spawned", "refused"]))
            case "checkpoint":
                log.add("checkpoint", after, stall_s=draw.choice([0.01, 2.0]))
            case kind:
                log.add(kind, after, step=log.number)
    log.rows.sort(key=lambda row: row["time_s"])
    ledger, spans = Ledger(), []
    for row in log.rows:
        spans += [span for span in [ledger.add(row)] if span]
        assert all(getattr(ledger.account(), f"{part}_s") >= 0 for part in PARTS)
    found = ledger.account()
    first = next(row["time_s"] for row in log.rows if row["event"] == "start")
    begin_s = min(first, *(span.begin_s for span in spans))
    assert found.wall_s == pytest.approx(log.rows[-1]["time_s"] - begin_s, abs=2e-6)
    assert sum(parts(found).values()) == pytest.approx(found.wall_s, abs=1e-6)
    assert found == account(log.rows)
    assert all(before.end_s == after.begin_s for before, after in itertools.pairwise(spans))


def test_records_go_through_the_log(store_uri: str) -> None:
    storage = Storage(store_uri)
    events = Events(storage, "run")
    events.add("start", step=0, host="h")
    events.add("form", cause="start", world_size=1, joined=["a"])
    events.add("step", step=1, tokens=7, wall_s=0.0)
    events.flush()
    found = account(Events.read(storage, "run"))
    assert (found.num_tokens, found.world_size) == (7, 1)
