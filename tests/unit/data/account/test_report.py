"""`forge data report`: counts, examples that leak nothing, and a page that needs nothing but itself."""

from __future__ import annotations

import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from forge_ray import cli
from forge_ray.data.account import builds, forget, ledger, report, report_page
from tests.unit.data.small_job import MAIL, Job, in_one_process, text

CARD, KEY = "4111 1111 1111 1111", "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>"
REASON = "gopher_min_words"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with documents that are hostile, private, short, unreadable and repeated; not to be changed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_one_process(monkeypatch)
        job = Job(tmp_path_factory.mktemp("job"))
        for i in range(9):
            job.write(f"few/{i}.txt", f"{i} few words of {MAIL} and {CARD} with {KEY} {SCRIPT}" + " word" * 8)
        job.write(f"few/write-{MAIL}.txt", "A name that is an address, " + "and a text that is too short " * 3)
        job.write("few/&lt;b onmouseover=alert(1).txt", "Another name that is hostile, " + "and too few words " * 3)
        for i in range(6):
            job.write(f"same/{i}.txt", text(random.Random(5), 5))
        job.write("bad.jsonl", '{"text": 3}\nnot json\n')
        job.settings["ingest"]["max_unreadable_frac"] = 0.5
        job.settings["curate"]["quality"] = {
            "enabled": True,
            "min_terminal_punctuation_line_frac": 0.0,
            "max_top_ngram_char_frac": {},
            "max_duplicate_ngram_char_frac": {},
            "min_stop_words": 0,
        }
        job.save()
        job.run()
    return job


@pytest.fixture(scope="module")
def found(ran: Job) -> dict[str, Any]:
    """Its report."""
    return report.gather(builds.latest(ran.workspace))


def _rows(job: Job) -> list[dict[str, Any]]:
    return [row for file in builds.files(builds.latest(job.workspace)) for row in file.rows(None, 10_000)]


def test_its_counts_are_those_of_the_ledger(ran: Job, found: dict[str, Any]) -> None:
    rows = _rows(ran)
    totals = found["totals"]
    assert totals["documents"] == len(rows)
    assert {fate: totals[fate] for fate in ("kept", "dropped", "skipped")} == Counter(row["fate"] for row in rows)
    assert totals["tokens"] == sum(row["tokens"] or 0 for row in rows)
    assert totals["bytes_in"] == sum(row["bytes_in"] or 0 for row in rows)
    gone = Counter((row["step"], row["reason"]) for row in rows if row["fate"] != ledger.KEPT)
    assert {(row["step"], row["reason"]): row["documents"] for row in found["left_out"]} == gone
    for name, column in (("source", "origin"), ("licence", "licence"), ("split", "split")):
        shown = {row["name"]: row["documents"] for row in found["by"][name]}
        assert shown == Counter(row[column] or "(none)" for row in rows)
    before = [row["bytes_in"] for row in rows if row["bytes_in"]]
    for bar in found["sizes"]["bytes before"]:
        assert bar["count"] == sum(bar["from"] <= size <= bar["to"] for size in before)
    assert sum(bar["count"] for bar in found["sizes"]["tokens"]) == totals["kept"]


def test_private_data_is_counted_by_kind_with_what_is_done_about_it(found: dict[str, Any]) -> None:
    rows = {row["kind"]: row for row in found["private"]}
    assert (rows["email"]["found"], rows["email"]["documents"], rows["email"]["action"]) == (1, 1, "replace")
    assert rows["iban"]["found"] == 0


