"""Ingest in one process: hold-out, ids, parts, and the account of what was left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from forge_ray.artifact import FileEntry, Workspace
from forge_ray.config import IngestConfig
from forge_ray.data import ingest
from forge_ray.errors import DataError

pytestmark = pytest.mark.usefixtures("plain_loop")


def config(folder: Path, **fields: Any) -> IngestConfig:
    source = {"kind": "files", "uri": str(folder)}
    return IngestConfig(**{"sources": [source], "held_out_frac": 0.2, "min_document_chars": 5, **fields})


def rows_of(workspace: Workspace, files: list[FileEntry], split: str) -> list[dict[str, str]]:
    return [row for part in parts_of(workspace, files, split) for row in part]


def parts_of(workspace: Workspace, files: list[FileEntry], split: str) -> list[list[dict[str, str]]]:
    entries = [entry for entry in files if entry.name.startswith(split)]
    return [pq.read_table(workspace.verified(entry, entry.name)).to_pylist() for entry in entries]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 documents, each a file and so a group of its own."""
    for i in range(200):
        (tmp_path / f"{i:03d}.txt").write_text(f"document {i} " + "word " * (i % 7))
    return tmp_path


def test_the_held_out_share_is_near_the_configured_one_and_grows_with_it(folder: Path) -> None:
    groups = [f"group-{i}" for i in range(4000)]
    configs = [config(folder, held_out_frac=frac) for frac in (0.0, 0.05, 0.2)]
    chosen = [{group for group in groups if ingest.held_out(one, group)} for one in configs]
    assert not chosen[0]
    assert 0.04 < len(chosen[1]) / len(groups) < 0.06
    # Whoever raises the share moves groups in one direction only.
    assert chosen[1] < chosen[2]


def test_splits_share_no_group_and_together_hold_everything(folder: Path, workspace: Workspace) -> None:
    files, metrics = ingest.run(config(folder), workspace)
    train, heldout = (rows_of(workspace, files, split) for split in ("train", "heldout"))
    assert not {row["group"] for row in train} & {row["group"] for row in heldout}
    assert sorted(row["text"] for row in train + heldout) == sorted(p.read_text().strip() for p in folder.iterdir())
    assert metrics["heldout_groups"] == sorted({row["group"] for row in heldout})
    assert (metrics["train_documents"], metrics["heldout_documents"]) == (len(train), len(heldout))
    assert metrics["train_bytes"] == sum(len(row["text"].encode()) for row in train)


def test_a_group_held_out_by_name_brings_all_its_documents(workspace: Workspace) -> None:
    source = {"kind": "botocore", "services": ["sts", "sqs"]}
    files, _ = ingest.run(IngestConfig(sources=[source], held_out_frac=0.0, held_out_groups=("sts",)), workspace)
    assert {row["group"] for row in rows_of(workspace, files, "heldout")} == {"sts"}
    assert {row["group"] for row in rows_of(workspace, files, "train")} == {"sqs"}


