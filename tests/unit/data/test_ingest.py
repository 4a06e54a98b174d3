"""Ingest in one process: hold-out, ids, parts, and the account of what was left out."""

from __future__ import annotations

import json
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
    assert metrics["skipped"] == {"shorter than 5 characters": 2, "larger than 2000 bytes": 1, "not UTF-8 at byte 3": 1}
    listed = json.loads(workspace.verified(files[-1], "skipped.json").read_bytes())
    names = {Path(row["source"].partition("#")[0]).name for row in listed}
    assert names == {"empty.txt", "short.txt", "long.jsonl", "latin.txt"}
    assert metrics["train_documents"] + metrics["heldout_documents"] == 200


def test_nothing_to_train_on_is_an_error_that_says_why(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match="nothing is left to train on") as caught:
        ingest.run(config(tmp_path), workspace)
    assert str(tmp_path) in str(caught.value)
    assert "shorter than 5 characters" in str(caught.value)


def test_nothing_held_out_is_an_error(folder: Path, workspace: Workspace) -> None:
    with pytest.raises(DataError, match="no document is held out"):
        ingest.run(config(folder, held_out_frac=0.0), workspace)