def test_clusters_of_duplicates(found: dict[str, Any], ran: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {row["from"]: (row["count"], row["documents"]) for row in found["clusters"] if row["count"]}
    assert shown == {2: (1, 2), 4: (1, 6)}  # guide/05.txt and its copy; the six of same/
    monkeypatch.setattr(report, "_CLUSTERS_AT_ONCE", 2)  # counted in three goes
    assert report.gather(builds.latest(ran.workspace))["clusters"] == found["clusters"]


def test_examples_are_a_seeded_choice_of_documents_of_that_reason(ran: Job, found: dict[str, Any]) -> None:
    reasons = {row["id"]: (row["step"], row["reason"]) for row in _rows(ran)}
    for row in found["left_out"]:
        assert len(row["examples"]) == min(3, row["documents"])
        assert {reasons[example["id"]] for example in row["examples"]} == {(row["step"], row["reason"])}
    build = builds.latest(ran.workspace)

    def chosen(seed: int) -> list[str]:
        rows = report.gather(build, num_examples=2, seed=seed)["left_out"]
        return [example["id"] for row in rows if row["reason"] == REASON for example in row["examples"]]

    assert chosen(1) == chosen(1)
    assert len({tuple(chosen(seed)) for seed in range(8)}) > 1


def test_no_private_data_gets_into_page_json_or_terminal(
    ran: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    words = ["data", "report", str(ran.yaml), "--out", str(page), "--examples", "50"]
    assert cli.main([*words, "--json"]) == 0
    as_json = capsys.readouterr().out
    assert cli.main(words) == 0
    shown = page.read_text() + as_json + capsys.readouterr().out
    assert "&lt;EMAIL&gt;" in shown
    assert "few words of" in shown
    for secret in (MAIL, MAIL.partition("@")[2], CARD, KEY):
        assert secret not in shown, secret


def test_a_detail_at_the_end_of_an_excerpt_is_not_cut_in_half(ran: Job) -> None:
    from forge_ray.data.account.excerpts import EXCERPT_CHARS, Shown

    shown = Shown(builds.latest(ran.workspace))
    for cut in range(EXCERPT_CHARS - len(CARD), EXCERPT_CHARS):
        excerpt = shown._excerpt("word " * (cut // 5) + "x" * (cut % 5) + f" {CARD} and more")
        assert "4111" not in excerpt


def test_a_document_to_be_forgotten_is_no_example(ran: Job, tmp_path: Path) -> None:
    job = ran.copied(tmp_path)
    build = builds.latest(job.workspace)
    rows = {row["id"]: row for row in _rows(job)}
    gone = next(row for row in report.gather(build)["left_out"] if row["reason"] == REASON)["examples"][0]["id"]
    forget.bury(job.workspace, [rows[gone]], "")
    shown = [example["id"] for row in report.gather(build, num_examples=50)["left_out"] for example in row["examples"]]
    assert gone not in shown
    assert shown


class _Page(HTMLParser):
    """What a browser would take from a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs


def test_the_page_holds_no_script_and_fetches_nothing_whatever_documents_say(found: dict[str, Any]) -> None:
    page = _Page()
    html = report_page.as_html(found)
    page.feed(html)
    assert not page.tags.keys() & {"script", "img", "iframe", "link", "object", "embed", "form", "a", "base"}
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "srcset", "action")]
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html
    assert "&lt;script&gt;" in html
    assert page.tags["svg"] == 3


def test_the_page_is_written_whole_and_a_missing_folder_is_an_error(ran: Job, tmp_path: Path) -> None:
    assert cli.main(["data", "report", str(ran.yaml), "--out", str(tmp_path / "no" / "such.html")]) in (3, 4)
    assert cli.main(["data", "report", "tokenize", f"--workspace={ran.workspace.uri}", f"--out={tmp_path}/r.html"]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".html")] == ["r.html"]
    assert (tmp_path / "r.html").read_text().endswith("</html>\n")


def test_a_build_that_is_only_read_has_a_report_too(ran: Job, tmp_path: Path) -> None:
    ref = ran.workspace.resolve("ingest").ref
    job = ran.copied(tmp_path)
    for stage in ("curate", "tokenize"):
        for name in [name for name in job.workspace.refs_of_artifacts() if name.startswith(stage)]:
            job.workspace.storage.delete(f"artifacts/{name}.json")
    found = report.gather(builds.of_ref(job.workspace, ref))
    metrics = job.workspace.resolve("ingest").metrics
    assert found["totals"]["kept"] == metrics["train_documents"] + metrics["heldout_documents"]
    assert found["totals"]["skipped"] == sum(metrics["skipped"].values())
    assert report_page.as_html(found)
    assert report.as_text(found)


def test_the_finders_recall_and_precision_are_stated(found: dict[str, Any]) -> None:
    page = report_page.as_html(found | {"detectors": None})
    assert "were not measured" in page
    figures = {
        "ours": {
            "recall": {"email": 0.987},
            "precision": {"email": 0.912},
            "texts": {"manuals": {"false_per_mb": 0.25}},
        },
        "versions": {"faker": "1.2.3"},
        "date": "2026-11-23",
    }
    page = report_page.as_html(found | {"detectors": figures})
    for stated in ("98.7%", "91.2%", "measured on 2026-11-23", "faker 1.2.3", "manuals"):
        assert stated in page


def test_the_stated_figures_are_those_that_were_measured(found: dict[str, Any]) -> None:
    assert found["detectors"] == report.detectors()
    assert set(found["detectors"]["ours"]["recall"]) <= {row["kind"] for row in found["private"]}


def test_names_that_records_make_up_are_counted_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_MOST_COUNTED", 10)
    account = report._Account(0, 1, set())
    for start in range(0, 1000, 50):
        licences = ["MIT"] * 50 + [f"made-up-{i}" for i in range(start, start + 50)]
        columns = {"id": ["0" * 16] * 100, "fate": [ledger.KEPT] * 100, "licence": licences}
        account.add(ledger.table(columns), "")
    assert len(account.names["licence"]) <= 71
    rows = report._folded(account.names["licence"], 3)
    assert rows["MIT"]["documents"] == 1000
    assert sum(counts["documents"] for counts in rows.values()) == 2000
