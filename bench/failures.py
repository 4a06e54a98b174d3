"""What is left of the time when nodes fail, on up to 10,000 nodes: survivors that go on, against restarts.

A simulation: no cluster is behind it, but published failure rates, published times of restarts, and our own times of
forming a group, which are known on one machine only. `value` is our expected goodput on 10,000 nodes at Llama 3's
failure rate, if forming a group takes longer with every node as published restarts do; `goal` is that of the best
restart there.

    python bench/failures.py                          about 10 s of CPU time
    python bench/failures.py --quick                  fewer nodes and failures, in seconds
    python bench/failures.py --plot bench/failures.svg    the plot that is committed
    python bench/failures.py --stall-s 0.4 --saving-frac 0.002    with what `bench/chaos.py` measured

Three schemes, each as a closed form and as an event-driven Monte Carlo simulation of the same rules (`spread` has the
largest difference between the two). Failures are a Poisson process at nodes x rate, and come at any time, also while
another one is being mended, which then starts over.

- ours: survivors form a group and compute the lost slots; a spare that waits joins with the same form. Without a spare
  the others go on with fewer, and as slots are whole somebody has one more; a second form takes the replacement in. Now
  and then everybody is lost: a restart from the newest checkpoint.
- requeue: the job is scheduled anew and goes on from its last checkpoint, which it writes every sqrt(2 C M) seconds
  (Young 1974; Daly 2006, doi 10.1016/j.future.2004.11.016).
- standby: restart in place with warm standbys and a checkpoint in memory at every step, as ByteRobust does.

Published figures, as stored copies of the papers have them (2026-11):
- Llama 3 (arXiv 2407.21783, section 3.3.4, table 5; text seen): 419 unexpected interruptions in 54 days on 16,384 H100,
  8 a node: 3.79 in 1,000 node-days; over 90% effective training time.
- Meta's research clusters (arXiv 2410.21680): 6.50 (RSC-1) and 2.34 (RSC-2) failures in 1,000 node-days. Not verified:
  several notes on the paper agree on them, its text was not to be had beyond the introduction. The 7.9 h between
  failures that it measured for jobs on 1,024 GPUs are 3.6 times shorter than its own rate gives.
- ByteRobust (arXiv 2509.16293; text seen): table 1 for the share of hangs, section 2.2 and table 3 for times to detect,
  table 7 for times to restart on 128 to 1,024 machines, table 8 for checkpoints, section 8.1.3 for 97%; from table 4,
  155 incidents but manual restarts in three months on 1,200 machines: 1.4 in 1,000 node-days.

What it does not know: how long our groups take to form beyond the few workers that were measured; what finding the
culprit takes (2 to 15 minutes in ByteRobust's section 2.2: nobody is charged for it here); failures that come in bursts
(racks, switches), that are slow instead of dead, or that are mended wrongly; code and people; models that do not fit on
a node, for which our way without restart holds only where each shard has a replica in another group; what spares cost
(4 for 1,024 machines in ByteRobust's table 5); communication that slows down with nodes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
DAY_S = 86_400
RATES = {"RSC-2": 2.34e-3, "Llama 3": 3.79e-3, "RSC-1": 6.50e-3}
"""Failures of a node in a day."""
MAIN_RATE, MOST_NODES = "Llama 3", 10_000
TARGETS = (0.9, 0.95, 0.97)


@dataclass(frozen=True)
class Ours:
    """What a loss costs us. Defaults are the limits that `goals.md` sets, not what was measured."""

    stall_s: float = 2.0
    """From a death to the next group, on few nodes."""
    form_s_per_node: float = 0.021
    """What each node adds to it: the slope of ByteRobust's restarts in place (table 7: 46 s on 128, 65 s on 1,024)."""
    silent_frac: float = 0.099
    """Losses that show only by silence."""
    silent_s: float = 60.0
    """How long a silence is listened to."""
    step_s: float = 10.0
    """Wall seconds of a step."""
    slots_per_node: int = 4
    """Slots of a node's workers, one after the other; a lost node's are one more for others."""
    transfer_s: float = 2.0
    """A newcomer's state, from its peers."""
    spare: bool = True
    """Whether a spare waits."""
    rejoin_s: float = 600.0
    """How long a replacement takes where none does."""
    saving_frac: float = 0.01
    """Share of the time in which training stands still to save."""
    group_loss_frac: float = 0.01
    """Share of the failures in which everybody is lost."""
    checkpoint_every_s: float = 20.0
    """What such a loss repeats at most."""


