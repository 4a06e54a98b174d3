"""Checkpoints under harm: death at every step of a save, flipped bits, faults of a store. No bad state is accepted."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forge_ray import objects, retry, storage
from forge_ray.artifact import Artifact, Manifest, Workspace, cache_folder
from forge_ray.config import PretrainConfig
from forge_ray.errors import ArtifactError, StorageError
from forge_ray.train.saving.checkpoint import DISK, STORE, Saved, Tiers
from forge_ray.train.saving.saver import Saver
from tests.integration.stores import Faults, Proxy, Server, reach, running

ENDED, DIED = 0, 77
FLIPS = 10_000
LIMIT_S = 200
OFTEN = PretrainConfig(checkpoint_every_s=1e-6, disk_every_s=1e-6, checkpoints_kept=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A fork has none of torch's threads, and would wait for them."""
    torch.set_num_threads(1)


def state_of(step: int, count: int = 50) -> Any:
    """What training has after some steps; random, so that a mistaken byte shows."""
    draw = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(count, 2, generator=draw), "b": torch.randn(3, generator=draw)}
    moments = {f"{name}/exp_avg": torch.randn(tensor.shape, generator=draw) for name, tensor in weights.items()}
    return SimpleNamespace(weights=weights, optimizer=moments | {"w/step": torch.tensor(float(step))})


def check(tiers: Tiers, found: Saved, count: int = 50) -> None:
    """What was found is what training had then, bit for bit."""
    weights, optimizer, kept = tiers.load(found.step, found.tier)
    wanted = state_of(found.step, count)
    assert kept == {"step": found.step, "from": "training"}
    for read, tensors in ((weights, wanted.weights), (optimizer, wanted.optimizer)):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def save(saver: Saver, step: int, count: int = 50) -> None:
    """One save to every tier, waited for."""
    assert saver.snapshot(step, state_of(step, count), {"from": "training"}) == tuple(saver.tiers.tiers)
    saver.finish()


# --------------------------------------------------------------------------------------------------------- crash points


