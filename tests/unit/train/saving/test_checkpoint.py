"""Checkpoints: the newest that verifies wins, and what anyone else uses is never deleted."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.artifact import Artifact, Manifest, Workspace
from forge_ray.errors import CorruptError, StorageError
from forge_ray.storage import Storage
from forge_ray.train.saving.checkpoint import DISK, OPTIMIZER, STATE, STORE, WEIGHTS, Checkpoints, Tiers, load_tensors


def save(checkpoints: Checkpoints, step: int, keep: int = 3, value: float | None = None) -> Artifact:
    w = torch.full((4, 3), float(step if value is None else value))
    return checkpoints.save(step, {"w": w}, {"w/exp_avg": w / 10, "w/step": torch.tensor(1.0)}, {"end_token": 5}, keep)


def blob(artifact: Artifact, name: str) -> Path:
    return Path(artifact.workspace.uri) / "blobs" / artifact.entry(name).sha256[:2] / artifact.entry(name).sha256


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture
def checkpoints(workspace: Workspace) -> Checkpoints:
    return Checkpoints(workspace, "run")


def test_what_is_saved_comes_back(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    save(checkpoints, 3)
    found = Checkpoints(Workspace(checkpoints.workspace.uri), "run").newest()
    assert torch.equal(load_tensors(found, WEIGHTS)["w"], torch.full((4, 3), 3.0))
    assert set(load_tensors(found, OPTIMIZER)) == {"w/exp_avg", "w/step"}
    assert found.read_json(STATE) == {"end_token": 5, "step": 3}


def test_the_newest_is_the_one_of_the_most_steps(checkpoints: Checkpoints) -> None:
    for step in (9, 100, 20):
        save(checkpoints, step)
    assert checkpoints.steps() == [9, 20, 100]
    assert checkpoints.newest().read_json(STATE)["step"] == 100
    assert Checkpoints(checkpoints.workspace, "another").newest() is None


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "gone"])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str], name: str, harm: str
) -> None:
    save(checkpoints, 1)
    path = blob(save(checkpoints, 2), name)
    data = path.read_bytes()
    path.unlink() if harm == "gone" else overwrite(path, data[:-1] + bytes([data[-1] ^ 1]) * (harm == "flipped"))
    fresh = Checkpoints(Workspace(checkpoints.workspace.uri), "run")
    assert fresh.newest().read_json(STATE)["step"] == 1
    said = capsys.readouterr().err
    assert "checkpoint 2 is passed over, the next older one is tried" in said
    assert name in said


def test_the_last_one_before_the_rate_fell_stays(workspace: Workspace) -> None:
    checkpoints = Checkpoints(workspace, "run", pinned=5)
    for step in range(2, 10, 2):
        save(checkpoints, step, keep=2)
    assert checkpoints.steps() == [4, 6, 8]
    assert checkpoints.verified(4).read_json(STATE)["step"] == 4


def test_the_newest_that_was_compared_with_others_stays(checkpoints: Checkpoints) -> None:
    trusted = {2: 0, 4: 2, 6: 5, 8: 5, 10: 5}
    for step, trusted_step in trusted.items():
        files = [checkpoints.put_bytes(STATE, str(step).encode())]
        checkpoints.commit(step, files, 0.0, keep=2, trusted_step=trusted_step)
    assert checkpoints.steps() == [4, 8, 10]
    checkpoints.drop_after(5)  # a bit was flipped after that
    assert checkpoints.steps() == [4]


def manifest_path(checkpoints: Checkpoints, step: int) -> Path:
    return Path(checkpoints.workspace.uri) / "runs" / checkpoints.run_id / "checkpoints" / f"{step:08d}.json"


@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(checkpoints: Checkpoints, what: str) -> None:
    save(checkpoints, 1)
    lost = blob(save(checkpoints, 2), WEIGHTS)
    overwrite(manifest_path(checkpoints, 2), b"{}") if what == "manifest" else lost.unlink()
    assert checkpoints.newest().read_json(STATE)["step"] == 1
    save(checkpoints, 2, value=2.5)  # other bits: another number of workers may sum in another order
    assert torch.equal(load_tensors(checkpoints.newest(), WEIGHTS)["w"], torch.full((4, 3), 2.5))


def test_old_checkpoints_go_and_the_newest_stay_whole(checkpoints: Checkpoints) -> None:
    saved = [save(checkpoints, step, keep=2) for step in (1, 2, 3, 4)]
    assert checkpoints.steps() == [3, 4]
    assert not any(blob(old, name).exists() for old in saved[:2] for name in old.names())
    for step in (3, 4):
        found = checkpoints.get(step)
        assert all(found.local_path(name).exists() for name in found.names())


def test_release_keeps_blobs_that_the_kept_share_with_the_old(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        save(checkpoints, step, keep=1, value=7.0)  # the same weights in each
    assert checkpoints.steps() == [3]
    assert torch.equal(load_tensors(checkpoints.newest(), WEIGHTS)["w"], torch.full((4, 3), 7.0))


def test_release_keeps_blobs_of_a_published_model(checkpoints: Checkpoints) -> None:
    first = save(checkpoints, 1)
    manifest = Manifest(stage="pretrain", fingerprint="0" * 16, files=(first.entry(WEIGHTS),))
    published = checkpoints.workspace.publish(manifest)
    save(checkpoints, 2, keep=1)
    assert not blob(first, OPTIMIZER).exists()
    assert torch.equal(load_tensors(published, WEIGHTS)["w"], torch.full((4, 3), 1.0))


def test_release_keeps_blobs_of_another_run(checkpoints: Checkpoints) -> None:
    other = Checkpoints(checkpoints.workspace, "other")
    save(other, 1, value=8.0)
    save(checkpoints, 1, value=9.0)  # the state file is the same, byte for byte
    save(checkpoints, 2, keep=1)
    assert other.newest().read_json(STATE)["step"] == 1


def test_release_that_cannot_know_what_is_used_deletes_nothing(checkpoints: Checkpoints) -> None:
    other = Checkpoints(checkpoints.workspace, "other")
    save(other, 1)
    overwrite(manifest_path(other, 1), b"{}")
    old = save(checkpoints, 1)
    save(checkpoints, 2, keep=1)
    assert all(blob(old, name).exists() for name in old.names())
    assert checkpoints.steps() == [1, 2]


def test_a_manifest_moved_to_another_step_is_passed_over(checkpoints: Checkpoints) -> None:
    for step in (1, 2):
        save(checkpoints, step)
    folder = Path(checkpoints.workspace.uri) / "runs" / "run" / "checkpoints"
    (folder / "00000009.json").write_bytes((folder / "00000001.json").read_bytes())
    assert checkpoints.newest().read_json(STATE)["step"] == 2


# ------------------------------------------------------------------------------------------------------------ releasing


def age(path: Path, seconds: float = 3600.0) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_release_reads_no_manifest_that_is_older_than_what_goes(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        entry = checkpoints.workspace.put_bytes("x", b"%d" % number)
        manifest = Manifest(stage="ingest", fingerprint=f"{number:016x}", files=(entry,))
        checkpoints.workspace.publish(manifest)
        age(Path(checkpoints.workspace.uri) / f"artifacts/{manifest.ref}.json")
    old = save(checkpoints, 1, keep=1)
    read = []
    real: Callable[..., Any] = Storage.read_bytes
    monkeypatch.setattr(Storage, "read_bytes", lambda storage, name: read.append(name) or real(storage, name))
    save(checkpoints, 2, keep=1)
    assert not any(blob(old, name).exists() for name in old.names())
    assert {name.partition("/")[0] for name in read} == {"runs"}


def test_release_keeps_blobs_that_were_there_before_the_checkpoint(checkpoints: Checkpoints) -> None:
    w = torch.full((4, 3), 7.0)
    from safetensors.torch import save as as_bytes

    entry = checkpoints.workspace.put_bytes("weights", as_bytes({"w": w}))
    published = checkpoints.workspace.publish(Manifest(stage="export", fingerprint="0" * 16, files=(entry,)))
    age(Path(checkpoints.workspace.uri) / f"artifacts/{published.ref}.json")
    first = save(checkpoints, 1, value=7.0)
    assert first.entry(WEIGHTS).sha256 == entry.sha256
    save(checkpoints, 2, keep=1)
    assert not blob(first, OPTIMIZER).exists()
    assert torch.equal(load_tensors(published, "weights")["w"], w)


def test_an_old_manifest_that_is_damaged_does_not_keep_the_others(checkpoints: Checkpoints) -> None:
    first, second = (save(checkpoints, step) for step in (1, 2))
    overwrite(manifest_path(checkpoints, 1), b"{}")
    save(checkpoints, 3, keep=1)
    assert checkpoints.steps() == [3]
    assert not any(blob(second, name).exists() for name in second.names())
    assert blob(first, WEIGHTS).exists()  # nothing says any more that it was a checkpoint's


# ---------------------------------------------------------------------------------------------------------------- tiers


@pytest.fixture
def tiers(tmp_path: Path) -> Tiers:
    """Both tiers, empty."""
    return Tiers(Workspace(f"memory://{uuid.uuid4().hex}"), "run", tmp_path / "disk")


def test_the_newest_that_verifies_wins_in_whichever_tier(tiers: Tiers, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiers.newest() is None
    for tier, step in ((DISK, 3), (STORE, 3), (DISK, 5), (STORE, 1)):
        save(tiers.tiers[tier], step)
    assert tiers.candidates() == [(5, DISK), (3, DISK), (3, STORE), (1, STORE)]
    assert [(found.step, found.tier) for found in (tiers.newest(), tiers.newest_before(5))] == [(5, DISK), (3, DISK)]
    for step, harm in ((5, WEIGHTS), (3, OPTIMIZER)):
        path = blob(tiers.tiers[DISK].get(step), harm)
        overwrite(path, path.read_bytes()[:-1])
    found = tiers.newest()
    assert (found.step, found.tier) == (3, STORE)
    said = capsys.readouterr().err
    assert "checkpoint 5 (disk) is passed over, the next older one is tried" in said
    assert "checkpoint 3 (disk) is passed over" in said
    assert f"{WEIGHTS} (" in said
    assert f"{OPTIMIZER} (" in said
    assert torch.equal(tiers.load(3, STORE)[0]["w"], torch.full((4, 3), 3.0))
    with pytest.raises(CorruptError, match="bytes do not match"):
        tiers.load(5, DISK)


def test_a_folder_is_the_only_tier(workspace: Workspace) -> None:
    tiers = Tiers(workspace, "run")
    save(tiers.tiers[STORE], 2)
    assert list(tiers.tiers) == [STORE]
    assert tiers.newest_before(2) is None


def test_a_disk_that_cannot_be_read_is_passed_over_and_a_store_that_does_not_answer_is_not(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tier, step in ((DISK, 5), (STORE, 3)):
        save(tiers.tiers[tier], step)
    sick = tiers.tiers[DISK].workspace.uri
    real = Storage.read_bytes

    def read_bytes(storage: Storage, name: str) -> bytes:
        if storage.uri == sick:
            raise StorageError("Input/output error", got=name)
        return real(storage, name)

    monkeypatch.setattr(Storage, "read_bytes", read_bytes)
    assert tiers.newest().tier == STORE
    assert "Input/output error" in capsys.readouterr().err
    sick = tiers.tiers[STORE].workspace.uri
    tiers.tiers[DISK].drop_after(0)
    with pytest.raises(StorageError, match="Input/output"):
        tiers.newest()


def test_what_is_taken_back_is_not_found_again(tiers: Tiers) -> None:
    for step in (2, 4, 6):
        for tier in (DISK, STORE):
            save(tiers.tiers[tier], step)
    tiers.drop_after(4)
    assert tiers.candidates() == [(4, DISK), (4, STORE), (2, DISK), (2, STORE)]
    assert tiers.newest().step == 4
