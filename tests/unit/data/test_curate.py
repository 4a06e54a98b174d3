"""Curation in one process: steps, fates, and old parts that stay as they are when documents are added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from forge_ray.artifact import Artifact, FileEntry, Manifest, Workspace
from forge_ray.config import CurateConfig, IngestConfig
from forge_ray.data import curate, ingest, layout
from forge_ray.errors import DataError

pytestmark = pytest.mark.usefixtures("plain_loop")

MAIL = "Please write to jane.roe@example.org if the build of the northern branch fails again on a Monday."
Build = Callable[..., tuple[list[FileEntry], dict[str, Any]]]


def sentence(i: int) -> str:
    """Text that no other has a line of."""
    return "\n".join(
        f"Report {i}, line {j}: the {i * 7 + j}th unit of plant {i} worked as it should." for j in range(5)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(60):
        (tmp_path / f"{i:03d}.txt").write_text(sentence(i))
    return tmp_path


@pytest.fixture
def build(workspace: Workspace, folder: Path) -> Build:
    """Ingests the folder and curates it, as a run would."""

    def make(**steps: Any) -> tuple[list[FileEntry], dict[str, Any]]:
        config = IngestConfig(sources=[{"kind": "files", "uri": str(folder)}], held_out_frac=0.2)
        files, metrics = ingest.run(config, workspace)
        digest = layout.digest(layout.plan(config, workspace))[:16]
        documents = workspace.publish(Manifest("ingest", digest, tuple(files), metrics=metrics))
        workspace.set_ref(layout.lineage(config), documents.ref)
        return curate.run(CurateConfig.model_validate(steps), documents, workspace)

    return make


def rows(workspace: Workspace, files: list[FileEntry], prefix: str) -> list[dict[str, Any]]:
    parts = [entry for entry in files if entry.name.startswith(prefix)]
    return [row for entry in parts for row in pq.read_table(workspace.verified(entry, entry.name)).to_pylist()]


def ledger_of(workspace: Workspace, files: list[FileEntry]) -> dict[str, dict[str, Any]]:
    return {row["key"] or row["source"]: row for row in rows(workspace, files, "ledger-")}


def kept(workspace: Workspace, files: list[FileEntry]) -> dict[str, str]:
    return {row["key"]: row["text"] for split in ("train-", "heldout-") for row in rows(workspace, files, split)}


def test_without_a_step_every_document_stays_and_is_on_record(workspace: Workspace, build: Build) -> None:
    files, metrics = build()
    assert kept(workspace, files) == {f"{i:03d}.txt": sentence(i) for i in range(60)}
    fates = ledger_of(workspace, files)
    assert len(fates) == 60
    assert {row["fate"] for row in fates.values()} == {"kept"}
    assert metrics["steps"] == []
    assert metrics["train_documents"] + metrics["heldout_documents"] == 60


def test_a_skipped_file_is_in_the_ledger_too(workspace: Workspace, build: Build, folder: Path) -> None:
    (folder / "short.txt").write_text("too short")
    fates = ledger_of(workspace, build()[0])
    row = fates[str(folder / "short.txt")]
    assert (row["fate"], row["step"]) == ("skipped", "ingest")
    assert "min_document_chars" in row["reason"]


def test_private_data_is_replaced_and_counted(workspace: Workspace, build: Build, folder: Path) -> None:
    (folder / "mail.txt").write_text(MAIL)
    files, metrics = build(privacy={"enabled": True})
    assert "jane.roe" not in kept(workspace, files)["mail.txt"]
    assert dict(ledger_of(workspace, files)["mail.txt"]["found"]) == {"email": 1}
    assert metrics["found"] == {"email": 1}
    for name in ("clean/", "train-", "heldout-"):
        assert all("jane.roe" not in row["text"] for row in rows(workspace, files, name))


def test_a_document_that_may_hold_no_private_data_is_dropped(workspace: Workspace, build: Build, folder: Path) -> None:
    (folder / "mail.txt").write_text(MAIL)
    files, metrics = build(privacy={"enabled": True, "email": "drop"})
    assert "mail.txt" not in kept(workspace, files)
    row = ledger_of(workspace, files)["mail.txt"]
    assert (row["fate"], row["step"], row["reason"]) == ("dropped", "privacy", "holds_email")
    assert metrics["dropped"] == {"privacy": {"holds_email": 1}}


def test_duplicates_name_the_document_that_stays(workspace: Workspace, build: Build, folder: Path) -> None:
    (folder / "900.txt").write_text(sentence(3))
    files, _ = build(exact={"enabled": True}, near={"enabled": True})
    fates = ledger_of(workspace, files)
    # The first stays, and a held-out document counts as before the others.
    gone = [row for row in fates.values() if row["fate"] == "dropped"]
    assert [row["step"] for row in gone] == ["exact"]
    stays = fates["003.txt"] if gone[0]["key"] == "900.txt" else fates["900.txt"]
    assert gone[0]["duplicate_of"] == stays["id"]
    assert len(kept(workspace, files)) == 60


def test_a_repeated_line_stays_once_and_what_is_left_must_be_long_enough(
    workspace: Workspace, build: Build, folder: Path
) -> None:
    line = "This document is confidential and belongs to the plant of the company that wrote it."
    for i in range(60):
        (folder / f"{i:03d}.txt").write_text(f"{line}\n{sentence(i)}")
    (folder / "999.txt").write_text(line)
    files, metrics = build(lines={"enabled": True})
    found = kept(workspace, files)
    per_split = [sum(line in row["text"] for row in rows(workspace, files, split)) for split in ("train-", "heldout-")]
    assert per_split == [1, 1]
    assert metrics["lines_removed"] == 61 - 2 - 1
    assert "999.txt" not in found
    assert ledger_of(workspace, files)["999.txt"]["step"] == "lines"


def test_old_parts_stay_byte_for_byte_when_documents_are_added(
    workspace: Workspace, build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {name: {"enabled": True} for name in ("normalize", "privacy", "exact", "near", "lines", "decontaminate")}
    before = {entry.name: entry.sha256 for entry in build(**steps)[0]}
    # Bridges and repeats of old documents, and new ones.
    for i in range(30):
        (folder / f"{i:03d}-again.txt").write_text(sentence(i))
        (folder / f"{500 + i}.txt").write_text(sentence(500 + i) + "\n" + sentence(i))
    read: list[str] = []
    whole = curate.clean.Cleaner.__call__
    monkeypatch.setattr(curate.clean.Cleaner, "__call__", lambda s, row: read.append(row["_part"]) or whole(s, row))
    after = {entry.name: entry.sha256 for entry in build(**steps)[0]}
    same = [name for name in before if name not in ("parts.json", "layout.parquet")]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert read
    assert not set(read) & set(before)


def test_the_same_documents_give_the_same_bytes_in_another_workspace(
    build: Build, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps = {name: {"enabled": True} for name in ("normalize", "exact", "near", "lines")}
    one = build(**steps)[0]
    other = Workspace(str(tmp_path_factory.mktemp("other")))
    config = IngestConfig(sources=[{"kind": "files", "uri": str(folder)}], held_out_frac=0.2)
    files, _ = ingest.run(config, other)
    documents = other.publish(Manifest("ingest", "0" * 16, tuple(files)))
    assert curate.run(CurateConfig.model_validate(steps), documents, other)[0] == one


def test_an_empty_result_says_which_step_dropped_what(workspace: Workspace, build: Build) -> None:
    with pytest.raises(DataError, match="licence_not_allowed") as caught:
        build(licences={"allow": ["MIT"]})
    assert "60 licences: licence_not_allowed" in str(caught.value) or "licences" in str(caught.value)


def test_a_flipped_byte_in_a_part_is_refused(workspace: Workspace, publish: Callable[..., Artifact], rows: Any) -> None:
    documents = publish({"train-00000.parquet": rows(20), "heldout-00000.parquet": rows(5, seed=1)})
    path = workspace.verified(documents.entry("train-00000.parquet"), "x")
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="do not match"):
        curate.run(CurateConfig(), documents, Workspace(workspace.uri))


def test_a_step_switched_on_later_gives_what_it_would_have_given_at_first(
    workspace: Workspace, build: Build, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    build()
    later = build(decontaminate={"enabled": True})[0]
    other = Workspace(str(tmp_path_factory.mktemp("other")))
    config = IngestConfig(sources=[{"kind": "files", "uri": str(folder)}], held_out_frac=0.2)
    documents = other.publish(Manifest("ingest", "0" * 16, tuple(ingest.run(config, other)[0])))
    assert curate.run(CurateConfig.model_validate({"decontaminate": {"enabled": True}}), documents, other)[0] == later


def test_an_evaluation_set_that_changes_while_it_is_read_is_named(
    workspace: Workspace, publish: Callable[..., Artifact], rows: Any, tmp_path: Path
) -> None:
    documents = publish({"train-00000.parquet": rows(20), "heldout-00000.parquet": rows(5, seed=1)})
    (tmp_path / "exam.txt").write_text(sentence(1))
    config = CurateConfig.model_validate({"decontaminate": {"enabled": True, "uris": [str(tmp_path / "exam.txt")]}})
    frozen = curate.observe(config)
    assert curate.run(config, documents, workspace, frozen=frozen)[0]
    (tmp_path / "exam.txt").write_text(sentence(2) + "more")
    with pytest.raises(DataError, match=r"exam\.txt"):
        curate.run(config, documents, workspace, frozen=frozen)


def test_another_model_of_names_under_the_same_path_is_another_state(tmp_path: Path) -> None:
    config = CurateConfig.model_validate({"privacy": {"enabled": True, "name_model": str(tmp_path)}})
    states = [curate.observe(config)]
    for version in ("1.0", "1.1"):
        (tmp_path / "meta.json").write_text(f'{{"version": "{version}"}}')
        states.append(curate.observe(config))
    assert len({state["names"] for state in states}) == 3
    assert curate.observe(CurateConfig()) == {}
