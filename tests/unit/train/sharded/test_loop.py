"""Whole runs of sharded groups that break, grow and shrink, on real gloo processes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forge_ray.errors import ForgeError, StorageError
from forge_ray.train.elastic.group import GroupLost
from forge_ray.train.guardian import Verdict
from forge_ray.train.loop import StepRecord
from forge_ray.train.saving.checkpoint import Checkpoints
from forge_ray.train.sharded import loop as sharded_loop
from forge_ray.train.sharded.loop import Place, run
from forge_ray.train.sharded.worker import ShardedWorker
from forge_ray.train.spec import RunSpec
from tests.unit.train import groups
from tests.unit.train.groups import Peer

in_processes = functools.partial(groups.in_processes, limit_s=60.0)


class Log:
    """What a member's process was told."""

    def __init__(self, wishes_from: int | None = None) -> None:
        self.began: tuple[int, str] | None = None
        self.records: list[StepRecord] = []
        self.verdicts: list[Verdict] = []
        self.saved: list[int] = []
        self.not_saved: list[int] = []
        self.result: bool | str = ""
        self._wishes_from = wishes_from

    def wishes(self) -> bool:
        return self._wishes_from is not None and len(self.records) >= self._wishes_from

    def progress(self, phase: str) -> None:
        assert phase

    def on_formed(self, step: int, tier: str) -> None:
        self.began = step, tier

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_verdict(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    def on_saved(self, step: int, stall_s: float, write_s: float, size_bytes: int) -> None:
        assert size_bytes > 1000
        assert min(stall_s, write_s) >= 0.0
        self.saved.append(step)

    def on_not_saved(self, step: int, error: ForgeError | None) -> None:
        self.not_saved.append(step)


class Runs:
    """Groups of one run, one after the other."""

    def __init__(self, spec: RunSpec, memory: Path) -> None:
        self.spec, self.memory, self.curve = spec, memory, {}
        self._generation = 0

    def group(self, seats: list[int], log: Callable[[int], Log] = lambda rank: Log()) -> list[Log]:
        """A group on these seats; what each member was told."""
        self._generation += 1

        def member(peer: Peer) -> Log:
            store = dist.PrefixStore("x", dist.FileStore(peer.store_path, -1))
            told = log(peer.number)
            memory = self.memory / str(seats[peer.number])
            place = Place(store, peer.number, len(seats), self._generation, torch.device("cpu"), memory, 60.0)
            try:
                told.result = run(self.spec, place, told, {"host_class": "here"}, copy_frac=1.0)
            except Left:
                told.result = "left"
            except (GroupLost, StorageError) as error:
                told.result = type(error).__name__
            except RuntimeError as error:
                told.result = f"RuntimeError: {error}"
            return told

        logs = in_processes(len(seats), member)
        self.curve |= {record.step: record.loss for log in logs for record in log.records}
        return logs


@pytest.fixture
def runs(spec: Callable[..., RunSpec], tmp_path: Path) -> Callable[..., Runs]:
    def make(**config: Any) -> Runs:
        settings = {"reduction": "fast", "sharding": "fsdp", "steps": 9, "checkpoint_every_s": 1e-6, **config}
        run_id = f"run-{config.get('run_id', 'a')}"
        settings.pop("run_id", None)
        return Runs(spec(run_id=run_id, **settings), tmp_path / run_id)

    return make


def steps_of(log: Log) -> list[int]:
    return [record.step for record in log.records]


def test_a_run_through_losses_and_resizes_ends_on_the_curve_of_an_undisturbed_one(runs: Callable[..., Runs]) -> None:
    calm = runs(run_id="calm")
    (log,) = calm.group([0])
    assert (log.began, log.result, steps_of(log)) == ((0, "seed"), True, list(range(1, 10)))

    rough = runs(run_id="rough", checkpoint_every_s=1e6)

    def copied(step: int) -> bool:
        return step == 3 and until(lambda: [*rough.memory.glob("2/*-peer-*.label")])

    logs = rough.group([0, 1, 2], lambda rank: Leaves(copied) if rank == 1 else Log())
    assert [log.result for log in logs] == ["GroupLost", "left", "GroupLost"]
    # Its node is gone too, but not what the one after it had of it.
    for path in (rough.memory / "1").iterdir():
        path.unlink()
    logs = rough.group([2, 0], lambda rank: Log(wishes_from=2))
    assert all(log.result is False for log in logs)
    step, tier = logs[0].began
    assert tier == "memory"
    assert 1 <= step <= 3
    before = steps_of(logs[0])[-1]
    (log, *_) = rough.group([2, 0, 4], lambda rank: Log(wishes_from=1))
    assert (log.began, log.result) == ((before, "memory"), False)
    (log, *_) = rough.group([0, 2, 4])
    assert (log.result, log.saved) == (True, [9])
    assert set(rough.curve) == set(calm.curve)
    for step, loss in rough.curve.items():
        assert loss == pytest.approx(calm.curve[step], rel=1e-4)
    # All memory is gone, and the run is done nevertheless.
    (log,) = rough.group([7])
    assert (log.began, log.result, log.records) == ((9, "store"), True, [])


def until(condition: Callable[[], Any], limit_s: float = 30.0) -> bool:
    """Waits for it."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)
    return True


class Left(Exception):
    """How a member's process ends here before its time."""


class Leaves(Log):
    def __init__(self, due: Callable[[int], bool]) -> None:
        super().__init__()
        self._due = due

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if self._due(record.step):
            del self._due  # it does not travel
            raise Left


def test_a_run_whose_memory_is_gone_goes_on_from_the_newest_checkpoint_that_verifies(runs: Callable[..., Runs]) -> None:
    rough = runs(steps=500, checkpoints_kept=100)
    checkpoints = Checkpoints(rough.spec.workspace, rough.spec.run_id)
    enough = lambda step: len(checkpoints.steps()) >= 3
    logs = rough.group([0, 1], lambda rank: Leaves(enough) if rank == 1 else Log())
    assert logs[0].result == "GroupLost"
    *_, older, newest = checkpoints.steps()
    assert logs[0].saved[:2] == checkpoints.steps()[:2]
    doomed = next(entry for entry in checkpoints.get(newest).manifest.files if entry.name.startswith("model-1"))
    blob = Path(rough.spec.workspace.uri) / "blobs" / doomed.sha256[:2] / doomed.sha256
    blob.chmod(0o644)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    before = dict(rough.curve)
    (log, *_) = rough.group([3, 4, 5], lambda rank: Log(wishes_from=newest - older))
    assert (log.began, log.result) == ((older, "store"), False)
    assert steps_of(log)[-1] == newest + 1  # a wish takes a step to be known to all
    for step in range(older + 1, newest + 1):
        assert rough.curve[step] == pytest.approx(before[step], rel=1e-4)


def test_a_worker_that_cannot_compute_dies_of_its_own_error_and_the_others_of_its_loss(
    runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ShardedWorker.compute

    def wrong(self: ShardedWorker, position: int, *rest: Any) -> tuple[float, float, list[float]]:
        if position == 2 and self.rank == 1:
            torch.ones(2) @ torch.ones(3)
        return compute(self, position, *rest)

    monkeypatch.setattr(ShardedWorker, "compute", wrong)
    logs = runs().group([0, 1, 2])
    assert [log.result.partition(":")[0] for log in logs] == ["GroupLost", "RuntimeError", "GroupLost"]
    assert "size" in logs[1].result


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"), True),
        (RuntimeError("[x/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("anything"), True),
        (dist.DistNetworkError("anything"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB; see the store"), False),
        (NotImplementedError("gloo"), False),
    ],
)
def test_a_lost_peer_is_told_from_an_error_of_ones_own(error: RuntimeError, lost: bool) -> None:
    assert sharded_loop.tells_of_loss(error) is lost


def test_what_the_guardian_decides_is_done_on_all_workers(runs: Callable[..., Runs]) -> None:
    wild = runs(checkpoints_kept=100, guard={"max_skips": 1, "rollback_steps": 1, "rollback_skip_batches": 2})
    compute = ShardedWorker.compute

    def spoilt(self: ShardedWorker, position: int, *rest: Any) -> tuple[float, float, list[float]]:
        loss, norm, votes = compute(self, position, *rest)
        return float("nan") if position in (3, 6) else loss, norm, votes

    ShardedWorker.compute = spoilt
    try:
        logs = wild.group([0, 1])
    finally:
        ShardedWorker.compute = compute
    for log in logs:
        skip, rollback = log.verdicts
        assert (skip.action, skip.step, skip.position) == ("skip", 3, 3)
        assert (rollback.action, rollback.step, rollback.position) == ("rollback", 5, 6)
        begin = [record.position for record in log.records].index(9)  # 7 and 8 are left out
        back = log.records[begin].step
        assert back <= 5
        assert [record.position for record in log.records[begin:]] == list(range(9, 9 + 10 - back))
        assert steps_of(log)[begin:] == list(range(back, 10))
        assert log.result is True


def test_a_store_that_refuses_a_piece_stops_nothing_but_the_last_checkpoint(
    runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(checkpoints: Checkpoints, rank: int, *args: Any) -> Any:
        if rank == 1:
            raise StorageError("the store does not answer")
        return save_piece(checkpoints, rank, *args)

    save_piece = sharded_loop.save_piece
    monkeypatch.setattr(sharded_loop, "save_piece", refused)
    poor = runs()
    logs = poor.group([0, 1])
    assert [log.result for log in logs] == ["StorageError"] * 2
    assert all(steps_of(log) == list(range(1, 10)) for log in logs)
    assert all(log.not_saved[-1] == 9 and not log.saved for log in logs)
    monkeypatch.undo()
    (log, *_) = poor.group([1, 0, 2])  # from memory
    assert (log.began, log.result, log.saved) == ((9, "memory"), True, [9])


def test_the_data_of_a_step_and_what_it_took_are_on_record(runs: Callable[..., Runs]) -> None:
    told = runs(steps=2)
    logs = told.group([0, 1])
    for log in logs:
        for number, record in enumerate(log.records):
            assert (record.step, record.position, record.world_size, record.generation) == (number + 1, number, 2, 1)
            assert record.tokens == 8 * 32
            assert record.wall_s >= record.data_s + record.reduce_s + record.stall_s
        assert log.records[0].stall_s > 0.0
