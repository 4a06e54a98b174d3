"""A corpus that grows: only what is new is processed, and old parts, vocabulary and shards stay byte for byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from forge_ray.artifact import Artifact
from forge_ray.data import ingest, shards
from forge_ray.data.account import ledger
from forge_ray.data.curation import clean
from tests.unit.data.small_job import Job, in_one_process, text


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    in_one_process(monkeypatch)
    return Job(tmp_path)


def files_of(artifact: Artifact) -> dict[str, str]:
    indices = ("parts.json", "layout.parquet", "index.json")
    return {entry.name: entry.sha256 for entry in artifact.manifest.files if entry.name not in indices}


def grow(job: Job) -> None:
    draw = random.Random(99)
    for i in range(30):
        job.write(f"later/{i:02d}.txt", text(draw, 1000 + i))
    job.write("later/copy.txt", (job.docs / "guide/07.txt").read_text())


def test_new_documents_leave_old_parts_vocabulary_and_shards_as_they_are(job: Job) -> None:
    before = job.run()
    grow(job)
    after = job.run()
    assert after["tokenizer"].ref == before["tokenizer"].ref
    for stage in ("ingest", "curate", "tokenize"):
        old, new = files_of(before[stage]), files_of(after[stage])
        assert {name: new[name] for name in old} == old
        assert len(new) > len(old)
    grown = {what: after["tokenize"].metrics[f"train_{what}"] for what in ("documents", "tokens")}
    assert grown["documents"] > before["tokenize"].metrics["train_documents"]
    rows = [row for batch in ledger.scan(after["tokenize"]) for row in batch.to_pylist()]
    [copy] = [row for row in rows if row["key"] == "later/copy.txt"]
    assert (copy["fate"], copy["step"]) == ("dropped", "exact")


def test_only_what_is_new_is_processed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {name for stage in job.run().values() for name in files_of(stage)}
    worked: list[tuple[str, str]] = []
    for task in (ingest._Reader, clean.Cleaner, shards._Tokenizer):
        whole = task.__call__

        def spied(self: object, row: dict, whole: object = whole, kind: str = task.__name__) -> object:
            worked.append((kind, row.get("_part", "unit")))
            return whole(self, row)

        monkeypatch.setattr(task, "__call__", spied)
    grow(job)
    job.run()
    assert [kind for kind, part in worked if part == "unit"] == ["_Reader"]
    assert not {part for _, part in worked} & old
    worked.clear()
    job.run()
    assert worked == []


def test_a_new_vocabulary_is_trained_when_asked_for(job: Job) -> None:
    before = job.run()
    grow(job)
    job.settings["tokenizer"]["keep"] = False
    after = job.run()
    assert after["tokenizer"].ref != before["tokenizer"].ref
    assert after["tokenizer"].manifest.inputs["curate"] == after["curate"].manifest.fingerprint


def test_a_changed_document_is_made_anew_and_the_other_units_stay(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge_ray.data import layout

    monkeypatch.setattr(layout, "UNIT_FILES", 8)
    before = job.run()
    job.write("guide/39.txt", "Quite another text. " * 20)
    after = job.run()
    kept = set(files_of(before["curate"]).values()) & set(files_of(after["curate"]).values())
    assert len(kept) > len(files_of(before["curate"])) / 2
    assert job.text_of("guide/39.txt").startswith("Quite another text.")
