"""Memories of work: found again by what went in, and worth nothing without their blobs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from forge_ray import garbage
from forge_ray.artifact import FileEntry, Manifest, Workspace
from forge_ray.memo import Memo


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path / "w"))


def memo(workspace: Workspace, **changed: Any) -> Memo:
    return Memo(**{"workspace": workspace, "stage": "clean", "version": 1, "config": {"a": 1}, **changed})


def row_of(entry: FileEntry, name: str = "part") -> dict[str, Any]:
    return {"_part": name, "split": "train", "entry": entry}


def test_what_was_put_comes_back_with_its_files(workspace: Workspace) -> None:
    entry = workspace.put_bytes("made", b"result")
    rows = [{"clean": entry, "nested": {"deep": [entry, None]}, "documents": 3}]
    memo(workspace).put({"x": 1}, rows)
    assert memo(workspace).get({"x": 1}) == rows


@pytest.mark.parametrize("changed", [{"version": 2}, {"config": {"a": 2}}, {"stage": "apply"}])
def test_another_version_configuration_or_stage_is_other_work(workspace: Workspace, changed: dict[str, Any]) -> None:
    memo(workspace).put({"x": 1}, [{}])
    assert memo(workspace, **changed).get({"x": 1}) is None


def test_a_file_counts_by_its_content_and_a_name_for_messages_not_at_all(workspace: Workspace) -> None:
    one, other = workspace.put_bytes("one", b"same"), workspace.put_bytes("other", b"different")
    memo(workspace).put(row_of(one), [{"found": True}])
    assert memo(workspace).get(row_of(FileEntry("renamed", one.sha256, one.size_bytes), "moved")) == [{"found": True}]
    assert memo(workspace).get(row_of(other)) is None


def test_a_memory_whose_blob_is_gone_or_torn_does_not_count(workspace: Workspace) -> None:
    entry = workspace.put_bytes("made", b"result")
    memo(workspace).put({"x": 1}, [{"clean": entry}])
    path = workspace.verified(entry, "made")
    path.chmod(0o644)
    path.write_bytes(b"resul")
    assert memo(workspace).get({"x": 1}) is None
    path.unlink()
    assert memo(workspace).get({"x": 1}) is None


def test_a_damaged_record_does_not_count(workspace: Workspace) -> None:
    memo(workspace).put({"x": 1}, [{"documents": 3}])
    [name] = workspace.storage.list("memo")
    record = json.loads(workspace.storage.read_bytes(name))
    record["rows"][0]["documents"] = 4
    workspace.storage.write(name, json.dumps(record).encode())
    assert memo(workspace).get({"x": 1}) is None
    workspace.storage.write(name, b"{")
    assert memo(workspace).get({"x": 1}) is None


def test_gc_takes_a_memory_with_its_last_blob_and_not_before(workspace: Workspace) -> None:
    used, unused = workspace.put_bytes("used", b"a manifest names it"), workspace.put_bytes("unused", b"none does")
    workspace.publish(Manifest(stage="curate", fingerprint="0" * 16, files=(used,)))
    memo(workspace).put({"x": 1}, [{"clean": used}])
    memo(workspace).put({"x": 2}, [{"clean": used, "work": unused}])
    assert garbage.find(workspace) == []
    found = garbage.find(workspace, grace_s=-10)
    assert {name.partition("/")[0] for name, _ in found} == {"blobs", "memo"}
    garbage.delete(workspace, found)
    assert memo(workspace).get({"x": 1}) == [{"clean": used}]
    assert len(workspace.storage.list("memo")) == 1


def test_gc_leaves_what_a_running_stage_may_remember_from_one_that_failed(workspace: Workspace) -> None:
    """It reads the memory when it comes to that piece, maybe hours after another process looked for garbage."""
    old, forgotten = workspace.put_bytes("part", b"of a run that failed"), workspace.put_bytes("spill", b"of that run")
    memo(workspace).put({"x": 1}, [{"clean": old}])
    later = time.time() + 7200
    with workspace.active("curate", "0" * 16):
        os.utime(workspace.storage.local_path(f"runs/{'0' * 16}/active"), (later - 60, later - 60))
        assert [name.rpartition("/")[2] for name, _ in garbage.find(workspace, now=lambda: later)] == [forgotten.sha256]
    assert len(garbage.find(workspace, now=lambda: later)) == 3
