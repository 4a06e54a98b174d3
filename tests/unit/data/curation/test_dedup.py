"""Duplicates, contamination and repeated lines: each rule on cases made by hand, then against a plain reference."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifact import Workspace
from forge_ray.config import CurateConfig
from forge_ray.data.curation import contamination, dedup
from forge_ray.data.curation.dedup import Part, across, features
from forge_ray.data.curation.spill import read_columns, write_columns
from forge_ray.errors import DataError
from tests.unit.data.small_job import map_rows_here


@dataclass(frozen=True)
class Doc:
    """A document and where it belongs."""

    id: str
    text: str
    split: str = "train"
    generation: int = 0


@dataclass(frozen=True)
class Fate:
    """What was decided about a document."""

    drop: str | None = None
    other: str | None = None
    remove: tuple[int, ...] = ()


STAYS = Fate()
ALL = {
    "exact": {"enabled": True},
    "near": {"enabled": True, "ngram_words": 2, "bands": 8, "rows": 2},
    "decontaminate": {"enabled": True, "ngram_words": 3, "max_overlap_frac": 0.25},
    "lines": {"enabled": True, "min_chars": 4},
}


def config_of(*steps: str, spill_bytes: int = 256 << 20, **more: Any) -> CurateConfig:
    """The named steps with the sizes of `ALL`."""
    chosen = {name: {**ALL[name], **more.get(name, {})} for name in steps}
    return CurateConfig.model_validate({**chosen, "spill_bytes": spill_bytes})


@pytest.fixture(autouse=True)
def _tasks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks run in this process; what goes to one and comes back is what Ray would carry."""

    for module in (dedup, contamination):
        monkeypatch.setattr(module, "map_rows", map_rows_here)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of small blobs, none of which must last


Decide = Callable[..., dict[str, Fate]]


@pytest.fixture
def decide(workspace: Workspace) -> Decide:
    """The fates of documents that lie in parts of at most `size` documents, given in the corpus's order."""

    def run(docs: list[Doc], config: CurateConfig, size: int = 1000) -> dict[str, Fate]:
        pieces = in_parts(docs, size)
        parts = [stored(workspace, piece, config) for piece in pieces]
        fates = {doc.id: STAYS for doc in docs}
        for piece, entry in zip(pieces, across(parts, config, workspace), strict=True):
            if entry is not None:
                rows = pq.read_table(workspace.verified(entry, "decisions")).to_pylist()
                assert [row["row"] for row in rows] == sorted({row["row"] for row in rows})
                for row in rows:
                    assert row["drop"] or row["remove"]
                    fates[piece[row["row"]].id] = Fate(row["drop"], row["other"], tuple(row["remove"]))
        return fates

    return run


def in_parts(docs: list[Doc], size: int) -> list[list[Doc]]:
    """Neighbours of one split and generation together."""
    pieces: list[list[Doc]] = []
    for doc in docs:
        last = pieces[-1] if pieces else []
        if not last or (last[0].split, last[0].generation) != (doc.split, doc.generation) or len(last) >= size:
            pieces.append([])
        pieces[-1].append(doc)
    return pieces


