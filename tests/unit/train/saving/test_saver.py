"""Saving in the background: what was true at the snapshot is what comes back, and nothing that fails stops training."""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from forge_ray import artifact
from forge_ray.artifact import Workspace
from forge_ray.config import PretrainConfig
from forge_ray.errors import DiskFullError, StorageError
from forge_ray.storage import Storage
from forge_ray.train.saving import saver as saving
from forge_ray.train.saving.checkpoint import DISK, STORE, Checkpoints, Tiers
from forge_ray.train.saving.saver import Image, Saver

SLOW = PretrainConfig(checkpoint_every_s=20, disk_every_s=5, checkpoints_kept=2)
LIMIT_S = 30


def state_of(value: float) -> Any:
    """A state that is told apart from others by every bit of it."""
    w = torch.full((4, 3), value)
    return SimpleNamespace(weights={"w": w}, optimizer={"w/exp_avg": w / 10, "w/step": torch.tensor(value)})


class Told:
    """What a saver tells."""

    def __init__(self) -> None:
        self.saved: list[tuple[Any, ...]] = []
        self.failed: list[tuple[Any, ...]] = []

    def names(self) -> list[tuple[str, int]]:
        return [(tier, step) for tier, step, *_ in self.saved]

    def wait(self, saver: Saver, done: Callable[[], bool]) -> None:
        """Trains on until something has been told."""
        deadline, step_ended = time.monotonic() + LIMIT_S, threading.Event()
        while not done():
            assert time.monotonic() < deadline, (self.saved, self.failed)
            step_ended.wait(0.002)
            saver.due()


@pytest.fixture
def remote() -> str:
    """A workspace on an object store of its own."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def make(told: Told) -> Callable[..., Saver]:
    """A saver whose tiers are all due when the clock says 1000."""

    def build(uri: str, config: PretrainConfig = SLOW, **options: Any) -> Saver:
        saver = Saver(
            Workspace(uri),
            "run",
            config,
            on_saved=lambda *facts: told.saved.append(facts),
            on_failed=lambda *facts: told.failed.append(facts),
            **options,
        )
        saver._taken_s = dict.fromkeys(saver.tiers.tiers, 0.0)
        return saver

    return build


class Gate:
    """Holds every write below a name of one workspace until it is opened, or makes it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uri: str, prefix: str = "") -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.error: Exception | None = None
        for method in ("write", "put_file"):
            monkeypatch.setattr(Storage, method, self._held(getattr(Storage, method), uri, prefix))

    def _held(self, real: Callable[..., Any], uri: str, prefix: str) -> Callable[..., Any]:
        def held(storage: Storage, name: str, *args: Any) -> Any:
            if storage.uri == uri and name.startswith(prefix):
                self.reached.set()
                assert self.open.wait(LIMIT_S)
                if self.error:
                    raise self.error
            return real(storage, name, *args)

        return held


# ------------------------------------------------------------------------------------------------------------ the image


def test_an_image_is_the_file_that_the_library_writes() -> None:
    tensors = {
        "w": torch.randn(5, 3),
        "b/step": torch.tensor(7.0),
        "half": torch.randn(3).to(torch.bfloat16),
        "count": torch.arange(3),
        "none": torch.zeros(0, 4),
        "ä": torch.randn(2),
    }
    image = Image(tensors)
    image.take(tensors)
    assert image.path.read_bytes() == save(tensors)
    image.take({name: tensor + 1 for name, tensor in tensors.items()})
    assert image.path.read_bytes() == save({name: tensor + 1 for name, tensor in tensors.items()})


# ----------------------------------------------------------------------------------------------------------- the saver


