"""The rules of membership, played through without any process: who is told to form which group, and who hangs."""

from __future__ import annotations

import random
from typing import Any

import pytest

from forge_ray.train.elastic.membership import Membership

HOST = "torch, avx512"


class Play:
    """A coordinator's rules, a clock, and seats that answer as compute processes do."""

    def __init__(self, least: int = 1, most: int = 4, hang_s: float = 45.0) -> None:
        self.rules = Membership(least, most, hang_s, 600.0)
        self.now_s, self.pids = 100.0, iter(range(1, 10_000))
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.news: list[dict[str, Any]] = []

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        out, news = self.rules.take()
        self.told += out
        self.news += news
        return out

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        self.now_s += seconds
        self.rules.tick(self.now_s)
        return self.take()

    def status(self, name: str, state: str, generation: int = 0, step: int = -1, **more: Any) -> None:
        pid = self.rules.seats[name].pid
        facts = {"pid": pid, "state": state, "generation": generation, "step": step, "store": f"{name}:1"}
        self.rules.status(name, {"host_class": HOST, **facts, **more}, self.now_s)

    def ready(self, *names: str, **more: Any) -> None:
        for name in names:
            if name not in self.rules.seats:
                self.rules.hello(name, 0, self.now_s)
            self.rules.seats[name].pid = next(self.pids)
            self.status(name, "ready", **more)

    def obey(self, out: list[tuple[str, dict[str, Any]]], step: int = 0) -> list[str]:
        """All who are told to form a group are in it; returns the members."""
        members: list[str] = []
        for name, message in out:
            if message["kind"] == "form" and message["rank"] >= 0:
                members = message["members"]
                assert members[message["rank"]] == name
                self.status(name, "in", message["generation"], step, members=members)
            elif message["kind"] == "form":
                self.status(name, "left", message["generation"], step)
        return members

    def started(self, *names: str) -> Play:
        self.ready(*names)
        assert self.obey(self.wait(1.0)) == list(names)
        self.take()
        return self


def test_the_first_group_waits_a_second_for_the_others_and_no_longer() -> None:
    play = Play()
    play.rules.hello("c", 0, play.now_s)
    play.ready("a", "b")
    assert play.take() == []
    assert play.obey(play.wait(1.0)) == ["a", "b"]


def test_all_that_there_can_be_start_at_once() -> None:
    play = Play(most=2)
    play.ready("a", "b")
    assert play.obey(play.take()) == ["a", "b"]


def test_fewer_than_the_least_wait() -> None:
    play = Play(least=2)
    play.ready("a")
    assert play.wait(10.0) == []
    play.ready("b")
    assert play.obey(play.wait(0.0)) == ["a", "b"]


def test_a_newcomer_joins_at_a_boundary_with_the_last_rank() -> None:
    play = Play().started("a", "b")
    play.ready("c")
    out = play.wait(1.0)
    assert {message["voluntary"] for _, message in out} == {True}
    assert {message["store"] for _, message in out} == {"a:1"}
    assert play.obey(out) == ["a", "b", "c"]


def test_survivors_form_the_next_group_at_once_and_the_seat_comes_back() -> None:
    play = Play().started("a", "b", "c")
    play.rules.died("a", play.rules.seats["a"].pid, "killed", play.now_s)
    out = play.take()
    assert {message["voluntary"] for _, message in out} == {False}
    assert {tuple(message["lost"]) for _, message in out} == {("a",)}
    assert play.obey(out) == ["b", "c"]
    play.ready("a")
    assert play.obey(play.wait(1.0)) == ["b", "c", "a"]


def test_of_more_deaths_than_one_the_last_group_counts() -> None:
    play = Play().started("a", "b", "c", "d")
    play.rules.died("a", play.rules.seats["a"].pid, "killed", play.now_s)
    play.rules.gone("b", play.now_s)
    out = play.take()
    newest = max(message["generation"] for _, message in out)
    assert play.obey([row for row in out if row[1]["generation"] == newest]) == ["c", "d"]
    play.status("c", "lost", newest - 1)  # late news of the group before
    assert play.take() == []


def test_when_everybody_is_lost_the_run_begins_anew_from_what_is_stored() -> None:
    play = Play(least=2).started("a", "b")
    generation = play.rules.generation
    for name in ("a", "b"):
        play.rules.died(name, play.rules.seats[name].pid, "killed", play.now_s)
    play.take()
    play.ready("a", "b")
    out = play.wait(1.0)
    assert {message["cause"] for _, message in out} == {"resume"}
    assert {message["generation"] for _, message in out} == {play.rules.generation}
    assert play.rules.generation > generation


def test_one_survivor_of_two_waits_where_two_are_wanted() -> None:
    play = Play(least=2).started("a", "b")
    play.rules.died("b", play.rules.seats["b"].pid, "killed", play.now_s)
    assert play.take() == []
    play.ready("b")
    assert play.obey(play.wait(0.0)) == ["a", "b"]