@dataclass(frozen=True)
class Restart:
    """What a failure costs a scheme that restarts: detection, restart, the work since the last checkpoint."""

    save_s: float
    """Training stands still for a checkpoint."""
    restart_s: Callable[[int], float]
    """By the number of nodes."""
    crash_s: float
    """Until a crash is noticed."""
    silent_s: float
    """Until a silence is noticed."""
    silent_frac: float = 0.099
    interval_s: float | None = None
    """Work between checkpoints; none for the best one, by Young and Daly."""

    def interval(self, mtbf_s: float) -> float:
        """Seconds of work between checkpoints."""
        return self.interval_s or math.sqrt(2 * self.save_s * mtbf_s)


# Section 2.2: errors show after about 60 s; table 3: silence by PyTorch's timeout of about 10 min; table 8, "Megatron
# save"; table 7, "requeue": 454, 545, 635, 768 s on 128 to 1,024 machines, about 105 s more each time they double.
REQUEUE = Restart(
    save_s=13.0, restart_s=lambda nodes: max(60.0, 454 + 105 * math.log2(nodes / 128)), crash_s=60.0, silent_s=600.0
)
# Table 3; table 7, "hot updates", as a line; 0.9% for a checkpoint at every step (of 10 s): section 1.
STANDBY = Restart(save_s=0.09, restart_s=lambda nodes: 43 + 0.021 * nodes, crash_s=10.0, silent_s=30.0, interval_s=10.0)


Lengths = Sequence[tuple[float, float]]
"""How long something takes to mend, as (share, seconds)."""


def mended_s(lengths: Lengths, rate: float) -> float:
    """Expected time to mend something, when each failure in the meantime makes it start over."""
    through = sum(share * math.exp(-rate * length_s) for share, length_s in lengths)
    return (1 - through) / (rate * through)


def down_of(scheme: Restart, nodes: int) -> Lengths:
    """From a failure to work."""
    restart_s, silent = scheme.restart_s(nodes), scheme.silent_frac
    return [(1 - silent, scheme.crash_s + restart_s), (silent, scheme.silent_s + restart_s)]


def stall_of(ours: Ours, nodes: int) -> Lengths:
    """From a death to the next group, with the spare in it where one waits."""
    form_s = ours.stall_s + ours.form_s_per_node * nodes + ours.transfer_s * ours.spare
    return [(1 - ours.silent_frac, form_s), (ours.silent_frac, form_s + ours.silent_s)]


def join_of(ours: Ours, nodes: int) -> Lengths:
    """Standing still for a replacement."""
    return [(1.0, ours.stall_s + ours.form_s_per_node * nodes + ours.transfer_s)]


def speed(missing: int, ours: Ours, nodes: int) -> float:
    """Speed of a step with nodes missing: slots are whole, so the slowest has a whole one more."""
    slots = ours.slots_per_node
    return slots / math.ceil(slots * nodes / (nodes - missing))


def restart_goodput(scheme: Restart, nodes: int, node_rate: float) -> float:
    """Useful share of the time, in closed form (Daly 2006: each failed attempt costs its time and a restart)."""
    rate = nodes * node_rate / DAY_S
    work_s = scheme.interval(1 / rate)
    down_s = mended_s(down_of(scheme, nodes), rate)
    return work_s / ((1 / rate + down_s) * math.expm1(rate * (work_s + scheme.save_s)))