def test_what_was_true_at_the_snapshot_comes_back(
    store_uri: str, make: Callable[..., Saver], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, saver, state = Gate(monkeypatch, store_uri), make(store_uri), state_of(3.0)
    assert saver.snapshot(3, state, {"end_token": 5}, now=1000.0)[-1] == STORE
    gate.reached.wait(LIMIT_S)
    for tensor in (*state.weights.values(), *state.optimizer.values()):
        tensor.fill_(-1.0)  # training goes on
    gate.open.set()
    saver.finish()
    tiers = Tiers(Workspace(store_uri), "run")
    found = tiers.newest()
    assert (found.step, found.tier) == (3, saver.tiers.candidates()[0][1])
    for step, tier in tiers.candidates():
        weights, optimizer, kept = tiers.load(step, tier)
        assert torch.equal(weights["w"], state_of(3.0).weights["w"])
        assert {name: tensor.tolist() for name, tensor in optimizer.items()} == {
            name: tensor.tolist() for name, tensor in state_of(3.0).optimizer.items()
        }
        assert kept == {"end_token": 5, "step": 3}
    for tier, step, stall_s, write_s, size_bytes in told.saved:
        stored = tiers.tiers[tier].get(step).manifest.files
        assert size_bytes == sum(entry.size_bytes for entry in stored)
        assert stall_s > 0
        assert write_s > 0


def test_an_object_store_has_copies_on_this_nodes_disk_and_a_folder_needs_none(
    store_uri: str, make: Callable[..., Saver], told: Told
) -> None:
    saver = make(store_uri)
    remote = store_uri.startswith("memory://")
    assert saver.due(now=6.0) == ((DISK,) if remote else ())
    assert saver.due(now=21.0) == ((DISK, STORE) if remote else (STORE,))
    assert saver.snapshot(1, state_of(1.0), {}, now=6.0) == ((DISK,) if remote else ())
    saver.finish()
    assert saver.due(now=10.0) == ()
    assert saver.snapshot(2, state_of(2.0), {}, now=21.0) == ((DISK, STORE) if remote else (STORE,))
    saver.finish()
    assert told.names() == ([(DISK, 1), (DISK, 2), (STORE, 2)] if remote else [(STORE, 2)])
    assert saver.skipped == 0


def test_a_snapshot_is_skipped_while_the_one_before_is_written(
    tmp_path: Path, make: Callable[..., Saver], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, saver = Gate(monkeypatch, str(tmp_path)), make(str(tmp_path))
    assert saver.snapshot(1, state_of(1.0), {}, now=1000.0) == (STORE,)
    assert saver.snapshot(2, state_of(2.0), {}, now=2000.0) == ()
    assert saver.skipped == 1
    gate.open.set()
    saver.finish()
    assert saver.due(now=2000.0) == (STORE,)
    assert saver.snapshot(3, state_of(3.0), {}, now=2000.0) == (STORE,)
    saver.finish()
    assert told.names() == [(STORE, 1), (STORE, 3)]


def test_this_nodes_disk_goes_on_while_the_store_does_not_answer(
    remote: str, make: Callable[..., Saver], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, saver = Gate(monkeypatch, remote), make(remote)
    assert saver.snapshot(1, state_of(1.0), {}, now=1000.0) == (DISK, STORE)
    for step in (2, 3):
        told.wait(saver, lambda step=step: (DISK, step - 1) in told.names())
        assert saver.snapshot(step, state_of(step), {}, now=1000.0 * step) == (DISK,)
    told.wait(saver, lambda: (DISK, 3) in told.names())
    assert Tiers(Workspace(remote), "run").newest().step == 3
    gate.open.set()
    saver.finish()
    # Released on the disk in the meantime, and yet what is in the store is whole.
    assert [step for step, tier in saver.tiers.candidates() if tier == DISK] == [3, 2]
    assert torch.equal(saver.tiers.load(1, STORE)[0]["w"], torch.full((4, 3), 1.0))


def test_a_store_that_fails_is_said_once_and_stops_nothing(
    tmp_path: Path,
    make: Callable[..., Saver],
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saver = make(str(tmp_path))
    saver.snapshot(1, state_of(1.0), {}, now=1000.0)
    saver.finish()
    gate = Gate(monkeypatch, str(tmp_path))
    gate.error = StorageError("the store did not answer", got="here", do="wait")
    gate.open.set()
    for step in (2, 3):
        assert saver.snapshot(step, state_of(step), {}, now=1000.0 * step) == (STORE,)
        told.wait(saver, lambda step=step: any(failed[1] == step for failed in told.failed))
    assert Tiers(Workspace(str(tmp_path)), "run").newest().step == 1
    gate.error = None
    saver.snapshot(4, state_of(4.0), {}, now=4000.0)
    saver.finish()
    assert [(tier, step, str(error)) for tier, step, error in told.failed] == [
        (STORE, step, str(StorageError("the store did not answer", got="here", do="wait"))) for step in (2, 3)
    ]
    assert told.names() == [(STORE, 1), (STORE, 4)]
    said = capsys.readouterr().err
    assert said.count("the store did not answer") == 1
    assert "checkpoint 2 is not saved (store)" in said
    assert "checkpoint 4 is saved (store), the first since 2 was not" in said


def test_only_the_last_checkpoint_ends_training_when_it_is_lost(
    store_uri: str, make: Callable[..., Saver], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, saver = Gate(monkeypatch, store_uri), make(store_uri)
    gate.error = StorageError("the store did not answer")
    gate.open.set()
    saver.snapshot(1, state_of(1.0), {}, now=1000.0)
    told.wait(saver, lambda: bool(told.failed))
    assert saver.snapshot(2, state_of(2.0), {}, now=1000.0, last=True)[-1] == STORE
    with pytest.raises(StorageError, match="did not answer"):
        saver.finish()
    gate.error = None
    saver.snapshot(2, state_of(2.0), {}, last=True)
    saver.finish()
    assert Tiers(Workspace(store_uri), "run").newest().step == 2


def test_an_error_of_the_thread_itself_loses_no_last_checkpoint_unseen(
    tmp_path: Path, make: Callable[..., Saver], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make(str(tmp_path))

    def digest_file(path: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(saving, "digest_file", digest_file)
        saver.snapshot(1, state_of(1.0), {}, last=True)
        with pytest.raises(OSError, match="Too many"):
            saver.finish()
    saver.snapshot(1, state_of(1.0), {}, last=True)
    saver.finish()
    assert told.names() == [(STORE, 1)]


def test_the_last_snapshot_is_taken_whatever_is_under_way(
    tmp_path: Path, make: Callable[..., Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, saver = Gate(monkeypatch, str(tmp_path)), make(str(tmp_path))
    saver.snapshot(1, state_of(1.0), {}, now=1000.0)
    threading.Timer(0.1, gate.open.set).start()
    assert saver.snapshot(2, state_of(2.0), {}, now=1000.0, last=True) == (STORE,)
    saver.finish()
    assert saver.tiers.candidates() == [(2, STORE), (1, STORE)]


def test_the_disk_of_the_node_is_given_back_when_the_last_checkpoint_is_stored(
    remote: str, make: Callable[..., Saver], tmp_path: Path
) -> None:
    saver = make(remote, disk=tmp_path / "disk")
    saver.snapshot(1, state_of(1.0), {}, now=1000.0)
    saver.finish()
    assert (tmp_path / "disk" / "run").exists()
    saver.snapshot(2, state_of(2.0), {}, last=True)
    saver.finish()
    assert not (tmp_path / "disk" / "run").exists()
    assert saver.tiers.newest().tier == STORE


def test_a_full_disk_of_the_node_does_not_keep_anything_from_the_store(
    remote: str, make: Callable[..., Saver], told: Told, small_disk: Path
) -> None:
    saver = make(remote, disk=small_disk)
    big = SimpleNamespace(weights={"w": torch.randn(100_000)}, optimizer={})
    saver.snapshot(1, big, {}, now=1000.0)
    saver.finish()
    assert [(tier, step, type(error)) for tier, step, error in told.failed] == [(DISK, 1, DiskFullError)]
    assert saver.tiers.newest().tier == STORE
    assert torch.equal(saver.tiers.load(1, STORE)[0]["w"], big.weights["w"])


def test_a_full_workspace_keeps_what_it_has_and_takes_the_next_when_there_is_space(
    make: Callable[..., Saver], told: Told, small_disk: Path
) -> None:
    saver = make(str(small_disk / "workspace"))
    big = SimpleNamespace(weights={"w": torch.randn(20_000)}, optimizer={})  # 80 of 256 KiB
    saver.snapshot(1, big, {}, now=1000.0)
    saver.finish()
    (small_disk / "other").write_bytes(bytes(120_000))
    big.weights["w"] += 1
    saver.snapshot(2, big, {}, now=2000.0)
    told.wait(saver, lambda: bool(told.failed))
    assert isinstance(told.failed[0][2], DiskFullError)
    assert Tiers(Workspace(str(small_disk / "workspace")), "run").newest().step == 1
    (small_disk / "other").unlink()
    saver.snapshot(3, big, {}, now=3000.0)
    saver.finish()
    assert saver.tiers.newest().step == 3


def test_nothing_is_visible_in_the_store_before_its_owner_agrees(tmp_path: Path, told: Told) -> None:
    def refuse() -> None:
        assert checkpoints.steps() == []
        raise StorageError("events cannot be written")

    checkpoints = Checkpoints(Workspace(str(tmp_path)), "run")
    saver = Saver(checkpoints.workspace, "run", SLOW, before_manifest=refuse)
    saver.snapshot(1, state_of(1.0), {}, last=True)
    with pytest.raises(StorageError, match="events"):
        saver.finish()
    assert checkpoints.steps() == []


def test_a_state_of_other_tensors_gets_an_image_of_its_own(tmp_path: Path, make: Callable[..., Saver]) -> None:
    saver, state = make(str(tmp_path)), state_of(1.0)
    saver.snapshot(1, state, {}, now=1000.0)
    saver.finish()
    state.optimizer["w/new"] = torch.ones(2)
    saver.snapshot(2, state, {}, now=2000.0)
    saver.finish()
    assert set(saver.tiers.load(2, STORE)[1]) == {"w/exp_avg", "w/step", "w/new"}


# ------------------------------------------------------------------------------------------------------- leftovers


def test_what_killed_processes_left_on_the_disk_goes(
    remote: str, make: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    orphan, temporary = disk / "run" / "blobs" / "00" / ("0" * 64), disk / "run" / "blobs" / "00" / ".tmp-x"
    old, young = disk / "abandoned", disk / "another"
    for path in (orphan, temporary, old / "x", young / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    before = time.time() - 3600
    for path, then in ((orphan, before), (temporary, before), (old, time.time() - artifact.ACTIVE_S - 60)):
        _age(path, then)
    saver = make(remote, disk=disk)
    saver.snapshot(1, state_of(1.0), {}, now=1000.0)
    saver.finish()
    assert not any(path.exists() for path in (orphan, temporary, old))
    assert young.exists()
    assert saver.tiers.newest().tier == DISK


def _age(path: Path, then: float) -> None:
    os.utime(path, (then, then))