def test_a_drained_seat_leaves_at_a_boundary_and_does_not_come_back() -> None:
    play = Play().started("a", "b", "c")
    play.rules.drain("b", play.now_s, "spot")
    out = play.take()
    assert {name: message["rank"] for name, message in out} == {"a": 0, "c": 1, "b": -1}
    play.obey(out)
    play.rules.died("b", play.rules.seats["b"].pid, "exit code 0", play.now_s)
    assert play.wait(10.0) == []
    assert [row["what"] for row in play.news if row["seat"] == "b"] == ["came", "notice"]


def test_when_all_are_to_leave_and_nobody_comes_they_are_told_to_end_once() -> None:
    play = Play().started("a", "b")
    for name in ("a", "b"):
        play.rules.drain(name, play.now_s, "spot")
    out = play.take()
    assert {name: message["rank"] for name, message in out} == {"b": 0, "a": -1}, "a leaves first"
    play.obey(out)
    assert [(name, message["kind"]) for name, message in play.wait(1.0)] == [("b", "stop")]
    assert play.wait(5.0) == []


def test_spares_beyond_the_most_wait_until_a_place_is_free() -> None:
    play = Play(most=2).started("a", "b")
    play.ready("c")
    assert play.wait(5.0) == []
    play.rules.died("a", play.rules.seats["a"].pid, "killed", play.now_s)
    assert play.obey(play.take()) == ["b", "c"]


def test_a_seat_that_would_compute_other_bits_is_refused_aloud_once() -> None:
    play = Play().started("a", "b")
    play.ready("c", host_class="torch, avx2")
    assert play.wait(5.0) == []
    assert play.wait(5.0) == []
    assert [row["seat"] for row in play.news if row["what"] == "refused"] == ["c"]


def test_a_new_coordinator_adopts_the_group_that_it_finds() -> None:
    play = Play()
    for name in ("a", "b"):
        play.rules.hello(name, next(play.pids), play.now_s)
        play.status(name, "in", 7, 40, members=["a", "b"])
    assert play.wait(10.0) == []
    assert (play.rules.generation, play.rules.members) == (7, ["a", "b"])
    play.rules.died("a", play.rules.seats["a"].pid, "killed", play.now_s)
    assert play.obey(play.take()) == ["b"]


@pytest.mark.parametrize("state", ["in", "lost"])
def test_a_new_coordinator_waits_a_while_for_the_rest_of_a_group(state: str) -> None:
    play = Play()
    play.rules.hello("a", next(play.pids), play.now_s)
    play.status("a", state, 7, 40, members=["a", "b"])
    assert play.wait(3.0) == []
    assert play.obey(play.wait(3.0)) == ["a"]
    assert play.rules.generation == 8


def test_who_was_left_behind_is_told_to_come_back() -> None:
    play = Play().started("a", "b")
    play.rules.gone("b", play.now_s)
    play.obey(play.take())
    play.rules.hello("b", next(play.pids), play.now_s)
    play.status("b", "in", 1, 3, members=["a", "b"])
    assert [(name, message["kind"]) for name, message in play.take()] == [("b", "rejoin")]


def test_who_lost_its_group_unheard_is_taken_in_again() -> None:
    play = Play().started("a", "b", "c")
    play.rules.gone("b", play.now_s)  # its keeper's connection broke, and the others went on
    assert play.obey(play.take()) == ["a", "c"]
    play.rules.hello("b", next(play.pids), play.now_s)
    play.status("b", "lost", 1, 3, members=["a", "b", "c"])  # said before it heard of anything
    assert play.obey(play.wait(1.0)) == ["a", "c", "b"]


def test_who_lost_its_group_when_the_run_was_over_is_told_to_end() -> None:
    play = Play().started("a", "b", "c")
    play.status("a", "done", 1, 9)
    play.rules.died("b", play.rules.seats["b"].pid, "killed", play.now_s)
    play.status("c", "lost", 1, 9)
    assert {name for name, message in play.wait(1.0) if message["kind"] == "stop"} >= {"b", "c"}


def test_unlike_seats_do_not_start_together() -> None:
    play = Play()
    play.ready("a", host_class="torch, avx2")
    play.ready("b", "c")
    assert play.obey(play.wait(1.0)) == ["b", "c"]
    assert [row["seat"] for row in play.news if row["what"] == "refused"] == ["a"]
    assert play.wait(5.0) == []


def test_a_run_begins_anew_on_another_class_where_its_own_is_gone() -> None:
    play = Play().started("a")
    play.rules.gone("a", play.now_s)
    play.take()
    play.ready("d", "e", host_class="torch, avx2")
    assert play.obey(play.wait(1.5)) == ["d", "e"]


def test_neighbours_are_on_different_hosts_where_that_can_be() -> None:
    play = Play(most=5)
    play.ready("h/0", "h/1", "g/0", "g/1", "f/0")
    assert play.obey(play.take()) == ["h/0", "g/0", "f/0", "h/1", "g/1"]


