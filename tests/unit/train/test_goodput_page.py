"""The page of a run: one file, small for any run, true to the ledger, safe whatever the names hold."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest

from forge_ray.train import goodput_page
from forge_ray.train.goodput import account

T0 = 1_790_000_000.0
VOID = {"meta", "!doctype"}


class Page(HTMLParser):
    """Tags that are open, all that was opened with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data + " "

    def points(self) -> list[tuple[float, float]]:
        found = [attributes.get("points") or "" for _, attributes in self.tags]
        return [(float(x), float(y)) for row in found for x, y in (place.split(",") for place in row.split())]


def records(steps: int, faults: int = 0) -> list[dict[str, Any]]:
    """A run of steps of a second; faults are spread over it."""
    rows: list[dict[str, Any]] = [{"time_s": T0, "event": "start", "step": 0, "host": "head"}]
    rows.append({"time_s": T0 + 5, "event": "form", "cause": "start", "world_size": 2, "step": 0, "joined": ["a", "b"]})
    now = T0 + 5
    for step in range(1, steps + 1):
        stall_s = 0.0
        if faults and step % max(1, steps // faults) == 0:
            stall_s = 0.5
            rows.append({"time_s": now, "event": "seat", "seat": "b", "what": "died", "why": "killed by SIGKILL"})
            rows.append({"time_s": now + 0.1, "event": "form", "cause": "lost", "world_size": 1, "lost": ["b"]})
        now += 1.0 + stall_s
        said = {"loss": 2 + 8 / step, "tokens": 10, "wall_s": 1.0 + stall_s, "stall_s": stall_s, "world_size": 2}
        rows.append({"time_s": now, "event": "step", "step": step, **said})
        if stall_s:
            rows.append({"time_s": now, "event": "form", "cause": "join", "world_size": 2, "joined": ["b"]})
    return [*rows, {"time_s": now, "event": "end", "step": steps}]


@pytest.mark.parametrize(
    "events",
    [[], records(0), records(1), records(2), records(700, 30), records(1)[:2], [{"time_s": T0, "event": "end"}]],
    ids=["nothing", "no step", "one step", "two steps", "faults", "no end", "end alone"],
)
def test_every_run_has_a_whole_page_that_fetches_nothing(events: list[dict[str, Any]]) -> None:
    text = goodput_page.as_html(events, "abc", 1.0)
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "image", "use", "base"}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "xlink:href", "onload"}
    assert "default-src 'none'" in str([attributes.get("content") for _, attributes in page.tags])
    assert not re.search(r"\b(nan|inf)\b", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_page_says_what_the_ledger_says() -> None:
    events = records(700, 30)
    found = account(events, 3600.0)
    page = Page(goodput_page.as_html(events, "abc", 3600.0))
    assert f"{found.goodput_frac:.2%}" in page.words
    assert f"${found.usd:,.2f}" in page.words
    assert "process died (30)" in page.words
    assert page.words.count("killed by SIGKILL") == 30
    assert "1 went on, back after 1.50 s" in page.words


def test_curves_stay_within_their_plots() -> None:
    points = Page(goodput_page.as_html(records(5000, 10), "abc")).points()
    assert len(points) > 1000
    assert all(56 <= x <= 970.1 for x, _ in points)
    assert all(y <= 330.1 for _, y in points)


def test_the_page_of_a_long_run_is_small() -> None:
    text = goodput_page.as_html(records(60_000, 5000), "abc")
    assert len(text) < 700_000
    assert "the 1,000 with the longest stalls" in text


def test_what_the_guardian_left_out_is_listed_and_counted() -> None:
    samples = [["wiki", f"document {number}"] for number in range(32)]
    said = {"verdict": "rollback", "reason": "loss 9.2", "loss": "nan", "back_to": 1, "num_samples": 640}
    events = [*records(3), {"time_s": T0 + 20, "event": "guard", "step": 3, **said, "samples": samples}]
    page = Page(goodput_page.as_html(events, "abc"))
    for words in ("rollback to 1", "640 documents", "wiki: document 31", "and 608 more"):
        assert words in page.words


def test_names_cannot_become_markup() -> None:
    evil = "</title><script>alert(1)</script>\x00"
    events = records(3)
    events += [
        {"time_s": T0 + 6, "event": "seat", "seat": evil, "host": evil, "what": "hang", "why": evil},
        {"time_s": T0 + 6, "event": "seat", "seat": evil, "host": evil, "what": "stacks", "why": evil},
        {"time_s": T0 + 6, "event": "guard", "step": 1, "verdict": evil, "reason": evil, "samples": [[evil, evil]]},
        {"time_s": T0 + 6, "event": "checkpoint_failed", "step": 1, "tier": "store", "why": evil},
    ]
    events.sort(key=lambda row: row["time_s"])
    page = Page(goodput_page.as_html(events, evil))
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.words.count("alert(1)") > 5