def dies(number: int, arm: Callable[[Callable[[], bool]], None], work: Callable[[Callable[..., None]], None]) -> Any:
    """Runs work in a fork that ends at its `number`-th point; gives how it ended, and the steps that it said saved.

    Args:
        number: Of the point.
        arm: Puts points into what the fork will call, which ask at each whether it is the one.
        work: Is given what to tell of each save.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        count = itertools.count()
        try:
            arm(lambda: next(count) == number)
            work(lambda tier, step, *_: os.write(writing, f"{tier} {step}\n".encode()))
            os._exit(ENDED)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writing)
    with open(reading, encoding="ascii") as lines:
        said = [line.split() for line in lines]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (ENDED, DIED), code
    return code, [(tier, int(step)) for tier, step in said]


def arm_files(is_it: Callable[[], bool]) -> None:
    """Every change of a file or folder is a point; so is the middle of one that takes long."""

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def point(*args: Any, **options: Any) -> Any:
            if is_it():
                os._exit(DIED)
            return real(*args, **options)

        return point

    def half(real: Callable[..., Any], data_of: Callable[..., tuple[Any, bytes]]) -> Callable[..., Any]:
        def point(*args: Any) -> Any:
            if is_it():
                target, data = data_of(*args)
                target.write_bytes(data[: len(data) // 2])
                os._exit(DIED)
            return real(*args)

        return point

    for name in ("fsync", "link", "replace", "unlink", "mkdir", "utime", "chmod", "truncate", "rmdir"):
        setattr(os, name, before(getattr(os, name)))
    shutil.copyfile = before(half(shutil.copyfile, lambda source, target: (target, source.read_bytes())))
    storage._write_synced = before(half(storage._write_synced, lambda target, data: (target, data)))


@pytest.mark.parametrize("tier", [DISK, STORE])
def test_a_process_that_ends_at_any_step_of_a_save_leaves_the_last_committed_state(tmp_path: Path, tier: str) -> None:
    def tiers(folder: Path) -> Tiers:
        uri = f"memory://{uuid.uuid4().hex}" if tier == DISK else str(folder)
        return Tiers(Workspace(uri), "run", folder)

    def saver(folder: Path, tell: Callable[..., None] = lambda *_: None) -> Saver:
        return Saver(tiers(folder).tiers[STORE].workspace, "run", OFTEN, folder, on_saved=tell)

    def two_saves(folder: Path, tell: Callable[..., None]) -> None:
        made = saver(folder, tell)
        for step in (1, 2):  # the second releases the first
            save(made, step)

    found_at = set()
    for number in itertools.count():
        folder = tmp_path / str(number)
        code, said = dies(number, arm_files, lambda tell, folder=folder: two_saves(folder, tell))
        after, acknowledged = tiers(folder), max((step for one, step in said if one == tier), default=0)
        found = after.newest()
        assert (found.step if found else 0) in (acknowledged, acknowledged + 1), number
        if found:
            check(after, found)
            found_at.add(found.step)
        save(saver(folder), 3)  # and another process goes on from there
        assert tiers(folder).newest().step == 3
        check(tiers(folder), tiers(folder).newest())
        shutil.rmtree(folder)
        if code == ENDED:
            break
    assert number > 60
    assert found_at == {1, 2}


def arm_requests(kind: type[objects.Store]) -> Callable[[Callable[[], bool]], None]:
    """Every request to a store is a point."""

    def arm(is_it: Callable[[], bool]) -> None:
        def before(real: Callable[..., Any]) -> Callable[..., Any]:
            async def point(*args: Any) -> Any:
                if is_it():
                    os._exit(DIED)
                return await real(*args)

            return point

        for name in ("_head", "_get", "_put", "_page", "_delete", "_begin", "_part", "_finish"):
            setattr(kind, name, before(getattr(kind, name)))

    return arm


@pytest.fixture(scope="module")
def running_s3() -> Iterator[tuple[Server, str]]:
    """SeaweedFS and a bucket on it."""
    with running("s3", "checkpoints") as found:
        yield found


@pytest.fixture
def s3(running_s3: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Server, str]:
    """The server, and an empty root on it."""
    reach(running_s3[0], monkeypatch)
    return running_s3[0], f"{running_s3[1]}/{uuid.uuid4().hex}"


def test_a_process_that_ends_at_any_request_of_a_save_leaves_the_last_committed_state(
    s3: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 800_000  # weights of 6.4 MB, so two parts: S3 takes no part of less than 5 MiB but the last
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    root, disk = s3[1], tmp_path / "disk"

    def saved(uri: str, step: int, tell: Callable[..., None] = lambda *_: None) -> None:
        save(Saver(Workspace(uri), "run", OFTEN, disk, on_saved=tell), step, count)

    kind, found_at = type(Workspace(root).storage.store), set()
    for number in itertools.count():
        uri = f"{root}/{number}"
        saved(uri, 1)
        code, said = dies(number, arm_requests(kind), lambda tell, uri=uri: saved(uri, 2, tell))
        shutil.rmtree(disk)
        after = Tiers(Workspace(uri), "run", disk)
        found = after.newest()
        assert found.step == 2 if (STORE, 2) in said else found.step in (1, 2), number
        check(after, found, count)
        found_at.add(found.step)
        if code == ENDED:
            break
    saved(uri, 3)
    check(after, after.newest(), count)
    assert number > 20
    assert found_at == {1, 2}


# -------------------------------------------------------------------------------------------------------- damaged files


class Harmed:
    """Two checkpoints in one tier, and the bytes of the newer one's files, to be changed at will."""

    def __init__(self, uri: str, disk: Path, tier: str) -> None:
        self.uri, self.disk, self.tier = uri, disk, tier
        self.checkpoints = self.tiers().tiers[tier]
        for step in (1, 2):
            state = state_of(step, 20)
            kept = {"from": "training"}
            newest: Artifact = self.checkpoints.save(step, state.weights, state.optimizer, kept, keep=2)
        shared = {entry.sha256 for entry in self.checkpoints.get(1).manifest.files}
        names = [f"blobs/{e.sha256[:2]}/{e.sha256}" for e in newest.manifest.files if e.sha256 not in shared]
        names.append("runs/run/checkpoints/00000002.json")
        self.files = {name: self.checkpoints.workspace.storage.read_bytes(name) for name in names}

    def tiers(self) -> Tiers:
        """As a process that has just started sees it."""
        return Tiers(Workspace(self.uri), "run", self.disk)

    def write(self, name: str, data: bytes) -> None:
        """Changes a file behind the back of everything; of the store's, this machine has no copy."""
        (cache_folder("blobs") / name.rpartition("/")[2]).unlink(missing_ok=True)
        files = self.checkpoints.workspace.storage
        if files.local:
            files.delete(name)
            (files.local / name).write_bytes(data)
        else:
            files.write(name, data)


@pytest.fixture(params=[DISK, STORE])
def harmed(request: pytest.FixtureRequest, tmp_path: Path) -> Harmed:
    """In the tier on the node's disk, and in an object store."""
    return Harmed(f"memory://{uuid.uuid4().hex}", tmp_path / "disk", request.param)


