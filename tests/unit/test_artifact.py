"""Publishing, resolving, verifying, materialising and collecting, on a folder and on an object store."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from forge_ray import garbage
from forge_ray.artifact import Artifact, FileEntry, Manifest, Workspace, digest_bytes, fingerprint
from forge_ray.errors import ArtifactError, CorruptError, DiskFullError, NotFoundError

FILES = {"weights.bin": b"weights " * 1000, "sub/config.json": b'{"a": 1}', "empty": b""}
A, B, C = "aaaa000000000000", "aaaa111111111111", "bbbb000000000000"
HOUR_LATER = lambda: time.time() + 3700


@pytest.fixture
def workspace(store_uri: str) -> Workspace:
    return Workspace(store_uri)


@pytest.fixture
def local(tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path / "workspace"))


def _publish(workspace: Workspace, name: str = A, files: dict[str, bytes] | None = None, **more: Any) -> Artifact:
    entries = tuple(workspace.put_bytes(file, data) for file, data in (FILES if files is None else files).items())
    return workspace.publish(Manifest(stage="ingest", fingerprint=name, files=entries, **more))


def _blob(entry: FileEntry) -> str:
    return f"blobs/{entry.sha256[:2]}/{entry.sha256}"


def _flip(workspace: Workspace, name: str) -> None:
    """Changes one bit in the middle of what is stored, as a bad disk or cable does."""
    data = bytearray(workspace.storage.read_bytes(name))
    data[len(data) // 2] ^= 1
    workspace.storage.write(name, bytes(data))


# --------------------------------------------------------------------------------------------------------- publishing


def test_what_is_published_is_read_back_by_another_process(workspace: Workspace) -> None:
    made = _publish(workspace, metrics={"documents": 3, "share": 0.1}, inputs={"x": C}, config={"name": "ä"})
    workspace.set_ref("legal/production", made.ref)
    other = pickle.loads(pickle.dumps(workspace))
    for ref in (made.ref, A, "aaaa", "ingest", "ingest/aaaa", "latest/ingest", "legal/production"):
        found = other.resolve(ref)
        assert found.manifest == made.manifest
    assert {name: found.read_bytes(name) for name in found.names()} == FILES
    assert found.read_json("sub/config.json") == {"a": 1}
    assert found.names(".json") == ["sub/config.json"]
    assert other.has(made.ref)
    assert not other.has(f"ingest/{B}")


def test_numbers_as_keys_of_metrics_do_not_make_the_manifest_look_damaged(local: Workspace) -> None:
    _publish(local, metrics={"loss_by_step": {9: 1.0, 10: 0.5}})
    assert local.get(f"ingest/{A}").metrics["loss_by_step"] == {"9": 1.0, "10": 0.5}


def test_publishing_twice_returns_the_first(workspace: Workspace) -> None:
    first = _publish(workspace, metrics={"try": 1})
    again = _publish(workspace, files={"other": b"2"}, metrics={"try": 2})
    assert again.manifest == first.manifest
    assert workspace.get(first.ref).metrics == {"try": 1}


def test_the_stage_name_means_the_latest(workspace: Workspace) -> None:
    for name in (C, A, B):
        _publish(workspace, name)
    assert workspace.resolve("ingest").ref == f"ingest/{B}"


def test_equal_bytes_are_stored_once(workspace: Workspace) -> None:
    _publish(workspace, A)
    _publish(workspace, B, files={**FILES, "renamed": FILES["weights.bin"]})
    assert len(workspace.storage.list("blobs")) == len(FILES)


def test_an_error_while_a_file_is_built_publishes_nothing(workspace: Workspace) -> None:
    with pytest.raises(ZeroDivisionError), workspace.new_file("half") as build:
        build.stream.write(b"%d" % (1 // 0))
    assert workspace.storage.list("") == []


def test_a_ref_is_written_only_when_it_moves(local: Workspace) -> None:
    made = _publish(local)
    path = local.storage.local_path("refs/latest/ingest")
    os.utime(path, (1, 1))
    local.set_latest(made)
    assert path.stat().st_mtime == 1
    _publish(local, B)
    assert path.read_text() == f"ingest/{B}"
    _publish(local, A)  # published already: it is the latest all the same
    assert path.read_text() == f"ingest/{A}"


# ---------------------------------------------------------------------------------------------------------- resolving


def test_a_prefix_that_fits_two_is_refused_with_both(workspace: Workspace) -> None:
    for name in (A, B, C):
        _publish(workspace, name)
    with pytest.raises(ArtifactError) as caught:
        workspace.resolve("aaaa")
    assert not isinstance(caught.value, NotFoundError)
    assert caught.value.wanted == f"ingest/{A}, ingest/{B}"
    assert workspace.resolve("aaaa1").ref == f"ingest/{B}"


ABSENT = ["cccc", "pretrain", f"ingest/{C}", "legal", "latest", "../refs/latest/ingest", "/etc/passwd", "a.json"]


@pytest.mark.parametrize("ref", ABSENT)
def test_nothing_found_lists_what_there_is(workspace: Workspace, ref: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        workspace.resolve(ref)
    assert "nothing is published" in caught.value.wanted
    made = _publish(workspace)
    workspace.set_ref("legal/production", made.ref)
    with pytest.raises(NotFoundError) as caught:
        workspace.resolve(ref)
    assert caught.value.got.startswith(ref)
    assert made.ref in caught.value.wanted


def test_a_file_that_the_artifact_does_not_have_is_refused_with_those_it_has(local: Workspace) -> None:
    with pytest.raises(NotFoundError) as caught:
        _publish(local).read_bytes("weights")
    assert "weights.bin" in caught.value.wanted


# ---------------------------------------------------------------------------------------------------------- verifying


def _damage(made: Artifact, how: str) -> str:
    storage, blob = made.workspace.storage, _blob(made.entry("weights.bin"))
    if how == "flip":
        _flip(made.workspace, blob)
    elif how == "cut":
        storage.write(blob, FILES["weights.bin"][:-1])
    else:
        storage.delete(blob)
    return blob


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_damaged_bytes_are_refused_naming_file_and_artifact(workspace: Workspace, how: str) -> None:
    made = _publish(workspace)
    blob = _damage(made, how)
    with pytest.raises(CorruptError) as caught:
        made.read_bytes("weights.bin")
    assert f"{made.ref}:weights.bin" in caught.value.got
    assert blob in caught.value.got
    assert f"artifacts/{made.ref}.json" in caught.value.do
    assert made.read_bytes("sub/config.json") == FILES["sub/config.json"]


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_bytes_damaged_after_they_were_read_once_are_refused_too(local: Workspace, how: str) -> None:
    made = _publish(local)
    assert made.read_bytes("weights.bin") == FILES["weights.bin"]
    _damage(made, how)
    with pytest.raises(CorruptError):
        made.read_bytes("weights.bin")


def test_a_byte_changed_in_place_is_found_though_size_and_mtime_are_as_before(local: Workspace) -> None:
    # What is not covered: a change below the file system (no new ctime) after this process has checked the file.
    made = _publish(local)
    path = made.local_path("weights.bin")
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as stream:
        stream.write(b"W")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(CorruptError):
        made.local_path("weights.bin")


def test_a_file_is_digested_once_while_it_stays_as_it_is(local: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _publish(local)
    made.read_bytes("weights.bin")
    monkeypatch.setattr("forge_ray.artifact.digest_file", lambda path: pytest.fail(f"{path} is read again"))
    assert made.read_bytes("weights.bin") == FILES["weights.bin"]


def test_storing_the_right_bytes_again_heals_a_damaged_blob(local: Workspace) -> None:
    made = _publish(local)
    _flip(local, _blob(made.entry("weights.bin")))
    with pytest.raises(CorruptError):
        made.read_bytes("weights.bin")
    assert local.put_bytes("weights.bin", FILES["weights.bin"]) == made.entry("weights.bin")
    assert made.read_bytes("weights.bin") == FILES["weights.bin"]


@pytest.mark.parametrize("store_uri", ["object store"], indirect=True)
def test_a_damaged_copy_in_the_machines_cache_is_fetched_again(workspace: Workspace) -> None:
    made = _publish(workspace)
    made.local_path("weights.bin").write_bytes(b"damaged")
    assert made.read_bytes("weights.bin") == FILES["weights.bin"]


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_a_manifest_is_refused(workspace: Workspace, place: float) -> None:
    made = _publish(workspace, metrics={"bits_per_byte": 1.25})
    name = f"artifacts/{made.ref}.json"
    data = bytearray(workspace.storage.read_bytes(name))
    data[int(len(data) * place)] ^= 1
    workspace.storage.write(name, bytes(data))
    with pytest.raises(CorruptError, match="manifest") as caught:
        workspace.resolve("ingest")
    assert name in caught.value.got


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'{"sha256": 1}', b"\xff"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError, match="the place"):
        Manifest.from_json(data, "the place")


def _signed(**changes: Any) -> bytes:
    """A manifest whose digest is right, as someone who means ill can make it."""
    body = json.loads(Manifest(stage="ingest", fingerprint=A, files=()).to_json())
    del body["sha256"]
    body.update(changes)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**body, "sha256": digest_bytes(canonical)}).encode()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "", ".", "a/../../x", "a//b", "./a", "a/", "a\0b"])
def test_a_manifest_whose_file_would_lie_outside_its_folder_is_refused(local: Workspace, name: str) -> None:
    rows = [{"name": name, "sha256": "0" * 64, "size_bytes": 0}]
    local.storage.write(f"artifacts/ingest/{A}.json", _signed(files=rows))
    with pytest.raises(CorruptError, match="no name of a file"):
        local.get(f"ingest/{A}")


@pytest.mark.parametrize("digest", ["", "00", "../" * 20 + "etc/passwd", "0" * 64 + "\n", "A" * 64])
def test_a_manifest_with_a_digest_that_is_none_is_refused(digest: str) -> None:
    with pytest.raises(CorruptError, match="no SHA-256"):
        Manifest.from_json(_signed(files=[{"name": "one", "sha256": digest, "size_bytes": 0}]), "the place")


def test_a_manifest_of_a_newer_format_asks_for_an_upgrade_and_is_not_called_damaged() -> None:
    with pytest.raises(ArtifactError, match="newer") as caught:
        Manifest.from_json(_signed(format_version=2, files={"unlike": "ours"}, more=1), "the place")
    assert not isinstance(caught.value, CorruptError)
    assert "delete" not in str(caught.value)


def test_a_manifest_of_another_artifact_is_refused(workspace: Workspace) -> None:
    made = _publish(workspace)
    workspace.storage.write(f"artifacts/ingest/{B}.json", made.manifest.to_json())
    with pytest.raises(CorruptError, match="another artifact") as caught:
        workspace.get(f"ingest/{B}")
    assert (caught.value.wanted, made.ref in caught.value.got) == (f"ingest/{B}", True)


def test_a_damaged_checkpoint_names_a_file_that_there_is(local: Workspace) -> None:
    entry = local.put_bytes("model", b"weights")
    growing = Manifest(stage="checkpoint", fingerprint="run@5", files=(entry,))
    local.storage.create("runs/run/checkpoints/00000005.json", growing.to_json())
    _flip(local, _blob(entry))
    with pytest.raises(CorruptError) as caught:
        Artifact(local, growing).local_path("model")
    assert "older checkpoint" in caught.value.do
    assert "runs/run/checkpoints/00000005.json" in caught.value.do


# ------------------------------------------------------------------------------------------------------ materialising


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_with_all_files_and_is_kept_while_it_is_whole(workspace: Workspace, tmp_path: Path) -> None:
    made = _publish(workspace)
    folder = made.materialize(tmp_path / "out" / "model")
    assert _content(folder) == FILES
    inode = folder.stat().st_ino
    assert made.materialize(folder).stat().st_ino == inode


@pytest.mark.parametrize("tamper", ["change", "remove", "add"])
def test_a_folder_that_was_tampered_with_is_made_anew(local: Workspace, tmp_path: Path, tamper: str) -> None:
    made = _publish(local)
    folder = made.materialize(tmp_path / "model")
    if tamper == "change":
        (folder / "sub/config.json").write_bytes(b'{"a": 2}')
    elif tamper == "remove":
        (folder / "empty").unlink()
    else:
        (folder / "extra.safetensors").write_bytes(b"not ours")
    assert _content(made.materialize(folder)) == FILES


def test_a_damaged_artifact_gives_no_folder_and_leaves_no_remains(local: Workspace, tmp_path: Path) -> None:
    made = _publish(local)
    _flip(local, _blob(made.entry("sub/config.json")))
    with pytest.raises(CorruptError):
        made.materialize(tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_too_small_for_the_folder_gives_no_folder(local: Workspace, small_disk: Path) -> None:
    made = _publish(local, files={"one": bytes(200_000), "two": bytes(200_001)})
    with pytest.raises(DiskFullError):
        made.materialize(small_disk / "model")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_blob_and_what_was_there_before_is_whole(small_disk: Path) -> None:
    workspace = Workspace(str(small_disk))
    made = _publish(workspace)
    before = workspace.storage.list("")
    with pytest.raises(DiskFullError), workspace.new_file("big") as build:
        build.stream.write(bytes(1_000_000))
    assert workspace.storage.list("") == before
    assert workspace.storage.temporaries() == []
    assert made.read_bytes("weights.bin") == FILES["weights.bin"]


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_changes_with_each_of_its_parts() -> None:
    base: dict[str, Any] = {"stage": "s", "version": 1, "config": {"a": [1, 2]}, "inputs": {"x": A}, "frozen": {"f": 1}}
    others: list[dict[str, Any]] = [
        {"stage": "t"},
        {"version": 2},
        {"config": {"a": [2, 1]}},
        {"config": {}},
        {"inputs": {"x": B}},
        {"inputs": {"y": A}},
        {"inputs": {}},
        {"frozen": {"f": 2}},
        {"inputs": {"f": 1}, "frozen": {"x": A}},
    ]
    names = [fingerprint(**{**base, **other}) for other in [{}, *others]]
    assert len(set(names)) == len(names)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    one = fingerprint("s", 1, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": A, "y": B}, {})
    assert fingerprint("s", 1, {"b": {"d": 3, "c": 2}, "a": 1}, {"y": B, "x": A}, {}) == one


# ------------------------------------------------------------------------------------------------------------- garbage


def test_only_blobs_that_nothing_refers_to_are_garbage(workspace: Workspace) -> None:
    made = _publish(workspace)
    checkpoint = workspace.put_bytes("model.safetensors", b"of a run that is still going on")
    growing = Manifest(stage="checkpoint", fingerprint="run@5", files=(checkpoint,))
    workspace.storage.create("runs/run/checkpoints/00000005.json", growing.to_json())
    workspace.storage.write("runs/run/events/1.jsonl", b"{}\n")
    unused = workspace.put_bytes("unused", b"of nobody")
    found = garbage.find(workspace, now=HOUR_LATER)
    assert found == [(_blob(unused), len(b"of nobody"))]
    garbage.delete(workspace, found)
    assert garbage.find(workspace, now=HOUR_LATER) == []
    assert {name: made.read_bytes(name) for name in made.names()} == FILES
    assert Artifact(workspace, growing).read_bytes("model.safetensors") == b"of a run that is still going on"


def test_what_is_younger_than_the_grace_stays(workspace: Workspace) -> None:
    workspace.put_bytes("unused", b"of nobody")
    assert garbage.find(workspace) == []
    assert len(garbage.find(workspace, grace_s=-60.0)) == 1


def test_an_old_blob_that_a_running_stage_stored_again_has_the_grace_of_a_new_one(local: Workspace) -> None:
    entry = local.put_bytes("shard", b"left by a run that was killed yesterday")
    os.utime(local.storage.local_path(_blob(entry)), (1, 1))
    assert len(garbage.find(local)) == 1
    local.put_bytes("shard", b"left by a run that was killed yesterday")
    assert garbage.find(local) == []


def _age(workspace: Workspace, name: str, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(workspace.storage.local_path(name), (then, then))


def test_what_a_running_stage_stored_stays_however_old(workspace: Workspace) -> None:
    with workspace.active("ingest", A):
        entry = workspace.put_bytes("part", b"of a stage that takes hours")
        assert garbage.find(workspace, now=HOUR_LATER) == []
    assert [name for name, _ in garbage.find(workspace, now=HOUR_LATER)] == [_blob(entry)]


def test_a_marker_spares_only_what_is_not_older_than_its_run_and_only_for_seven_days(local: Workspace) -> None:
    hour, day = 3600.0, 86400.0
    old, new = local.put_bytes("old", b"before the run"), local.put_bytes("new", b"of the run")
    local.storage.write(f"runs/{A}/active", b"{}")
    for entry, age_s in ((old, 9 * hour), (new, 5 * hour)):
        _age(local, _blob(entry), age_s)
    _age(local, f"runs/{A}/active", 6 * hour)
    assert [name for name, _ in garbage.find(local)] == [_blob(old)]
    assert len(garbage.find(local, now=lambda: time.time() + 7 * day)) == 2


def test_a_stage_that_fails_takes_its_marker_along_and_a_killed_one_is_finished_by_the_next(local: Workspace) -> None:
    marker = local.storage.local_path(f"runs/{A}/active")
    with local.active("ingest", A):
        assert json.loads(marker.read_text()).keys() == {"stage", "host", "created"}
    with pytest.raises(ZeroDivisionError), local.active("ingest", A):
        _ = 1 // 0
    assert not marker.exists()
    local.storage.write(f"runs/{A}/active", b"of a killed run")
    with pytest.raises(ZeroDivisionError), local.active("ingest", A):
        _ = 1 // 0
    assert marker.read_bytes() == b"of a killed run"
    with local.active("ingest", A):
        pass
    assert not marker.exists()


def test_remains_of_killed_writers_are_garbage_after_the_grace(local: Workspace) -> None:
    _publish(local)
    remains = local.storage.local / "blobs" / ".tmp-killed"
    remains.write_bytes(b"half")
    assert garbage.find(local) == []
    assert garbage.find(local, now=HOUR_LATER) == [("blobs/.tmp-killed", 4)]
    garbage.delete(local, garbage.find(local, now=HOUR_LATER))
    assert not remains.exists()


@pytest.mark.parametrize("name", [f"artifacts/ingest/{A}.json", "runs/run/checkpoints/00000005.json"])
def test_nothing_is_garbage_while_a_manifest_is_damaged(workspace: Workspace, name: str) -> None:
    entry = workspace.put_bytes("one", b"1")
    workspace.storage.create(name, Manifest(stage="ingest", fingerprint=A, files=(entry,)).to_json())
    _flip(workspace, name)
    with pytest.raises(CorruptError) as caught:
        garbage.find(workspace, now=HOUR_LATER)
    assert name in caught.value.got


def test_a_manifest_of_the_first_format_is_still_read() -> None:
    """Written by forge-ray 0.1.0; workspaces outlive releases."""
    body = (
        '{"config":{},"created":"","files":[{"name":"one","sha256":"'
        + "0" * 64
        + '","size_bytes":1}],"fingerprint":"f",'
        '"format_version":1,"frozen":{},"inputs":{},"made_by":{},"metrics":{"x":1.5},"stage":"s","wall_s":0.0}'
    )
    stored = body[:-1] + f',"sha256":"{digest_bytes(body.encode())}"}}'
    read = Manifest.from_json(stored.encode(), "the place")
    assert (read.ref, read.files, read.metrics) == ("s/f", (FileEntry("one", "0" * 64, 1),), {"x": 1.5})