def ours_goodput(ours: Ours, nodes: int, node_rate: float) -> float:
    """Useful share of the time at full speed, in closed form.

    Steps advance in the time that failures leave. In a part of it nodes are missing: as many as failures came within
    the time of a replacement, a Poisson number.
    """
    rate, everybody = nodes * node_rate / DAY_S, ours.group_loss_frac
    loss_s = mended_s(stall_of(ours, nodes), rate) + ours.step_s / ours.slots_per_node
    cold_s = mended_s(down_of(REQUEUE, nodes), rate) + ours.checkpoint_every_s / 2
    joining = mean_missing = average = 0.0
    if not ours.spare:  # each failure, also one while another is mended, wants a replacement in the end
        joining = rate * (1 - everybody) * mended_s(join_of(ours, nodes), rate)
        mean_missing = rate * (1 - everybody) * ours.rejoin_s
    chance = math.exp(-mean_missing)
    for missing in range(nodes):
        average += chance * speed(missing, ours, nodes)
        chance *= mean_missing / (missing + 1)
    advancing = (1 - joining) / (1 + rate * ((1 - everybody) * loss_s + everybody * cold_s))
    return advancing * average * (1 - ours.saving_frac)


def played_mend(draw: random.Random, rate: float, lengths: Lengths) -> tuple[float, int]:
    """Seconds until something was mended, and how many failures that took; the next one is as far as ever."""
    elapsed_s, failures = 0.0, 1
    shares = [share for share, _ in lengths]
    while True:
        (_, length_s) = draw.choices(lengths, shares)[0]
        failure_s = draw.expovariate(rate)
        if failure_s >= length_s:
            return elapsed_s + length_s, failures
        elapsed_s, failures = elapsed_s + failure_s, failures + 1


