"""Alerts and the dashboard ask for gauges that there are, and every alert says what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from forge_ray.train import goodput

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
RULES = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())

# A run with all that can happen to one, so that no gauge is left out.
EVENTS = [
    {"event": "start", "time_s": 0.0, "step": 0},
    {
        "event": "form",
        "time_s": 1.0,
        "cause": "start",
        "step": 0,
        "world_size": 2,
        "joined": ["h/0", "h/1"],
        "lost": [],
    },
    {"event": "step", "time_s": 2.0, "step": 1, "wall_s": 1.0, "tokens": 9, "loss": 3.5, "world_size": 2},
    {"event": "seat", "time_s": 2.5, "seat": "h/1", "host": "h", "what": "died", "why": "killed"},
    {"event": "form", "time_s": 2.6, "cause": "lost", "step": 1, "world_size": 1, "joined": [], "lost": ["h/1"]},
    {"event": "step", "time_s": 4.0, "step": 2, "wall_s": 1.0, "tokens": 9, "loss": 3.25, "world_size": 1},
    {"event": "checkpoint", "time_s": 5.0, "step": 2, "stall_s": 0.1, "tier": "store"},
]
GAUGES = goodput.metrics(goodput.account(EVENTS, usd_per_node_hour=2.0))


def _asked(text: str) -> set[str]:
    return {name.removeprefix("ray_") for name in re.findall(r"ray_forge_\w+", text)}


def test_the_run_above_has_every_gauge() -> None:
    assert GAUGES["forge_loss_nats_per_token"] == 3.25
    assert GAUGES["forge_last_checkpoint_timestamp_seconds"] == 5.0
    assert GAUGES["forge_cost_usd"] > 0
    assert "forge_stall_p95_seconds" in GAUGES


def test_alerts_ask_for_gauges_that_there_are_and_say_what_to_do() -> None:
    for rule in RULES:
        assert _asked(rule["expr"])
        assert _asked(rule["expr"]) <= GAUGES.keys(), rule["alert"]
        assert rule["annotations"]["do"]
        assert rule["labels"]["severity"] in ("page", "ticket")
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_panels_ask_for_gauges_that_there_are_and_do_not_overlap() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert _asked(target["expr"])
            assert _asked(target["expr"]) <= GAUGES.keys(), panel["title"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