def test_the_same_documents_give_the_same_bytes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    runs = [ingest.run(config(folder), Workspace(str(tmp_path_factory.mktemp("w")))) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_new_document_changes_neither_ids_nor_sides_of_the_others(folder: Path, workspace: Workspace) -> None:
    sides = []
    for _ in range(2):
        files, _ = ingest.run(config(folder), workspace)
        sides.append({row["id"]: split for split in ("train", "heldout") for row in rows_of(workspace, files, split)})
        (folder / "0000-new.txt").write_text("a new document that sorts first")
    assert sides[0].items() < sides[1].items()
    assert len(sides[1]) == 201


def test_the_id_tells_apart_equal_texts_and_equal_sources(folder: Path, workspace: Workspace) -> None:
    (folder / "twins.jsonl").write_text('{"text": "the same words"}\n' * 2)
    before = {row["source"]: row["id"] for row in _all(folder, workspace)}
    (folder / "000.txt").write_text("other words")
    after = {row["source"]: row["id"] for row in _all(folder, workspace)}
    assert len(set(before.values())) == 202
    assert {source for source in before if before[source] != after[source]} == {str(folder / "000.txt")}


def _all(folder: Path, workspace: Workspace) -> list[dict[str, str]]:
    files, _ = ingest.run(config(folder), workspace)
    return [row for split in ("train", "heldout") for row in rows_of(workspace, files, split)]


def test_a_part_is_closed_once_it_holds_part_bytes(folder: Path, workspace: Workspace) -> None:
    files, metrics = ingest.run(config(folder, part_bytes=400), workspace)
    parts = parts_of(workspace, files, "train")
    sizes = [[len(row["text"].encode()) for row in part] for part in parts]
    assert len(parts) > 5
    assert all(sum(part) >= 400 for part in sizes[:-1])
    assert all(sum(part[:-1]) < 400 for part in sizes)
    assert len({row["id"] for part in parts for row in part}) == metrics["train_documents"]
    names = [entry.name for entry in files if entry.name.startswith("train")]
    assert names == [f"train-{i:05d}.parquet" for i in range(len(parts))]


def test_what_is_left_out_is_counted_and_listed(folder: Path, workspace: Workspace) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("  abc ")
    (folder / "long.jsonl").write_text(json.dumps({"text": "x" * 3000}))
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    files, metrics = ingest.run(config(folder, max_document_bytes=2000), workspace)
    assert metrics["skipped"] == {
        "shorter than min_document_chars": 2,
        "larger than max_document_bytes": 1,
        "not UTF-8": 1,
    }
    [listed] = parts_of(workspace, files, "ledger-skipped")
    names = {Path(row["source"].partition("#")[0]).name for row in listed}
    assert names == {"empty.txt", "short.txt", "long.jsonl", "latin.txt"}
    assert any((row["reason"], row["detail"]) == ("not UTF-8", "byte 3") for row in listed)
    assert {row["fate"] for row in listed} == {"skipped"}
    assert metrics["train_documents"] + metrics["heldout_documents"] == 200


def test_nothing_to_train_on_is_an_error_that_says_why(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match="nothing is left to train on") as caught:
        ingest.run(config(tmp_path), workspace)
    assert str(tmp_path) in str(caught.value)
    assert "shorter than min_document_chars: 3 characters" in str(caught.value)


def test_nothing_held_out_is_an_error(folder: Path, workspace: Workspace) -> None:
    with pytest.raises(DataError, match="no document is held out"):
        ingest.run(config(folder, held_out_frac=0.0), workspace)


def test_a_corpus_that_moves_keeps_ids_and_sides(folder: Path, workspace: Workspace, tmp_path: Path) -> None:
    (folder / "records.jsonl").write_text('{"text": "some words"}\n{"text": "other words"}\n')
    moved = shutil.copytree(folder, tmp_path.parent / f"{tmp_path.name}-moved" / "deeper")
    sides, sources = [], []
    for place in (folder, moved):
        files, _ = ingest.run(config(place), workspace)
        rows = {split: rows_of(workspace, files, split) for split in ("train", "heldout")}
        sides.append({row["id"]: (split, row["group"]) for split in rows for row in rows[split]})
        sources.append({row["source"] for split in rows for row in rows[split]})
    assert sides[0] == sides[1]
    assert len(sides[0]) == 202
    assert sources[1] == {source.replace(str(folder), str(moved)) for source in sources[0]}


def test_a_file_is_held_out_by_its_path_below_the_source(folder: Path, workspace: Workspace) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a guide to something")
    chosen = config(folder, held_out_frac=0.0, held_out_groups=("sub/a.txt",))
    files, metrics = ingest.run(chosen, workspace)
    assert metrics["heldout_groups"] == ["sub/a.txt"]
    assert [row["source"] for row in rows_of(workspace, files, "heldout")] == [str(folder / "sub" / "a.txt")]
    with pytest.raises(DataError, match="below their source"):
        ingest.run(chosen.replace(held_out_groups=(str(folder / "000.txt"),)), workspace)


@pytest.mark.parametrize("when", ["between planning and reading", "while it is read"])
def test_a_source_that_changes_is_named(
    folder: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    chosen, plain = config(folder), ingest.map_rows
    frozen = ingest.observe(chosen, workspace)

    def map_rows(*args: Any) -> Any:
        (folder / "late.txt").write_text("written while others are read")
        return plain(*args)

    if when == "while it is read":
        monkeypatch.setattr(ingest, "map_rows", map_rows)
    else:
        (folder / "000.txt").write_text("changed since")
    with pytest.raises(DataError, match="changed while it was read") as caught:
        ingest.run(chosen, workspace, frozen=frozen)
    assert caught.value.got == str(folder)
    monkeypatch.setattr(ingest, "map_rows", plain)
    assert ingest.run(chosen, workspace, frozen=ingest.observe(chosen, workspace))


def test_too_many_unreadable_documents_are_an_error_with_counts_and_reasons(folder: Path, workspace: Workspace) -> None:
    for i in range(30):
        (folder / f"latin{i}.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "nulls.jsonl").write_text('{"text": null}\n' * 5)
    for i in range(300):
        (folder / f"short{i}.txt").write_text("abc")  # of the wrong size, not of the wrong kind
    ingest.run(config(folder), workspace)
    with pytest.raises(DataError, match="unreadable") as caught:
        ingest.run(config(folder, max_unreadable_frac=0.05), workspace)
    assert "35 of 535 documents (30 not UTF-8, 5 unreadable: the text is no string)" in caught.value.got
    assert f"{folder}/latin0.txt: not UTF-8: byte 3" in caught.value.got
    assert "max_unreadable_frac" in caught.value.do


def test_a_forgotten_document_is_left_out_and_on_record_without_its_text(folder: Path, workspace: Workspace) -> None:
    (folder / "records.jsonl").write_text('{"text": "some words"}\n{"text": "the secret words"}\n')
    chosen = config(folder)
    before = ingest.observe(chosen, workspace)
    [row] = [row for row in _all(folder, workspace) if row["text"] == "the secret words"]
    stone = {name: row[name] for name in ("id", "key", "origin", "source")}
    workspace.storage.write(f"tombstones/{row['id']}.json", json.dumps(stone).encode())
    assert ingest.observe(chosen, workspace) != before
    files, metrics = ingest.run(chosen, workspace)
    assert metrics["forgotten"] == 1
    assert metrics["train_documents"] + metrics["heldout_documents"] == 201
    [listed] = parts_of(workspace, files, "ledger-skipped")
    assert [(found["id"], found["fate"]) for found in listed] == [(row["id"], "forgotten")]
    for entry in files:
        assert b"the secret words" not in workspace.verified(entry, entry.name).read_bytes()


def test_what_was_read_is_not_read_again(folder: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = ingest.run(config(folder), workspace)
    monkeypatch.setattr(ingest._Reader, "__call__", lambda *_: pytest.fail("it was read again"))
    assert ingest.run(config(folder), workspace)[0] == files


def test_any_number_of_skipped_and_of_short_documents_is_written_in_pieces(
    folder: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.jsonl").write_text("{\n" * 25)
    monkeypatch.setattr(ingest, "_SKIPPED_ROWS", 10)
    monkeypatch.setattr(ingest, "_PART_ROWS", 50)
    files, metrics = ingest.run(config(folder, max_unreadable_frac=1.0), workspace)
    skipped = parts_of(workspace, files, "ledger-skipped")
    assert [len(part) for part in skipped] == [10, 10, 5]
    assert len({row["id"] for part in skipped for row in part}) == 25
    assert max(len(part) for part in parts_of(workspace, files, "train")) == 50
    assert metrics["train_documents"] + metrics["heldout_documents"] == 200
    assert metrics["num_heldout_groups"] == metrics["heldout_documents"]


def test_what_was_read_is_not_read_again_because_more_may_be_unreadable(
    folder: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.jsonl").write_text("{\n" * 100)
    with pytest.raises(DataError, match="unreadable"):
        ingest.run(config(folder), workspace)
    monkeypatch.setattr(ingest._Reader, "__call__", lambda *_: pytest.fail("it was read again"))
    assert ingest.run(config(folder, max_unreadable_frac=0.5), workspace)[1]["skipped"]
