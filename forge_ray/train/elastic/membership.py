"""Who trains together: the rules by which groups of workers follow each other.

A pure state machine: told what happens at the seats, it says what each seat is to be told. Owns generations, ranks and
the judgement of who hangs. Holds nothing that the seats do not know too: a new one learns it from them.

A seat's compute process says of itself that it is `ready` (wants to be a member), `in` a generation, `lost` (its group
broke), `left` (drained) or `done`. A change that nobody waits for (`join`, `drain`) happens at a step's boundary, which
the workers agree on among themselves; after a loss the next group forms at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from forge_ray.train.elastic.lines import Message

_SETTLE_S = 0.3  # newcomers within this time join together
_GATHER_S = 1.0  # at the start, and after everybody was lost
_ADOPT_S = 5.0  # a new coordinator waits this long for the rest of a group that it finds at work
_SILENT_S = 15.0  # a compute process that does not even beat is stopped
_KEEPER_S = 20.0  # a keeper told to replace its compute process that does not do it is dropped
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0  # between groups that do not come to stand
_BEATS_FOR_SLOW = 10.0  # times the longest slot so far, before one is called a hang
_STORE_PHASES = ("data", "loading", "saving")  # in which a store may keep a worker waiting


@dataclass
class Seat:
    """What is known of a seat."""

    name: str
    joined_s: float
    pid: int = 0
    state: str = ""
    generation: int = 0
    step: int = -1
    store: str = ""
    host_class: str = ""
    members: list[str] = field(default_factory=list)
    beat: Message = field(default_factory=dict)
    beat_s: float = 0.0
    slowest_s: float = 0.0
    replaced_s: float | None = None
    draining: bool = False
    stopping: bool = False


class Membership:
    """The machine. Times are of one monotonic clock, in seconds.

    Args:
        min_workers, max_workers: Bounds of a group; more seats than `max_workers` wait as spares.
        hang_s: Silence about progress that makes a worker a suspect.
        data_wait_s: Longer silence that waiting for data explains.
    """

    def __init__(self, min_workers: int, max_workers: int, hang_s: float, data_wait_s: float) -> None:
        self._min, self._max, self._hang_s, self._data_wait_s = min_workers, max_workers, hang_s, data_wait_s
        self.seats: dict[str, Seat] = {}
        self.generation = 0
        self.members: list[str] = []
        self.done = False
        self._failures, self._formed_s = (
            0,
            0.0,
        )  # groups in a row that did not come to stand, and when the last was named
        self._host_class = ""
        self._refused: set[str] = set()
        self._broken = False  # a member is gone, so the group cannot finish its step
        self._lost: list[str] = []
        self._ready_since_s: float | None = None
        self._adopting_s: float | None = None
        self._out: list[tuple[str, Message]] = []
        self._news: list[Message] = []

    def take(self) -> tuple[list[tuple[str, Message]], list[Message]]:
        """What is to be sent, by seat, and what is worth a record, since the last call."""
        out, self._out = self._out, []
        news, self._news = self._news, []
        return out, news

    def hello(self, name: str, pid: int, now_s: float) -> None:
        """A keeper has come, or come back."""
        self.seats[name] = Seat(name, now_s, pid=pid)
        self._tell_news(name, "came")

    def gone(self, name: str, now_s: float, why: str = "its keeper is gone") -> None:
        """A keeper's connection has ended: of its node nothing more is known."""
        if self.seats.pop(name, None) is None:
            return
        self._tell_news(name, "gone", why)
        self._lose(name, now_s)

    def died(self, name: str, pid: int, why: str, now_s: float) -> None:
        """A seat's compute process has ended."""
        seat = self.seats.get(name)
        if seat is None or (seat.pid and seat.pid != pid):
            return
        finished = seat.state in ("done", "left")
        seat.pid, seat.state, seat.beat, seat.replaced_s = 0, "", {}, None
        if not finished:
            self._tell_news(name, "died", why)
            self._lose(name, now_s)

    def is_replaced(self, name: str) -> bool:
        """Whether a seat's keeper has been told to end its compute process."""
        seat = self.seats.get(name)
        return seat is not None and seat.replaced_s is not None

    def status(self, name: str, message: Message, now_s: float) -> None:
        """What a compute process says of itself."""
        seat = self.seats.get(name)
        if seat is None:
            return
        before = seat.state
        seat.pid, seat.state, seat.step = message["pid"], message["state"], message["step"]
        seat.generation, seat.store, seat.host_class = message["generation"], message["store"], message["host_class"]
        seat.members, seat.beat_s, seat.beat = message.get("members", []), now_s, {}
        waits = seat.state == "ready" or (seat.state == "lost" and name not in self.members)
        if waits and before != seat.state and self._ready_since_s is None:
            self._ready_since_s = now_s
        if seat.state in ("in", "lost") and seat.generation > self.generation:
            # This coordinator is new, the group is not.
            self.members, self._adopting_s, self._broken = list(seat.members), now_s, False
        self.generation = max(self.generation, seat.generation)
        if seat.state == "in" and name not in self.members:
            self._out.append((name, {"kind": "rejoin", "pid": seat.pid}))  # the others went on without it
        if seat.state == "in" and seat.generation == self.generation:
            self._failures, self._host_class = 0, seat.host_class
        if seat.state == "lost" and seat.generation == self.generation and name in self.members:
            self._broken = True
        if seat.state == "left" and name in self.members:
            self.members.remove(name)
        self.done = self.done or seat.state == "done"
        self.tick(now_s)

    def beat(self, name: str, message: Message, now_s: float) -> None:
        """A sign of life: `phase`, `age_s` since the last progress, `slot_s` of the longest slot."""
        seat = self.seats.get(name)
        if seat and seat.pid == message["pid"]:
            seat.beat, seat.beat_s, seat.slowest_s = message, now_s, max(seat.slowest_s, message["slot_s"])

    def drain(self, name: str, now_s: float, why: str) -> None:
        """A seat is to leave at the next boundary: its node will be taken away."""
        seat = self.seats.get(name)
        if seat and not seat.draining:
            seat.draining = True
            self._tell_news(name, "notice", why)
            self.tick(now_s)

    def tick(self, now_s: float) -> None:
        """Does what is due. Called after every change, and twice a second."""
        self._watch(now_s)
        if self.done:
            waiting = [seat.name for seat in self.seats.values() if seat.state in ("", "ready", "lost")]
            self._out += [(name, {"kind": "stop"}) for name in waiting]
            return
        if self._adopting_s is not None:
            missing = [name for name in self.members if name not in self.seats]
            if missing and now_s - self._adopting_s < _ADOPT_S:
                return
            self._adopting_s = None
            for name in missing:
                self._lose(name, now_s)
        members = [name for name in self.members if self._alive(name)]
        waiting = [name for name in sorted(self.seats, key=self._age) if self._may_join(name, members)]
        room = max(0, self._max - len(members))
        if self._broken:
            self._after_loss(members, waiting[:room], now_s)
        elif not self.members:
            self._begin(waiting, now_s)
        elif all(self.seats[name].generation == self.generation for name in members):
            if self._all_wait(members, now_s):
                self._broken = True  # for each other, over a network that is cut between them: they meet anew
                return
            self._at_boundary(members, waiting[:room], now_s)

    # ------------------------------------------------------------------------------------------------------------ rules

    def _begin(self, waiting: list[str], now_s: float) -> None:
        """Nobody has a group: starts with those who come within a second of the first, and compute the same bits."""
        if len(waiting) < self._min or self._ready_since_s is None:
            return
        if len(waiting) < self._max and now_s - self._ready_since_s < _GATHER_S:
            return
        count = Counter(self.seats[name].host_class for name in waiting)
        # Of the run's class if there are enough; else of the most common, of equals the first to come.
        enough = [kind for kind in count if count[kind] >= self._min]
        wanted = self._host_class if self._host_class in enough else max(count, key=lambda kind: count[kind])
        alike = [name for name in waiting if self.seats[name].host_class == wanted]
        for name in waiting:
            if name not in alike:
                self._refuse(name, wanted)
        if len(alike) >= self._min:
            self._host_class = wanted
            alike = alike[: self._max]
            cause = "resume" if self.generation else "start"
            self._form(alike, cause, now_s, joined=alike, voluntary=False)

    def _after_loss(self, members: list[str], waiting: list[str], now_s: float) -> None:
        if not members:  # nobody holds the state: as at the start
            self.members, self._broken, self._ready_since_s = [], False, now_s
            return
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failures)
        if len(members) + len(waiting) >= self._min and now_s - self._formed_s >= pause_s * (self._failures > 1):
            self._failures += 1
            self._form([*members, *waiting], "lost", now_s, joined=waiting, voluntary=False)

    def _at_boundary(self, members: list[str], waiting: list[str], now_s: float) -> None:
        leaving = [name for name in members if self.seats[name].draining]
        staying = [name for name in members if name not in leaving]
        if leaving and (staying or waiting):
            self._form([*staying, *waiting], "drain", now_s, joined=waiting, leaving=leaving, voluntary=True)
        elif leaving:  # all of them, and nobody comes: the first keeps the state in the store
            self._out += [(name, {"kind": "stop"}) for name in leaving if not self.seats[name].stopping]
            for name in leaving:
                self.seats[name].stopping = True
        elif waiting and self._ready_since_s is not None and now_s - self._ready_since_s >= _SETTLE_S:
            self._form([*members, *waiting], "join", now_s, joined=waiting, voluntary=True)

    def _form(
        self,
        members: list[str],
        cause: str,
        now_s: float,
        *,
        joined: list[str],
        voluntary: bool,
        leaving: list[str] | None = None,
    ) -> None:
        self.generation, self._formed_s = self.generation + 1, now_s
        members = _spread(members)
        self.members = [*members, *(leaving or [])]
        lost, self._lost = self._lost, []
        self._broken, self._ready_since_s = False, None
        if not self._host_class:
            self._host_class = self.seats[members[0]].host_class
        common = {
            "kind": "form",
            "generation": self.generation,
            "size": len(members),
            "members": members,
            "store": self.seats[members[0]].store,
            "cause": cause,
            "lost": lost,
            "joined": joined,
            "voluntary": voluntary,
        }
        for name in self.members:
            seat = self.seats[name]
            seat.generation = self.generation - 1  # until it says that it is in
            rank = members.index(name) if name in members else -1
            self._out.append((name, {**common, "rank": rank, "pid": seat.pid}))

    def _lose(self, name: str, now_s: float) -> None:
        if name in self.members:
            self.members.remove(name)
            self._lost.append(name)
            self._broken = True
        self.tick(now_s)

    def _watch(self, now_s: float) -> None:
        """Finds who hangs: whoever is silent, or makes no progress while it is not waiting for others."""
        working = [seat for seat in self.seats.values() if seat.pid and seat.state not in ("", "done")]
        # Sharded workers wait for each other wherever they compute.
        storing = any(seat.beat.get("phase") in _STORE_PHASES for seat in working)
        suspects = [seat for seat in working if self._hangs(seat, now_s, storing)]
        for seat in suspects:
            if seat.replaced_s is None:
                seat.replaced_s = now_s
                age_s = now_s - seat.beat_s + seat.beat.get("age_s", 0.0)
                doing = seat.beat.get("phase", seat.state)
                self._tell_news(seat.name, "hang", f"no progress for {age_s:.0f} s in step {seat.step}: {doing}")
                self._out.append((seat.name, {"kind": "replace"}))
            elif now_s - seat.replaced_s > _KEEPER_S:
                self.gone(seat.name, now_s, "its keeper does not answer either")

    def _hangs(self, seat: Seat, now_s: float, storing: bool) -> bool:
        if not seat.beat:
            return now_s - seat.beat_s > max(self._hang_s, _SILENT_S)
        if now_s - seat.beat_s > min(self._hang_s, _SILENT_S):
            return True
        limit_s = max(self._hang_s, _BEATS_FOR_SLOW * seat.slowest_s)
        if storing:
            limit_s += self._data_wait_s
        return seat.beat["phase"] not in ("waiting", "idle") and seat.beat["age_s"] > limit_s

    def _all_wait(self, members: list[str], now_s: float) -> bool:
        """Whether all members have waited for each other for longer than any one may be silent."""
        beats = [self.seats[name].beat for name in members]
        longest_s = max(self._hang_s, _BEATS_FOR_SLOW * max(self.seats[name].slowest_s for name in members))
        return len(members) > 1 and all(
            beat and beat["phase"] == "waiting" and beat["age_s"] > longest_s for beat in beats
        )

    def _alive(self, name: str) -> bool:
        seat = self.seats.get(name)
        return seat is not None and seat.pid != 0 and seat.state in ("in", "lost", "ready")

    def _may_join(self, name: str, members: list[str]) -> bool:
        """Whether a seat waits to join, and its results would have the same bits as those of the others.

        One that is `lost` has not heard that the others went on without it.
        """
        seat = self.seats[name]
        if seat.state not in ("ready", "lost") or seat.draining or name in members or name in self.members:
            return False
        if self._host_class and members and seat.host_class != self._host_class:
            self._refuse(name, self._host_class)
            return False
        return True

    def _refuse(self, name: str, wanted: str) -> None:
        if name not in self._refused:
            self._refused.add(name)
            found = self.seats[name].host_class
            why = f"it computes other bits than the group: {found} instead of {wanted}; give the run nodes of one class"
            self._tell_news(name, "refused", why)

    def _age(self, name: str) -> float:
        return self.seats[name].joined_s

    def _tell_news(self, name: str, what: str, why: str = "") -> None:
        self._news.append({"event": "seat", "seat": name, "host": name.partition("/")[0], "what": what, "why": why})


def _spread(members: list[str]) -> list[str]:
    """Members so that neighbours are on different hosts as far as can be, since they hold each other's copies."""
    hosts: dict[str, list[str]] = {}
    for name in members:
        hosts.setdefault(name.partition("/")[0], []).append(name)
    longest = max(map(len, hosts.values()), default=0)
    return [names[turn] for turn in range(longest) for names in hosts.values() if turn < len(names)]


def snapshot(membership: Membership) -> dict[str, Any]:
    """What a person wants to know of it now."""
    return {
        "generation": membership.generation,
        "members": list(membership.members),
        "seats": {name: seat.state for name, seat in membership.seats.items()},
    }