def test_every_one_of_ten_thousand_flipped_bits_is_found(harmed: Harmed, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(4)
    for number in range(FLIPS):
        name = draw.choice(list(harmed.files))
        data = bytearray(harmed.files[name])
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        harmed.write(name, bytes(data))
        with pytest.raises(ArtifactError):
            harmed.tiers().tiers[harmed.tier].verified(2)
        if number % 500 == 0:
            check(harmed.tiers(), harmed.tiers().newest(), 20)
            assert harmed.tiers().newest().step == 1
        harmed.write(name, harmed.files[name])
    assert harmed.tiers().newest().step == 2
    assert capsys.readouterr().err.count("is passed over") == 2 * FLIPS // 500


def test_every_bit_of_a_manifest_counts(harmed: Harmed) -> None:
    data = harmed.files["runs/run/checkpoints/00000002.json"]
    for at, bit in itertools.product(range(len(data)), range(8)):
        flipped = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        with pytest.raises(ArtifactError):
            Manifest.from_json(flipped, "here")


def test_what_is_cut_short_or_gone_is_passed_over(harmed: Harmed) -> None:
    for name, data in harmed.files.items():
        for length in (0, 1, 7, 8, len(data) // 2, len(data) - 2):
            harmed.write(name, data[:length])
            assert harmed.tiers().newest().step == 1, (name, length)
        harmed.write(name, data + b"\0")
        assert harmed.tiers().newest().step == 1, name
        harmed.checkpoints.workspace.storage.delete(name)
        assert harmed.tiers().newest().step == 1, name
        harmed.write(name, data)
        assert harmed.tiers().newest().step == 2, name


# ---------------------------------------------------------------------------------------------------- faults of a store


class Training:
    """A loop that saves as it goes: it ends with what was told, and how many steps it made meanwhile."""

    def __init__(self, uri: str, disk: Path) -> None:
        self.saved: list[tuple[Any, ...]] = []
        self.failed: list[tuple[Any, ...]] = []
        self.step = 0
        self.saver = Saver(
            Workspace(uri),
            "run",
            OFTEN,
            disk,
            on_saved=lambda *facts: self.saved.append(facts),
            on_failed=lambda *facts: self.failed.append(facts),
        )

    def until(self, done: Callable[[], bool]) -> None:
        """Trains on until something was told."""
        deadline, step_ended = time.monotonic() + LIMIT_S, threading.Event()
        while not done():
            assert time.monotonic() < deadline, (self.step, self.saved, self.failed)
            self.step += 1
            step_ended.wait(0.002)
            if self.saver.due():
                self.saver.snapshot(self.step, state_of(self.step), {"from": "training"})

    def until_stored(self) -> int:
        """Trains on until a checkpoint that is begun now is in the store; gives its step."""
        now = self.step
        later = lambda: [step for tier, step, *_ in self.saved if tier == STORE and step > now]
        self.until(lambda: bool(later()))
        return int(later()[0])


@pytest.fixture
def training(s3: tuple[Server, str], tmp_path: Path) -> Training:
    return Training(s3[1], tmp_path / "disk")


def _stored(uri: str, disk: Path) -> Saved:
    """What another node finds, which has no copies."""
    tiers = Tiers(Workspace(uri), "run", disk / "another")
    found = tiers.newest()
    check(tiers, found)
    return found


@pytest.mark.parametrize(
    "faults",
    [Faults(unavailable_frac=1.0), Faults(reset_frac=1.0), Faults(denied_frac=1.0)],
    ids=["503", "reset", "403"],
)
def test_training_goes_on_without_its_store_and_saves_when_it_is_back(
    s3: tuple[Server, str],
    training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faults: Faults,
) -> None:
    monkeypatch.setattr(retry, "BUDGET_S", 1.0)
    training.until_stored()
    with s3[0].proxy.injecting(faults):
        begun = training.step
        training.until(lambda: len(training.failed) >= 2)
        training.until(lambda: any(tier == DISK and step > begun + 1 for tier, step, *_ in training.saved))
        assert {tier for tier, *_ in training.failed} == {STORE}
        assert all(isinstance(error, StorageError) for *_, error in training.failed)
        assert training.saver.tiers.tiers[DISK].newest() is not None
    before = _stored(s3[1], tmp_path).step
    assert training.until_stored() > before
    training.saver.finish()
    said = capsys.readouterr().err
    assert said.count("is not saved (store)") == 1
    assert said.count("is saved (store), the first since") == 1


def test_a_store_that_is_busy_resets_and_cuts_its_answers_gets_whole_checkpoints(
    s3: tuple[Server, str], training: Training, tmp_path: Path
) -> None:
    faults = Faults(unavailable_frac=0.1, reset_frac=0.1, lost_frac=0.1, cut_frac=0.1, seed=7)
    with s3[0].proxy.injecting(faults) as seen:
        stored = [training.until_stored() for _ in range(4)]
        found = _stored(s3[1], tmp_path)
    assert found.step >= stored[-1]
    assert {fault for _, _, fault in seen} >= {"unavailable", "reset", "lost", "cut"}
    training.saver.finish()


def test_a_store_that_takes_two_seconds_for_each_answer_makes_no_step_wait(
    s3: tuple[Server, str], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Proxy._pass_on

    async def late(proxy: Proxy, *args: Any) -> None:
        await asyncio.sleep(2.0)
        await real(proxy, *args)

    with monkeypatch.context() as slow:
        slow.setattr(Proxy, "_pass_on", late)
        stored = training.until_stored()
        # On the disk it was saved again and again while the store was at its one.
        on_disk = [step for tier, step, *_ in training.saved if tier == DISK]
        assert len(on_disk) >= 3
        assert max(on_disk) > stored
        assert training.saver.skipped > 0
    assert training.until_stored() > stored
    training.saver.finish()
    assert _stored(s3[1], tmp_path).step > stored