def stored(workspace: Workspace, docs: list[Doc], config: CurateConfig) -> Part:
    """A part as curation's first pass leaves it, its features in several batches."""
    with workspace.new_file("clean") as clean:
        pq.write_table(pa.table({"id": [d.id for d in docs], "text": [d.text for d in docs]}), clean.stream)
    with workspace.new_file("features") as build:
        tables = [features([d.text for d in docs[i : i + 7]], config) for i in range(0, len(docs), 7)]
        with pa.ipc.new_stream(build.stream, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
    return Part("part", docs[0].split, docs[0].generation, len(docs), clean.entry, build.entry)


def words(*numbers: int) -> str:
    """A text of numbered words."""
    return " ".join(f"w{number}" for number in numbers)


# ------------------------------------------------------------------------------------------------------ the rules


def test_of_equal_documents_the_first_stays(decide: Decide) -> None:
    docs = [Doc("a", "One  Two\n"), Doc("b", "one three"), Doc("c", "ONE two"), Doc("d", " one\ttwo ")]
    fates = decide(docs, config_of("exact"))
    assert fates == {"a": STAYS, "b": STAYS, "c": Fate("exact", "a"), "d": Fate("exact", "a")}


def test_empty_documents_are_equal_but_not_near(decide: Decide) -> None:
    docs = [Doc("a", ""), Doc("b", " \n"), Doc("c", "..."), Doc("d", "!!!")]
    assert decide(docs, config_of("near")) == dict.fromkeys("abcd", STAYS)
    assert decide(docs, config_of("exact"))["b"] == Fate("exact", "a")


def test_documents_shorter_than_a_shingle_are_near_when_their_words_are_equal(decide: Decide) -> None:
    config = config_of("near", near={"ngram_words": 5})
    docs = [Doc("a", "one two"), Doc("b", "One, two!"), Doc("c", "two one"), Doc("d", "one"), Doc("e", "one two three")]
    assert decide(docs, config) == dict.fromkeys("acde", STAYS) | {"b": Fate("near", "a")}


def test_of_a_chain_of_near_documents_the_first_stays(decide: Decide) -> None:
    """Ends of the chain that share nothing are of one component."""
    docs = [Doc(str(i), words(*range(10 * i, 10 * i + 60))) for i in range(12)]
    assert decide(docs, config_of("near")) == {"0": STAYS} | {str(i): Fate("near", "0") for i in range(1, 12)}


def test_held_out_documents_win_within_a_generation(decide: Decide) -> None:
    docs = [Doc("h", words(*range(50)), "heldout"), Doc("t", words(*range(50))), Doc("u", words(*range(1, 51)))]
    fates = decide(docs, config_of("exact", "near"))
    assert fates == {"h": STAYS, "t": Fate("exact", "h"), "u": Fate("near", "h")}


def test_a_later_document_that_joins_two_components_changes_neither(decide: Decide) -> None:
    left, right = list(range(60)), list(range(100, 160))
    docs = [
        *(Doc("a", words(*left)), Doc("b", words(*right)), Doc("b2", words(*right[:-1]))),
        *(Doc("n", words(*left, *right), generation=1), Doc("m", words(*right), generation=2)),
    ]
    fates = decide(docs, config_of("near", near={"bands": 32, "rows": 1}))
    assert fates["a"] == fates["b"] == STAYS
    assert fates["b2"] == Fate("near", "b")
    assert fates["n"] == fates["m"] == Fate("near", "a")


def test_a_training_document_that_stands_in_evaluation_texts_goes(decide: Decide) -> None:
    docs = [
        *(Doc("h", words(*range(40)), "heldout"), Doc("i", words(*range(100, 140)), "heldout")),
        *(Doc("half", words(*range(20), *range(200, 220))), Doc("little", words(*range(10), *range(300, 340)))),
        Doc("two", words(*range(12), *range(400, 430), *range(100, 113))),
        *(Doc("short", words(1, 2)), Doc("other", words(*range(500, 540)))),
    ]
    fates = decide(docs, config_of("decontaminate"))
    assert fates == {doc.id: STAYS for doc in docs} | {
        "half": Fate("contaminated", "h"),
        "two": Fate("contaminated", "i"),  # 10 of 53 n-grams stand in h and 11 in i
    }


def test_the_share_that_may_overlap_is_exact(decide: Decide) -> None:
    """Of 20 n-grams 5 are a quarter, which may stand; 6 are more."""
    held = Doc("h", words(*range(30)), "heldout")
    five, six = Doc("5", words(*range(7), *range(100, 115))), Doc("6", words(*range(8), *range(200, 214)))
    fates = decide([held, five, six], config_of("decontaminate"))
    assert fates["5"] == STAYS
    assert fates["6"] == Fate("contaminated", "h")


def test_a_later_held_out_document_gives_way_to_an_old_training_document(decide: Decide) -> None:
    docs = [
        *(Doc("t", words(*range(30))), Doc("h", words(*range(30), *range(90, 200)), "heldout", 1)),
        *(Doc("i", words(*range(300, 340)), "heldout", 1), Doc("u", words(*range(100, 130)), generation=1)),
        Doc("v", words(*range(300, 330)), generation=1),
    ]
    fates = decide(docs, config_of("decontaminate"))
    assert fates == {
        "t": STAYS,
        "h": Fate("contaminated", "t"),
        "i": STAYS,
        "u": STAYS,  # stands in h alone, which is no evaluation text any more
        "v": Fate("contaminated", "i"),
    }


def test_dropped_held_out_documents_are_no_evaluation_texts(decide: Decide) -> None:
    tail = range(100, 130)
    docs = [
        *(Doc("g", words(*range(200, 500)), "heldout"), Doc("h", words(*range(200, 500), *tail), "heldout")),
        Doc("t", words(*tail)),
    ]
    assert decide(docs, config_of("decontaminate"))["t"] == Fate("contaminated", "h")
    fates = decide(docs, config_of("near", "decontaminate", near={"rows": 4}))
    assert fates["h"] == Fate("near", "g")
    assert fates["t"] == STAYS


def test_a_line_of_earlier_documents_goes_from_later_ones(decide: Decide) -> None:
    docs = [
        Doc("a", "same line\nown line a\nsame line\nab"),
        Doc("b", "ab\n  Same LINE\t\nown line b\nsame line"),
        Doc("c", "own line c\nsame line"),
        Doc("h", "same line\nown line b", "heldout", 1),
        Doc("d", "same line\n\n\nown line a", generation=1),
    ]
    fates = decide(docs, config_of("lines"))
    assert fates == {
        "a": STAYS,
        "b": Fate(remove=(1, 3)),
        "c": Fate(remove=(1,)),
        "h": STAYS,
        "d": Fate(remove=(0, 3)),
    }
    fates = decide(docs, config_of("lines", lines={"max_copies": 2}))
    assert fates == {"a": STAYS, "b": STAYS, "c": Fate(remove=(1,)), "h": STAYS, "d": Fate(remove=(0,))}


def test_lines_of_dropped_documents_do_not_count(decide: Decide) -> None:
    docs = [Doc("a", "one one one"), Doc("b", "one one\none"), Doc("c", "one one\nothers")]
    assert decide(docs, config_of("lines"))["c"] == Fate(remove=(0,))
    assert decide(docs, config_of("exact", "lines"))["c"] == STAYS


def test_line_lengths_count_characters(decide: Decide) -> None:
    docs = [Doc("a", "äöü\näöüß"), Doc("b", "äöü\näöüß")]
    assert decide(docs, config_of("lines"))["b"] == Fate(remove=(1,))


def test_named_evaluation_sets_count_for_every_generation(decide: Decide, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    rows = [{"text": words(*range(start, start + 30))} for start in (0, 100)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "story.txt").write_text(words(*range(200, 230)))
    docs = [
        Doc("a", words(*range(100, 130))),
        *(Doc("b", words(*range(300, 330))), Doc("c", words(*range(200, 230)), generation=1)),
    ]
    fates = decide(docs, config_of("decontaminate", decontaminate={"uris": [str(folder)]}))
    assert fates["a"].drop == fates["c"].drop == "contaminated"
    assert str(fates["a"].other).endswith("questions.jsonl#2")
    assert str(fates["c"].other).endswith("story.txt")
    assert fates["b"] == STAYS


def test_new_documents_cost_no_second_reading_of_old_ones(
    decide: Decide, monkeypatch: pytest.MonkeyPatch, workspace: Workspace
) -> None:
    """With new training documents alone, the old parts' matches are remembered."""
    old = [Doc("h", words(*range(50)), "heldout"), *(Doc(f"t{i}", words(*range(i, i + 50))) for i in range(6))]
    config = config_of("decontaminate")
    decide(old, config, size=2)
    worked: list[str] = []
    for task in (contamination.Grams, contamination.Match):
        original = task.__call__

        def call(self: Any, row: Any, original: Any = original) -> Any:
            worked.append(type(self).__name__)
            return original(self, row)

        monkeypatch.setattr(task, "__call__", call)
    new = [Doc("u", words(*range(30, 90)), generation=1)]
    assert decide([*old, *new], config, size=2)["u"] == Fate("contaminated", "h")
    assert worked == ["Match"]
    worked.clear()
    later = [Doc("i", words(*range(300, 400)), "heldout", 2)]
    decide([*old, *new, *later], config, size=2)
    assert sorted(worked) == ["Grams", *["Match"] * 4]  # its n-grams, and each training part's look at them alone


# ------------------------------------------------------------------------------------------------- what it costs


def test_nothing_is_left_behind_but_what_is_remembered(decide: Decide, workspace: Workspace) -> None:
    docs, config = corpus(3), config_of("exact", "near", "lines", spill_bytes=4000)
    decide(docs, config, size=3)
    kept = set(workspace.storage.list("blobs"))
    inputs = {
        f"blobs/{e.sha256[:2]}/{e.sha256}" for p in in_parts(docs, 3) for e in blobs(stored(workspace, p, config))
    }
    decisions = kept - inputs
    assert 0 < len(decisions) <= len(in_parts(docs, 3))
    decide(docs, config, size=3)
    assert set(workspace.storage.list("blobs")) == kept  # the same bytes again


def blobs(part: Part) -> list[Any]:
    """What a part refers to."""
    return [part.clean, part.features]


def test_a_failing_task_leaves_nothing_behind(
    decide: Decide, monkeypatch: pytest.MonkeyPatch, workspace: Workspace
) -> None:
    docs, config = corpus(3), config_of("exact", "near", "lines", spill_bytes=4000)
    for piece in in_parts(docs, 3):
        stored(workspace, piece, config)
    before = set(workspace.storage.list("blobs"))

    def fail(self: Any, row: Any) -> Any:
        raise DataError("no")

    monkeypatch.setattr(dedup._Decide, "__call__", fail)
    with pytest.raises(DataError):
        decide(docs, config, size=3)
    assert set(workspace.storage.list("blobs")) == before


@pytest.mark.parametrize("column", ["exact", "near", "lines"])
def test_no_task_holds_more_than_it_may(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    """Half of the documents are alike in every key, and the whole corpus takes more than twice what a task may."""
    spill_bytes = 500_000
    config = config_of(column, spill_bytes=spill_bytes, near={"bands": 8, "rows": 2})
    parts = []
    for start in range(0, {"exact": 12000, "near": 4800, "lines": 2400}[column], 300):
        texts = [words(*range(i, i + 15)).replace(" w", "\nthis is w") for i in range(start, start + 300)]
        texts[::2] = ["a line that all have\n" * 2] * 150
        parts.append(stored(workspace, [Doc(f"{start}-{i}", text) for i, text in enumerate(texts)], config))
    peaks: dict[str, list[int]] = {}

    def run(name: str, task: Any, rows: list[Any]) -> list[Any]:
        found = []
        for row in rows:
            tracemalloc.start()
            found += task(row)
            peaks.setdefault(name, []).append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return found

    monkeypatch.setattr(dedup, "_run", run)
    across(parts, config, workspace)
    largest = max(max(of_phase) for of_phase in peaks.values())
    assert largest < spill_bytes + 200_000  # and what a task takes for no rows at all
    assert max(sum(of_phase) for of_phase in peaks.values()) > 2 * (spill_bytes + 200_000)


# ------------------------------------------------------------------------------------------------------- features


def test_features_hold_only_what_is_switched_on() -> None:
    assert features(["one"], config_of("decontaminate")).column_names == []
    assert features(["one"], config_of("exact", "lines")).column_names == ["exact", "lines"]
    table = features(["one two", "", "three\nfour five"], config_of(*ALL))
    assert table["bands"].is_valid().to_pylist() == [True, False, True]
    assert [len(one) for one in table["lines"].to_pylist()] == [1, 1, 2]
    assert features([], config_of(*ALL)).num_rows == 0


def test_features_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [doc.text for doc in corpus(1)]
    config = config_of(*ALL)
    whole = features(texts, config)
    monkeypatch.setattr(dedup, "_CHUNK_CHARS", 100)
    assert features(texts, config).equals(whole)
    for i in (0, len(texts) // 2):
        assert features(texts[i : i + 3], config).equals(whole.slice(i, 3))


def test_parts_out_of_order_are_refused(workspace: Workspace) -> None:
    config = config_of("exact")
    parts = [stored(workspace, [Doc(str(g), "text", generation=g)], config) for g in (1, 0)]
    with pytest.raises(ValueError, match="generations"):
        across(parts, config, workspace)


def test_parts_without_documents_decide_nothing(workspace: Workspace) -> None:
    config = config_of(*ALL)
    full = stored(workspace, [Doc("a", "text"), Doc("b", "text")], config)
    empty = Part("empty", "train", 0, 0, full.clean, full.features)
    assert across([empty], config, workspace) == [None]
    assert [bool(entry) for entry in across([empty, full, empty], config, workspace)] == [False, True, False]
    assert across([], config, workspace) == []


# -------------------------------------------------------------------------------------- against a plain reference


def reference(docs: list[Doc], config: CurateConfig) -> dict[str, Fate]:
    """The same rules in plain loops over all documents at once."""
    fates: dict[str, Fate] = {}
    if config.exact.enabled:
        first: dict[str, str] = {}
        for doc in docs:
            keeper = first.setdefault(" ".join(doc.text.lower().split()), doc.id)
            if keeper != doc.id:
                fates[doc.id] = Fate("exact", keeper)
    if config.near.enabled:
        near(docs, config, fates)
    if config.decontaminate.enabled:
        decontaminate(docs, config, fates)
    if config.lines.enabled:
        held: dict[tuple[str, str], int] = {}
        for doc in docs:
            if doc.id not in fates:
                lines = [line.strip().lower() for line in doc.text.split("\n")]
                counts = [len(line) >= config.lines.min_chars for line in lines]
                full = [
                    c and held.get((doc.split, line), 0) >= config.lines.max_copies for c, line in zip(counts, lines)
                ]
                for line in set(lines):
                    held[doc.split, line] = held.get((doc.split, line), 0) + 1
                if any(full):
                    fates[doc.id] = Fate(remove=tuple(i for i, one in enumerate(full) if one))
    return {doc.id: fates.get(doc.id, STAYS) for doc in docs}


def near(docs: list[Doc], config: CurateConfig, fates: dict[str, Fate]) -> None:
    """Components by repeated relabelling, for each generation from the start."""
    alive = [i for i, doc in enumerate(docs) if doc.id not in fates]
    bands = features([doc.text for doc in docs], config)["bands"].to_pylist()
    for generation in sorted({doc.generation for doc in docs}):
        there = [i for i in alive if docs[i].generation <= generation]
        label = {i: i for i in there}
        changed = True
        while changed:
            changed = False
            smallest: dict[tuple[int, int], int] = {}
            for i in there:
                for key in enumerate(bands[i] or []):
                    smallest[key] = min(smallest.get(key, i), label[i])
            for i in there:
                low = min([label[i], *(smallest[key] for key in enumerate(bands[i] or []))])
                changed |= low != label[i]
                label[i] = low
        for i in there:
            if docs[i].generation == generation and label[i] != i:
                fates[docs[i].id] = Fate("near", docs[label[i]].id)


def decontaminate(docs: list[Doc], config: CurateConfig, fates: dict[str, Fate]) -> None:
    """Shares of n-grams, every training document against every held-out one."""
    size, limit = config.decontaminate.ngram_words, config.decontaminate.max_overlap_frac

    def grams(doc: Doc) -> list[tuple[str, ...]]:
        parts = doc.text.lower().split()
        return [tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)]

    left = [doc for doc in docs if doc.id not in fates]
    train, held = ([doc for doc in left if doc.split == split] for split in ("train", "heldout"))
    found = {}
    for h in held:
        own = set(grams(h))
        for t in train:
            share = sum(gram in own for gram in grams(t))
            if h.generation > t.generation and share > limit * len(grams(t)):
                found.setdefault(h.id, Fate("contaminated", t.id))
    held = [h for h in held if h.id not in found]
    for t in train:
        mine = {h.id: set(grams(h)) for h in held if h.generation <= t.generation}
        if sum(any(gram in own for own in mine.values()) for gram in grams(t)) > limit * len(grams(t)):
            best = max(mine, key=lambda h: sum(gram in mine[h] for gram in grams(t)))
            found[t.id] = Fate("contaminated", best)
    fates |= found


def corpus(seed: int, generations: int = 3) -> list[Doc]:
    """Small documents of few words, so that every rule meets every other."""
    draw = random.Random(seed)
    lines = [words(*(draw.randrange(40) for _ in range(draw.randint(1, 8)))) for _ in range(25)]
    docs: list[Doc] = []
    for generation in range(generations):
        for split, count in (("heldout", draw.randrange(8)), ("train", draw.randint(1, 25))):
            for _ in range(count):
                if docs and draw.random() < 0.4:
                    text = draw.choice(docs).text.split("\n")
                    if draw.random() < 0.7:
                        text[draw.randrange(len(text))] = draw.choice(lines)
                else:
                    text = draw.choices(lines, k=draw.randint(1, 12)) if draw.random() < 0.95 else [""]
                docs.append(Doc(f"{seed}-{len(docs)}", "\n".join(text), split, generation))
    return docs


COMBINATIONS = (
    ("exact",),
    ("near",),
    ("decontaminate",),
    ("lines",),
    ("exact", "near", "decontaminate", "lines"),
)


@pytest.mark.parametrize("steps", COMBINATIONS, ids=lambda steps: "+".join(steps))
def test_equal_to_a_plain_reference_however_parts_and_pieces_are_cut(
    decide: Decide, steps: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str | None] = set()
    for seed in range(3):
        monkeypatch.setattr(contamination, "_FEW_RUNS", 2 * seed)
        docs = corpus(seed)
        config = config_of(*steps, near={"rows": 3, "bands": 6}, lines={"max_copies": 1 + seed % 2})
        wanted = reference(docs, config)
        assert decide(docs, config) == wanted
        assert decide(docs, config.replace(spill_bytes=3000 + 3000 * seed), size=1 + seed) == wanted
        seen |= {fate.drop for fate in wanted.values()} | {"lines" for fate in wanted.values() if fate.remove}
    assert seen - {None} == {"contaminated" if step == "decontaminate" else step for step in steps}


def test_many_runs_are_joined_into_few_that_hold_the_same(workspace: Workspace) -> None:
    draw = np.random.default_rng(1)
    entries = []
    for first in range(0, 300, 10):
        grams = np.sort(draw.integers(0, 1 << 64, 200, np.uint64))
        entries.append(write_columns(workspace, {"gram": grams, "owner": draw.integers(first, first + 10, 200)}))
    before = [read_columns(workspace, entry) for entry in entries]
    [row] = contamination.Join(6000 * 64 // 3, workspace)({"runs": entries})
    after = [read_columns(workspace, entry) for entry in row["runs"]]
    assert [len(run["gram"]) > 1500 for run in after] == [True] * 3
    grams, owner = (np.concatenate([run[name] for run in after]) for name in ("gram", "owner"))
    assert (np.diff(grams.astype(object)) >= 0).all()
    rows = [(int(g), int(o)) for run in before for g, o in zip(run["gram"], run["owner"])]
    assert sorted(rows) == list(zip(grams.tolist(), owner.tolist()))


def test_later_generations_change_nothing_earlier(decide: Decide) -> None:
    config = config_of("exact", "near", "decontaminate", "lines", near={"rows": 3, "bands": 6})
    for seed in range(20, 23):
        docs = corpus(seed, generations=4)
        whole = decide(docs, config, size=9)
        for generation in range(1, 4):
            old = [doc for doc in docs if doc.generation < generation]
            assert decide(old, config, size=9) == {doc.id: whole[doc.id] for doc in old}