def beat(play: Play, name: str, phase: str, age_s: float, slot_s: float = 0.1) -> None:
    pid = play.rules.seats[name].pid
    play.rules.beat(name, {"pid": pid, "phase": phase, "age_s": age_s, "slot_s": slot_s}, play.now_s)


def test_who_hangs_is_named_and_replaced_and_not_those_who_wait_for_it() -> None:
    play = Play(hang_s=45.0).started("a", "b", "c")
    for second in range(1, 60):
        beat(play, "a", "waiting", second)
        beat(play, "b", "computing", second)
        beat(play, "c", "waiting", second)
        play.wait(1.0)
    assert [name for name, message in play.told if message["kind"] == "replace"] == ["b"]
    assert [row["seat"] for row in play.news if row["what"] == "hang"] == ["b"]
    assert "computing" in next(row["why"] for row in play.news if row["what"] == "hang")


def test_a_stopped_process_is_found_by_its_silence_within_a_minute() -> None:
    play = Play(hang_s=45.0).started("a", "b")
    beat(play, "b", "waiting", 0.1)
    for _ in range(59):
        beat(play, "a", "computing", 0.1)
        play.wait(1.0)
    assert [row["seat"] for row in play.news if row["what"] == "hang"] == ["b"]


def test_a_keeper_that_does_not_answer_either_is_dropped() -> None:
    play = Play(hang_s=10.0).started("a", "b")
    beat(play, "b", "waiting", 0.1)
    for _ in range(60):
        beat(play, "a", "waiting", 0.1)
        play.wait(1.0)
    assert list(play.rules.seats) == ["a"]
    assert play.obey([row for row in play.told if row[1]["kind"] == "form"][-1:]) == ["a"]


def test_slow_slots_and_a_slow_store_are_no_hang() -> None:
    play = Play(hang_s=45.0).started("a", "b")
    for second in range(1, 300):
        beat(play, "a", "computing", min(second, 120), slot_s=60.0)
        beat(play, "b", "data", second)
        play.wait(1.0)
    assert not [row for row in play.news if row["what"] == "hang"]


@pytest.mark.parametrize("phase", ["loading", "saving"])
def test_a_store_that_keeps_one_waiting_is_no_hang_of_anybody(phase: str) -> None:
    play = Play(hang_s=45.0).started("a", "b")
    for second in range(1, 300):
        beat(play, "a", phase, second)
        beat(play, "b", "computing", second)  # as a sharded worker that waits says
        play.wait(1.0)
    assert not [row for row in play.news if row["what"] == "hang"]


def test_members_who_all_wait_for_each_other_meet_anew() -> None:
    play = Play(hang_s=45.0).started("a", "b")
    for second in range(1, 60):
        for name in ("a", "b"):
            beat(play, name, "waiting", second)
        if forms := play.wait(1.0):
            assert second >= 45
            assert play.obey(forms) == ["a", "b"]
            assert not forms[0][1]["voluntary"]
            return
    raise AssertionError("they wait for ever")


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_those_who_are_left_form_one_group(seed: int) -> None:
    draw = random.Random(seed)
    play = Play(most=draw.choice([2, 3, 5])).started("a", "b")
    names = ["a", "b", "c", "d", "e"]
    for _ in range(40):
        name, what = draw.choice(names), draw.choice(["die", "go", "come", "obey", "obey", "wait"])
        seat = play.rules.seats.get(name)
        if what == "die" and seat and seat.pid:
            play.rules.died(name, seat.pid, "killed", play.now_s)
        elif what == "go" and seat:
            play.rules.gone(name, play.now_s)
        elif what == "come" and (seat is None or not seat.pid):
            play.ready(name, generation=0)
        elif what == "obey":
            settle(play, 1)
        play.wait(draw.choice([0.0, 0.1, 1.0]))
    if not any(seat.pid for seat in play.rules.seats.values()):
        play.ready("a")
    settle(play, 12)
    alive = [name for name, seat in play.rules.seats.items() if seat.pid]
    members = play.rules.members
    assert 1 <= len(members) == min(len(alive), play.rules._max)
    assert set(members) <= set(alive)
    assert {play.rules.seats[name].generation for name in members} == {play.rules.generation}


def settle(play: Play, rounds: int) -> None:
    """Every live process hears what it was told last, and obeys if it can."""
    for _ in range(rounds):
        play.wait(2.5)
        newest: dict[str, dict[str, Any]] = {}
        for name, message in play.told:
            if message["kind"] == "form":
                newest[name] = message
        for name, message in newest.items():
            seat = play.rules.seats.get(name)
            if seat and seat.pid == message["pid"] and seat.state in ("ready", "in", "lost"):
                alive = all(
                    member in play.rules.seats and play.rules.seats[member].pid for member in message["members"]
                )
                if seat.generation < message["generation"] or seat.state != "in":
                    state = "in" if alive else "lost"
                    play.status(name, state, message["generation"], 5, members=message["members"])
        play.take()
