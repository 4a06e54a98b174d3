"""The ledger of a run: where its seconds went, what they committed, what disturbed it, what it cost.

Owns the arithmetic, a pure function of the run's events. Does not own what is recorded (the driver, the coordinator and
rank 0 do that), nor what it looks like: `goodput_page.py`.

Every second from the first `start` to the last event belongs to exactly one part:

- useful: within a step that had not been committed before, and that stayed committed as far as the log shows;
- recomputed: slots computed again after a loss, and whole steps that had been committed before (a resume from a
  checkpoint, a rollback): a step counts once, its first commit;
- stalled: a group stood still to form anew, or a step waited for one that was gone;
- saving: training stood still for a checkpoint;
- data: a step waited for its samples;
- waiting: nobody trained: before the first step, or when driver or all workers were gone.

These are seconds of the run, not of its workers: a step that three of four workers commit slower is useful throughout.
What lost capacity costs shows in tokens/s, and in `bench/chaos.py`, which divides by an undisturbed run.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

PARTS = ("useful", "recomputed", "stalled", "saving", "data", "waiting")
IDLE_S = 1.0
"""What lies between two steps of one group is the loop's own work up to here, and nobody's beyond."""
_HOUR_US, _SAMPLE_US = 3_600_000_000, 10_000_000
_ANNOUNCED = ("notice", "drained")
_CAUSES = ("died", "gone", "hang", "digest", "refused", *_ANNOUNCED)


@dataclass(frozen=True)
class Span:
    """Seconds that an event settled, from the last one settled before it, by part."""

    begin_s: float
    end_s: float
    parts: Mapping[str, float]


@dataclass
class Fault:
    """Something that disturbed the run.

    `cause` is what the coordinator saw (`died` a process, `gone` a node, `hang`, `digest`, `notice` of preemption,
    `drained`, `refused`), `lost` where only other workers noticed, `restart` for a driver that came back. `stall_s`
    runs from when it was noticed to the next committed step: none while that is to come, and for a seat that was
    refused, which disturbs nobody. `back_s` is how long the seat was out of the group.
    """

    time_s: float
    cause: str
    step: int
    seat: str = ""
    host: str = ""
    why: str = ""
    stacks: str = ""
    stall_s: float | None = None
    back_s: float | None = None
    world_size: int | None = None
    missing_slots: int | None = None
    ended: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the guardian decided on a step; how many documents the batch held, and some of them as (source, id)."""

    time_s: float
    step: int
    verdict: str
    reason: str
    loss: float | None
    grad_norm: float | None
    back_to: int | None
    num_samples: int
    samples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Account:
    """The ledger's state; the parts sum to `wall_s`.

    `loss` is that of the last committed step, `saved_s` the time since the epoch of the newest checkpoint.
    `num_tokens` counts each committed step once. `num_unrecorded` steps must have been committed, because later ones
    were, but their records died with a worker before they were published. `usd` is none where no price is known.
    """

    useful_s: float
    recomputed_s: float
    stalled_s: float
    saving_s: float
    data_s: float
    waiting_s: float
    wall_s: float
    step: int
    num_steps: int
    num_repeated: int
    num_unrecorded: int
    num_tokens: int
    world_size: int
    loss: float | None
    saved_s: float | None
    node_hours: float
    usd: float | None
    ettr_hour_min_frac: float | None
    faults: tuple[Fault, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def goodput_frac(self) -> float | None:
        """Useful seconds by wall seconds; none before anything happened."""
        return self.useful_s / self.wall_s if self.wall_s else None

    @property
    def ettr_frac(self) -> float | None:
        """Effective training time ratio: accumulated productive training time by wall time of the run.

        Steps count with their wait for data, which those who coined the ratio do not subtract. `ettr_hour_min_frac` is
        the lowest of the same over sliding windows of an hour.

        Source: ByteRobust, arXiv 2509.16293, section 8.1.3 (cumulative and sliding-window), after arXiv 2410.21680.
        """
        return (self.useful_s + self.data_s) / self.wall_s if self.wall_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """Committed tokens by wall seconds."""
        return self.num_tokens / self.wall_s if self.wall_s else None

    @property
    def faults_by_cause(self) -> dict[str, int]:
        """How many of each, most frequent first."""
        return dict(Counter(fault.cause for fault in self.faults).most_common())

    @property
    def num_skipped_samples(self) -> int:
        """Documents in batches that the guardian threw away."""
        return sum(verdict.num_samples for verdict in self.verdicts)

    def stall_s(self, share: float) -> float | None:
        """The stall that this share of the faults does not exceed, by nearest rank; none without a fault that is over.

        Announced departures are left out: they hardly stall, and would make the others look better.
        """
        faults = (fault for fault in self.faults if fault.cause not in _ANNOUNCED)
        stalls = sorted(fault.stall_s for fault in faults if fault.stall_s is not None)
        return stalls[max(0, math.ceil(share * len(stalls)) - 1)] if stalls else None

    def as_dict(self) -> dict[str, Any]:
        """The figures, for an artifact's metrics and for JSON; faults and verdicts as counts."""
        return {
            "goodput_frac": _rounded(self.goodput_frac, 5),
            "ettr_frac": _rounded(self.ettr_frac, 5),
            "ettr_hour_min_frac": _rounded(self.ettr_hour_min_frac, 5),
            "wall_s": round(self.wall_s, 3),
            **{f"{part}_s": round(getattr(self, f"{part}_s"), 3) for part in PARTS},
            "committed_tokens": self.num_tokens,
            "tokens_per_s": _rounded(self.tokens_per_s, 1),
            "repeated_steps": self.num_repeated,
            "unrecorded_steps": self.num_unrecorded,
            "faults": self.faults_by_cause,
            "stall_p50_s": _rounded(self.stall_s(0.5), 3),
            "stall_p95_s": _rounded(self.stall_s(0.95), 3),
            "stall_max_s": _rounded(self.stall_s(1.0), 3),
            "verdicts": dict(Counter(verdict.verdict for verdict in self.verdicts)),
            "skipped_samples": self.num_skipped_samples,
            "node_hours": round(self.node_hours, 4),
            "usd": _rounded(self.usd, 4),
        }


def account(events: Iterable[Mapping[str, Any]], usd_per_node_hour: float = 0.0) -> Account:
    """The account of a run's events, in the order of time as `Events.read` gives them; 0 is a price nobody knows."""
    ledger = Ledger(usd_per_node_hour)
    for event in events:
        ledger.add(event)
    return ledger.account()


def line(account: Account) -> str:
    """For the progress line: `goodput 0.98, 3 faults, stall p95 0.4 s, $1.23`."""
    if account.goodput_frac is None:
        return ""
    words = [f"goodput {account.goodput_frac:.2f}"]
    if account.faults:
        words.append(f"{len(account.faults)} fault{'s' if len(account.faults) > 1 else ''}")
    if account.stall_s(0.95) is not None:
        words.append(f"stall p95 {account.stall_s(0.95):.1f} s")
    if account.usd is not None:
        words.append(f"${account.usd:,.2f}")
    return ", ".join(words)


def metrics(account: Account) -> dict[str, float]:
    """The same as gauges, named as Prometheus wants it; what is not known yet is left out."""
    values = {
        "forge_goodput_ratio": account.goodput_frac,
        "forge_effective_training_time_ratio": account.ettr_frac,
        "forge_wall_seconds": account.wall_s,
        **{f"forge_{part}_seconds": getattr(account, f"{part}_s") for part in PARTS},
        "forge_committed_step": account.step,
        "forge_committed_tokens": account.num_tokens,
        "forge_tokens_per_second": account.tokens_per_s,
        "forge_repeated_steps": account.num_repeated,
        "forge_world_size": account.world_size,
        "forge_loss_nats_per_token": account.loss,
        "forge_last_checkpoint_timestamp_seconds": account.saved_s,
        "forge_faults": len(account.faults),
        "forge_stall_p50_seconds": account.stall_s(0.5),
        "forge_stall_p95_seconds": account.stall_s(0.95),
        "forge_stall_max_seconds": account.stall_s(1.0),
        "forge_guard_verdicts": len(account.verdicts),
        "forge_skipped_samples": account.num_skipped_samples,
        "forge_node_hours": account.node_hours,
        "forge_cost_usd": account.usd,
    }
    return {name: float(value) for name, value in values.items() if value is not None}


@dataclass
class _Gap:
    """What was seen since the last committed step: it says what the time without a step was."""

    restart_us: int | None = None
    formed: bool = False
    regrown: bool = False
    saved: bool = False
    guarded: bool = False


class Ledger:
    """Takes the events of a run as they come, and can be asked at any time.

    Cost: each event O(1), each account O(faults log faults). Whole microseconds within, so that the parts sum to the
    wall time exactly.
    """

    def __init__(self, usd_per_node_hour: float = 0.0) -> None:
        self._usd_per_node_hour = usd_per_node_hour
        self._parts: Counter[str] = Counter()
        self._begin_us: int | None = None
        self._settled_us = self._end_us = self._saving_us = 0
        self._gap, self._over = _Gap(), False
        self._top: int | None = None
        self._num_steps = self._num_repeated = self._num_unrecorded = self._num_tokens = 0
        self._hosts: dict[str, str] = {}
        self._members: set[str] = set()
        self._world_size = self._nodes = self._billed_us = self._node_us = 0
        self._faults: list[Fault] = []
        self._open: list[Fault] = []
        self._down: dict[str, Fault] = {}
        self._verdicts: list[Verdict] = []
        self._hour: deque[tuple[int, int]] = deque()
        self._hour_min_frac: float | None = None
        self._loss: float | None = None
        self._saved_us: int | None = None

    def add(self, event: Mapping[str, Any]) -> Span | None:
        """Takes one record, as `Events` keeps it; a committed step returns what it settled.

        Kinds and fields that are not known are passed over, and missing ones count as nothing, so that runs of other
        versions have an account too.
        """
        time_us, kind = _us(event.get("time_s")), event.get("event")
        span = None
        if kind == "step" and event.get("again"):
            span = self._step_again(time_us, event)
        elif kind == "step":
            span = self._step(time_us, event)
            self._loss = event.get("loss", self._loss)
        elif kind == "start":
            self._start(time_us, event)
        elif kind == "form":
            self._form(time_us, event)
        elif kind == "seat":
            self._seat(time_us, event)
        elif kind == "checkpoint":
            self._gap.saved, self._saved_us = True, time_us
            self._saving_us += _us(event.get("stall_s"))
        elif kind == "guard":
            self._guard(time_us, event)
        elif kind in ("end", "stop"):
            self._over = True
        self._end_us = max(self._end_us, time_us)
        return span

    def account(self) -> Account:
        """What the events so far amount to."""
        parts = Counter(self._parts)
        node_us = self._node_us
        if self._begin_us is not None:
            parts += self._between(self._settled_us, max(self._settled_us, self._end_us), 0)[0]
            node_us += self._nodes * max(0, self._end_us - self._billed_us)
        hours = node_us / _HOUR_US
        return Account(
            **{f"{part}_s": parts[part] / 1e6 for part in PARTS},
            wall_s=sum(parts.values()) / 1e6,
            step=self._top or 0,
            num_steps=self._num_steps,
            num_repeated=self._num_repeated,
            num_unrecorded=self._num_unrecorded,
            num_tokens=self._num_tokens,
            world_size=self._world_size,
            loss=self._loss,
            saved_s=None if self._saved_us is None else self._saved_us / 1e6,
            node_hours=hours,
            usd=hours * self._usd_per_node_hour if self._usd_per_node_hour else None,
            ettr_hour_min_frac=self._hour_min_frac,
            faults=tuple(replace(fault) for fault in self._faults),
            verdicts=tuple(self._verdicts),
        )

    # ------------------------------------------------------------------------------------------------------- seconds

    def _started(self, time_us: int) -> None:
        """The run's clock starts with the first event that says that somebody works on it."""
        if self._begin_us is None:
            self._begin_us = self._settled_us = self._billed_us = self._end_us = time_us

    def _start(self, time_us: int, event: Mapping[str, Any]) -> None:
        if self._begin_us is None:
            self._started(time_us)
            self._top = None if event.get("step") is None else _whole(event["step"])
        elif not self._over:
            # Its last sign of life is the best guess of when the one before went.
            self._fault(Fault(self._end_us / 1e6, "restart", self._top or 0, host=_text(event.get("host"))))
        self._bill(self._end_us)
        self._gap.restart_us, self._over = time_us, False
        if _whole(event.get("world_size")):  # older runs: their workers tell, and there is no `form`
            self._billed_us = time_us
            self._resize(_whole(event["world_size"]))

    def _step(self, time_us: int, event: Mapping[str, Any]) -> Span:
        wall_us = _us(event.get("wall_s"))
        self._started(time_us - wall_us)
        last_us = self._settled_us
        end_us = max(time_us, last_us)
        stalled_us = _us(event.get("stall_s"))
        begin_us = min(end_us, max(last_us, time_us - wall_us if wall_us else self._gap.restart_us or 0))
        step = _whole(event.get("step"))
        missing = max(0, step - self._top - 1) if self._top is not None else 0
        parts, repaid_us = self._between(last_us, begin_us, missing * max(0, wall_us - stalled_us))
        self._saving_us -= repaid_us
        within, repaid_us = self._within(end_us - begin_us, event, "waiting" if self._gap.regrown else "stalled")
        self._saving_us = max(0, self._saving_us - repaid_us)
        self._commit(step, missing, _whole(event.get("tokens")), within)
        parts += within
        self._parts += parts
        self._settled_us, self._gap = end_us, _Gap()
        for fault in self._open:
            fault.stall_s = max(0.0, end_us / 1e6 - fault.time_s, stalled_us / 1e6)
        self._open.clear()
        if _whole(event.get("world_size")) not in (0, self._world_size):
            self._resize(_whole(event["world_size"]))
        self._bill(end_us)
        self._look_back()
        return Span(last_us / 1e6, end_us / 1e6, {part: us / 1e6 for part, us in parts.items()})

    def _step_again(self, time_us: int, event: Mapping[str, Any]) -> Span | None:
        """A step told again by another worker, in case that the record of who told it first was lost."""
        step, wall_us, last_us = _whole(event.get("step")), _us(event.get("wall_s")), self._settled_us
        if self._begin_us is None or self._top is None or step <= self._top:
            return None
        missing = step - self._top - 1
        end_us = max(last_us, min(time_us, last_us + (1 + missing) * wall_us))
        parts, _ = self._within(end_us - last_us, event, "stalled")
        self._commit(step, missing, _whole(event.get("tokens")), parts)
        self._parts += parts
        self._settled_us = end_us
        return Span(last_us / 1e6, end_us / 1e6, {part: us / 1e6 for part, us in parts.items()})

    def _between(self, begin_us: int, end_us: int, unrecorded_us: int) -> tuple[Counter[str], int]:
        """What the time before a step was, and how much of the saving that was still to be placed it holds."""
        gap, rest_us = self._gap, max(0, end_us - begin_us)
        parts: Counter[str] = Counter()
        parts["saving"] = min(rest_us, self._saving_us)
        rest_us -= parts["saving"]
        repaid_us = parts["saving"]
        if gap.restart_us is None:
            parts["useful"] = min(rest_us, unrecorded_us)
            rest_us -= parts["useful"]
        if gap.restart_us is not None or gap.regrown:
            rest = "waiting"
        elif gap.formed or self._open:
            rest = "stalled"
        elif gap.guarded:
            rest = "recomputed"
        elif rest_us <= IDLE_S * 1e6:
            rest = "useful"
        else:
            rest = "saving" if gap.saved or self._over else "waiting"
        parts[rest] += rest_us
        return +parts, repaid_us

    def _within(self, length_us: int, event: Mapping[str, Any], stood: str) -> tuple[Counter[str], int]:
        """What the time of a step was; the first one's group had to come about from nothing."""
        parts: Counter[str] = Counter()
        wanted = {
            stood: _us(event.get("stall_s")),
            "recomputed": _us(event.get("recomputed_s")),
            "data": _us(event.get("data_s")),
            "saving": self._saving_us,
        }
        for part, wanted_us in wanted.items():
            parts[part] = min(length_us, wanted_us)
            length_us -= parts[part]
        parts["useful"] = length_us
        return parts, parts["saving"]

    def _commit(self, step: int, missing: int, tokens: int, parts: Counter[str]) -> None:
        if self._top is not None and step <= self._top:
            self._num_repeated += 1
            parts["recomputed"] += parts.pop("useful", 0)
            return
        self._num_steps += 1 + missing
        self._num_unrecorded += missing
        self._num_tokens += (1 + missing) * tokens
        self._top = step

    def _look_back(self) -> None:
        """Keeps the lowest share of productive time over an hour, sampled every few seconds."""
        now_us, productive_us = self._settled_us, self._parts["useful"] + self._parts["data"]
        if not self._hour:
            self._hour.append((self._begin_us or now_us, 0))
        if now_us - self._hour[-1][0] < _SAMPLE_US:
            return
        self._hour.append((now_us, productive_us))
        while len(self._hour) > 2 and now_us - self._hour[1][0] >= _HOUR_US:
            self._hour.popleft()
        from_us, before_us = self._hour[0]
        if now_us - from_us >= _HOUR_US:
            frac = (productive_us - before_us) / (now_us - from_us)
            self._hour_min_frac = min(frac, self._hour_min_frac if self._hour_min_frac is not None else 1.0)

    # ------------------------------------------------------------------------------------------------ workers, nodes

    def _form(self, time_us: int, event: Mapping[str, Any]) -> None:
        self._started(time_us)
        cause = _text(event.get("cause"))
        lost, joined = _names(event.get("lost")), _names(event.get("joined"))
        if cause == "drain":
            lost += [seat for seat in self._members - set(lost) if seat in self._down]
        anew = cause in ("start", "resume")
        if self._top is None and event.get("step") is not None:
            self._top = _whole(event["step"])
        self._gap.formed = True
        self._gap.regrown |= anew
        if anew and self._gap.restart_us is not None:
            self._billed_us = max(self._billed_us, self._gap.restart_us)
        else:
            self._bill(time_us)
        self._members = set(joined) if anew and joined else (self._members - set(lost)) | set(joined)
        self._resize(_whole(event.get("world_size")) or len(self._members), self._members)
        self._bill(time_us)
        if cause == "lost" and not lost and not self._open:
            lost = [""]
        for seat in lost:
            fault = self._down.get(seat) or self._fault(
                Fault(
                    time_us / 1e6,
                    "drained" if cause == "drain" else "lost",
                    self._top or 0,
                    seat,
                    self._hosts.get(seat, ""),
                )
            )
            fault.world_size = self._world_size
            fault.missing_slots = _whole(event.get("missing_slots"))
        for seat in joined:
            fault = self._down.pop(seat, None)
            if fault:
                fault.back_s = max(0.0, time_us / 1e6 - fault.time_s)

    def _resize(self, world_size: int, members: set[str] | None = None) -> None:
        """Nodes are the hosts of the members where all are known by name, else each worker counts as one."""
        self._world_size = world_size
        known = members is not None and len(members) == world_size
        self._nodes = len({self._hosts.get(seat, seat) for seat in members or ()}) if known else world_size

    def _bill(self, until_us: int) -> None:
        self._node_us += self._nodes * max(0, until_us - self._billed_us)
        self._billed_us = max(self._billed_us, until_us)

    # --------------------------------------------------------------------------------------------- faults, verdicts

    def _seat(self, time_us: int, event: Mapping[str, Any]) -> None:
        what, seat, host = (_text(event.get(name)) for name in ("what", "seat", "host"))
        if host:
            self._hosts.setdefault(seat, host)
        known = self._down.get(seat)
        if what == "stacks" and known:
            known.stacks = known.stacks or _text(event.get("why"))
        if self._over or what not in _CAUSES or (what == "gone" and not known and seat not in self._members):
            return
        fault = Fault(
            time_us / 1e6, what, self._top or 0, seat, host, _text(event.get("why")), _text(event.get("stacks"))
        )
        if what == "refused":
            self._faults.append(fault)
        elif known is None or (known.ended and what == "died"):
            known = self._fault(fault)
        elif known.cause == "lost":  # the others noticed first; the coordinator knows why
            known.cause, known.host, known.why, known.stacks = what, host or known.host, fault.why, fault.stacks
        else:
            known.why, known.stacks = known.why or fault.why, known.stacks or fault.stacks
        if known:
            known.ended |= what in ("died", "gone")

    def _fault(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        self._open.append(fault)
        if fault.seat:
            self._down[fault.seat] = fault
        return fault

    def _guard(self, time_us: int, event: Mapping[str, Any]) -> None:
        self._gap.guarded = True
        back_to, samples = event.get("back_to"), event.get("samples") or ()
        self._verdicts.append(
            Verdict(
                time_us / 1e6,
                _whole(event.get("step")),
                _text(event.get("verdict")),
                _text(event.get("reason")),
                _number(event.get("loss")),
                _number(event.get("grad_norm")),
                None if back_to is None else _whole(back_to),
                _whole(event.get("num_samples")) or len(samples),
                tuple((_text(sample[0]), _text(sample[-1])) for sample in samples if sample),
            )
        )


def _us(seconds: Any) -> int:
    value = _number(seconds)
    return max(0, round(value * 1e6)) if value is not None and math.isfinite(value) else 0


def _whole(value: Any) -> int:
    number = _number(value)
    return int(number) if number is not None and math.isfinite(number) else 0


def _number(value: Any) -> float | None:
    """A number, also one that JSON has not and the log holds as text."""
    return float(value) if isinstance(value, int | float) or value in ("nan", "inf", "-inf") else None


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list | tuple) else []


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