def played_restart(scheme: Restart, nodes: int, node_rate: float, num_failures: int, seed: int) -> float:
    """The same as `restart_goodput`, by playing it until so many failures have been."""
    draw, rate = random.Random(seed), nodes * node_rate / DAY_S
    work_s = scheme.interval(1 / rate)
    wall_s = useful_s = 0.0
    while num_failures > 0:
        up_s = draw.expovariate(rate)
        useful_s += work_s * (up_s // (work_s + scheme.save_s))
        down_s, failures = played_mend(draw, rate, down_of(scheme, nodes))
        wall_s, num_failures = wall_s + up_s + down_s, num_failures - failures
    return useful_s / wall_s


def played_ours(ours: Ours, nodes: int, node_rate: float, num_failures: int, seed: int) -> float:
    """The same as `ours_goodput`, by playing it until so many failures have been."""
    draw, rate = random.Random(seed), nodes * node_rate / DAY_S
    wall_s = useful_s = 0.0
    coming: list[float] = []  # when replacements are there; as many nodes are missing
    while num_failures > 0:
        up_s = draw.expovariate(rate)
        joins = bool(coming) and coming[0] < wall_s + up_s
        until_s = max(wall_s, coming[0]) if joins else wall_s + up_s
        useful_s += (until_s - wall_s) * speed(len(coming), ours, nodes)
        if joins:
            heapq.heappop(coming)
            down_s, failures = played_mend(draw, rate, join_of(ours, nodes))
            failures -= 1  # it did not begin with one
        elif draw.random() < ours.group_loss_frac:
            down_s, failures = played_mend(draw, rate, down_of(REQUEUE, nodes))
            useful_s -= draw.uniform(0, ours.checkpoint_every_s) * speed(len(coming), ours, nodes)
            coming = []
            num_failures, failures = num_failures - failures, 0
        else:
            down_s, failures = played_mend(draw, rate, stall_of(ours, nodes))
            down_s += ours.step_s / ours.slots_per_node
        wall_s, num_failures = until_s + down_s, num_failures - failures
        for _ in range(0 if ours.spare else failures):
            heapq.heappush(coming, wall_s + ours.rejoin_s)
    return (1 - ours.saving_frac) * useful_s / wall_s


Scheme = tuple[str, Callable[[int, float], float], Callable[[int, float, int, int], float]]


def schemes(ours: Ours) -> list[Scheme]:
    """Name, closed form and simulation of everything that is compared."""

    def of_ours(name: str, ours: Ours) -> Scheme:
        return (
            name,
            lambda n, rate: ours_goodput(ours, n, rate),
            lambda n, rate, f, seed: played_ours(ours, n, rate, f, seed),
        )

    def of_restart(name: str, scheme: Restart) -> Scheme:
        return (
            name,
            lambda n, rate: restart_goodput(scheme, n, rate),
            lambda n, rate, f, seed: played_restart(scheme, n, rate, f, seed),
        )

    return [
        of_ours("ours, groups form as fast as on few nodes", replace(ours, form_s_per_node=0.0)),
        of_ours("ours", ours),
        of_ours("ours, no spare", replace(ours, spare=False)),
        of_restart("standby", STANDBY),
        of_restart("requeue", REQUEUE),
    ]


def longest_form_s(ours: Ours, goodput: float) -> float:
    """How long the most nodes may take to form a group for this goodput at the main rate, by bisection."""
    low, high = 0.0, 10_000.0
    for _ in range(50):
        middle = (low + high) / 2
        trial = replace(ours, stall_s=middle, form_s_per_node=0.0)
        low, high = (middle, high) if ours_goodput(trial, MOST_NODES, RATES[MAIN_RATE]) >= goodput else (low, middle)
    return low


def checks() -> dict[str, dict[str, float]]:
    """What the restarts' closed form says of published runs, beside what was published."""
    kokolis = Restart(save_s=60.0, restart_s=lambda _: 300.0, crash_s=0.0, silent_s=0.0)
    rate = 2000 * RATES["RSC-1"] / DAY_S
    work_s = kokolis.interval(1 / rate)
    return {
        "Llama 3, 2,048 nodes: over 0.90 published, restarts automated": {
            "requeue": round(restart_goodput(REQUEUE, 2048, RATES["Llama 3"]), 4),
            "standby": round(restart_goodput(STANDBY, 2048, RATES["Llama 3"]), 4),
        },
        "ByteRobust, 1,200 nodes at 1.44 failures in 1,000 node-days: up to 0.97 published, code and people included": {
            "standby": round(restart_goodput(STANDBY, 1200, 1.44e-3), 4)
        },
        "2410.21680's estimate for 2,000 nodes of RSC-1, 60 s a checkpoint, 300 s a restart": {
            "theirs": round((1 - rate * (300.0 + work_s / 2)) / (1 + 60.0 / work_s), 4),
            "this closed form": round(restart_goodput(kokolis, 2000, RATES["RSC-1"]), 4),
        },
    }


def main() -> None:
    """Prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", type=Path, help="where to write the plot, as SVG")
    for field in fields(Ours):
        if field.type != "bool":
            kind = int if field.type == "int" else float
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    words = vars(parser.parse_args())
    ours = Ours(**{field.name: words[field.name] for field in fields(Ours) if field.name in words})
    sizes = [100, 1000, MOST_NODES] if words["quick"] else [100, 300, 1000, 3000, MOST_NODES]
    failures = 5_000 if words["quick"] else 50_000
    compared = schemes(ours)
    table: dict[str, dict[str, dict[int, float]]] = {}
    apart = 0.0
    for number, (rate_name, node_rate) in enumerate(RATES.items()):
        for name, closed, played in compared:
            found = {nodes: closed(nodes, node_rate) for nodes in sizes}
            apart = max(apart, *(abs(found[n] - played(n, node_rate, failures, number)) for n in sizes))
            table.setdefault(name, {})[rate_name] = {nodes: round(value, 4) for nodes, value in found.items()}
    if words["plot"]:
        words["plot"].write_text(plotted(compared), encoding="utf-8")
    value = table["ours"][MAIN_RATE][MOST_NODES]
    goal = max(table[name][MAIN_RATE][MOST_NODES] for name in ("standby", "requeue"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "name": "failures",
                "value": value,
                "goal": goal,
                "met": value > goal,
                "ours": {"assumed": {field.name: getattr(ours, field.name) for field in fields(Ours)}}
                | {
                    "a group on 10,000 nodes may take, s, for goodput": {
                        g: round(longest_form_s(ours, g), 1) for g in TARGETS
                    }
                }
                | {name: rows for name, rows in table.items() if name.startswith("ours")},
                "peers": {name: rows for name, rows in table.items() if not name.startswith("ours")},
                "spread": {"closed form against simulation": round(apart, 4), "failures played": failures}
                | {"against what was published": checks()},
                "versions": {},
                "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
                "commit": commit.stdout.strip(),
            }
        )
    )


# -------------------------------------------------------------------------------------------------------------- plot

_LOOKS = {
    "ours, groups form as fast as on few nodes": (
        "#1f6feb",
        "5 4",
        "ours, if forming a group stays as fast as on few nodes",
    ),
    "ours": ("#1f6feb", "", "ours, if forming slows down with nodes as restarts do"),
    "ours, no spare": ("#8250df", "", "the same, no spare waiting"),
    "standby": ("#2e7d5b", "", "restart in place, warm standbys (ByteRobust)"),
    "requeue": ("#c2601d", "", "requeue from the last checkpoint (Young/Daly)"),
}
_PANEL, _HIGH, _LOW = 300, 260, 0.5


def plotted(compared: Sequence[Scheme]) -> str:
    """Goodput by nodes, a panel for each failure rate."""
    sizes = [round(10 ** (2 + 2 * i / 60)) for i in range(61)]
    parts = []
    for number, (rate_name, node_rate) in enumerate(RATES.items()):
        left = 52 + number * (_PANEL + 24)
        x = lambda nodes, left=left: left + _PANEL * (math.log10(nodes) - 2) / 2
        y = lambda frac: 44 + _HIGH * (1 - (frac - _LOW) / (1 - _LOW))
        title = f"{rate_name}: {1e3 * node_rate:.2f} failures in 1,000 node-days"
        parts.append(f'<text x="{left}" y="28" class="head">{title}</text>')
        for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            parts.append(f'<path d="M{left} {y(tick):.1f}h{_PANEL}" stroke="#d9dee4"/>')
            if number == 0:
                parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
        for nodes, anchor in ((100, "start"), (300, "middle"), (1000, "middle"), (3000, "middle"), (10_000, "end")):
            parts.append(f'<path d="M{x(nodes):.1f} 44v{_HIGH}" stroke="#d9dee4"/>')
            parts.append(f'<text x="{x(nodes):.1f}" y="{_HIGH + 62}" text-anchor="{anchor}">{nodes:,}</text>')
        for name, closed, _ in compared:
            colour, dash, _ = _LOOKS[name]
            places = [(x(nodes), closed(nodes, node_rate)) for nodes in sizes]
            line = " ".join(f"{place:.1f},{y(frac):.1f}" for place, frac in places if frac >= _LOW)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            )
    for number, (colour, dash, said) in enumerate(_LOOKS.values()):
        across, down = 52 + number % 2 * 390, _HIGH + 112 + number // 2 * 22
        parts.append(
            f'<path d="M{across} {down - 4}h26" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts.append(f'<text x="{across + 32}" y="{down}">{said}</text>')
    note = "nodes; expected goodput by bench/failures.py: a simulation, which says what it does not know"
    parts.append(f'<text x="52" y="{_HIGH + 84}">{note}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1030 430" font-family="system-ui, sans-serif" '
        'font-size="12" fill="#1d2228"><style>.head { font-weight: 600; font-size: 13px; }</style>'
        f'<rect width="1030" height="430" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
