"""Saving in the background: training stalls for one copy of its state in memory, a thread does the rest.

The copy is the checkpoint's files byte for byte (`Image`), so writing them is a digest and a copy by the kernel, both
without the interpreter's lock. A save goes to this node's disk first, where there is that tier, then, when it is due,
from there to the store; meanwhile the image is free for the next one. While an image is being written a snapshot that
is due is skipped, never waited for. A store or a disk that fails is said aloud once, and tried again at the next due
time; what was saved before stays as it was. Owns when to save and the threads. Does not own what makes files a
checkpoint (`checkpoint.py`).

Lines that no test executes without a GPU: the same copy, from a device (pageable memory; not yet overlapped).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from forge_ray import garbage
from forge_ray.artifact import ACTIVE_S, Artifact, FileEntry, Workspace, digest_file
from forge_ray.config import PretrainConfig
from forge_ray.errors import ForgeError
from forge_ray.telemetry import say
from forge_ray.train.saving.checkpoint import (
    DISK,
    OPTIMIZER,
    STATE,
    STORE,
    WEIGHTS,
    Checkpoints,
    Stored,
    Tiers,
    blob_name,
)
from forge_ray.train.saving.pieces import LAYOUT, layout_of, piece_name

if TYPE_CHECKING:
    from forge_ray.train.sharded.worker import Rows

_DISK_GRACE_S = 600.0
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class State(Protocol):
    """What is saved; `state.FlatState` is one."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by name."""

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors by `<parameter>/<quantity>`."""


class Image:
    """A safetensors file in memory, as it will be stored, that tensors of always the same shapes are copied into.

    Its memory has a path, so that the kernel copies it to a disk and clients of stores read parts of it.

    Args:
        tensors: What it will hold.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # The library's own order (safetensors 0.8), so that the same tensors are the same bytes whoever writes them.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header: dict[str, Any] = {}
        at = 0
        for name in names:
            tensor, end = tensors[name], at + tensors[name].nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        self.size_bytes = begin + at
        descriptor = os.memfd_create("forge-checkpoint")
        weakref.finalize(self, os.close, descriptor)
        self.path = Path(f"/proc/self/fd/{descriptor}")
        os.truncate(descriptor, self.size_bytes)
        memory = mmap.mmap(descriptor, self.size_bytes)
        memory[:begin] = len(text).to_bytes(8, "little") + text
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._views = {
            name: self._bytes[begin + header[name]["data_offsets"][0] : begin + header[name]["data_offsets"][1]]
            .view(tensors[name].dtype)
            .view(tensors[name].shape)
            for name in names
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors are what it was made for."""
        return self._views.keys() == tensors.keys() and all(
            (view.shape, view.dtype) == (tensors[name].shape, tensors[name].dtype) for name, view in self._views.items()
        )

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies them in.

        Cost: 120 MB in 7 ms on a quiet core, ten times as long the first time, which finds the memory (2026-11-24).
        """
        with torch.no_grad():
            for name, view in self._views.items():
                view.copy_(tensors[name])

    def entry(self, name: str) -> FileEntry:
        """The row of a manifest for what it holds. Cost: the digest."""
        return FileEntry(name, digest_file(self.path), self.size_bytes)


@dataclass(frozen=True)
class _Job:
    """One save under way."""

    step: int
    tiers: tuple[str, ...]
    state: bytes
    stall_s: float
    trusted_step: int
    begun_s: float = field(default_factory=time.time)


@dataclass(frozen=True)
class _Source:
    """A file to be stored."""

    entry: FileEntry
    path: Path


class Saver:
    """Saves a run's state in the background, in every tier that it has.

    Its methods are called by one thread, the trainer's, and so are the callbacks, from within `due`, `snapshot` and
    `finish`; `before_manifest` alone is called by the thread that writes.

    Args:
        workspace: The run's.
        run_id: The run.
        config: Intervals, and how many checkpoints stay.
        disk: Folder of this node for the copies of all runs; none for the cache. See `Tiers`.
        on_saved: Told `(tier, step, stall_s, write_s, bytes)` of each checkpoint that is committed.
        on_failed: Told `(tier, step, error)` of each that is not.
        before_manifest: Called before a checkpoint becomes visible in the store; what it raises prevents that.
    """

    def __init__(
        self,
        workspace: Workspace,
        run_id: str,
        config: PretrainConfig,
        disk: Path | None = None,
        *,
        on_saved: Callable[[str, int, float, float, int], None] = lambda *_: None,
        on_failed: Callable[[str, int, Exception], None] = lambda *_: None,
        before_manifest: Callable[[], None] = lambda: None,
    ) -> None:
        self.tiers = Tiers(workspace, run_id, disk, pinned=config.stable_steps)
        self.skipped = 0
        """Snapshots that were due while the one before was still being written."""
        self._config, self._before_manifest = config, before_manifest
        self._tell = {"saved": on_saved, "failed": on_failed}
        self._news: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._every_s = {DISK: config.disk_every_s, STORE: config.checkpoint_every_s}
        self._taken_s = dict.fromkeys(self.tiers.tiers, time.monotonic())
        self._images: dict[str, Image] = {}
        self._image_free, self._store_free = threading.Event(), threading.Event()
        self._image_free.set()
        self._store_free.set()
        self._outages: dict[str, int] = {}
        self._lost: Exception | None = None
        self._ended = False
        self._cleaned = False

    def due(self, now: float | None = None) -> tuple[str, ...]:
        """The tiers whose last snapshot is old enough; `now` is of the monotonic clock."""
        self._tell_news()
        now = time.monotonic() if now is None else now
        return tuple(tier for tier in self.tiers.tiers if now - self._taken_s[tier] >= self._every_s[tier])

    def snapshot(
        self,
        step: int,
        state: State,
        extra: Mapping[str, Any],
        *,
        trusted_step: int = -1,
        now: float | None = None,
        last: bool = False,
    ) -> tuple[str, ...]:
        """Copies the state and has it saved to the tiers that are due, to all after the last step at the full rate.

        Says to which; none if it was skipped.

        Args:
            step: Number of finished steps.
            state: Tensors of the same names and shapes each time.
            extra: What else is needed to go on, as JSON values.
            trusted_step: See `Checkpoints.commit`.
            now: As for `due`.
            last: Waits for what is under way, then saves to every tier, due or not; `finish` awaits it.
        """
        tiers = wanted = self.due(now)
        if last:
            self._wait()
        if last or step == self._config.stable_steps:
            tiers = tuple(self.tiers.tiers)
        if not self._store_free.is_set():
            tiers = tuple(tier for tier in tiers if tier != STORE)
        elif STORE in tiers:
            tiers = tuple(self.tiers.tiers)  # the store is written from the disk, where there is that tier
        if not tiers or not self._image_free.is_set():
            self.skipped += bool(wanted)
            return ()
        began = time.perf_counter()
        self._ended = last
        files = {WEIGHTS: state.weights, OPTIMIZER: state.optimizer}
        for name, tensors in files.items():
            if name not in self._images or not self._images[name].fits(tensors):
                self._images[name] = Image(tensors)
            self._images[name].take(tensors)
        content = json.dumps({**extra, "step": step}).encode()
        job = _Job(step, tiers, content, time.perf_counter() - began, trusted_step)
        for tier in tiers:
            self._taken_s[tier] = time.monotonic() if now is None else now
        self._image_free.clear()
        if STORE in tiers:
            self._store_free.clear()
        threading.Thread(target=self._save, args=(job,), name=f"forge-save-{step}", daemon=True).start()
        return tiers

    def finish(self) -> None:
        """Waits for what is under way; once the last snapshot is in the store, this node's copies go.

        Raises:
            ForgeError: The last snapshot for the store was not saved there.
        """
        self._wait()
        self._tell_news()
        if self._lost is not None:
            raise self._lost
        if self._ended and DISK in self.tiers.tiers:
            shutil.rmtree(self.tiers.tiers[DISK].workspace.uri, ignore_errors=True)

    def _wait(self) -> None:
        self._image_free.wait()
        self._store_free.wait()

    def _tell_news(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                kind, facts = self._news.get_nowait()
                self._tell[kind](*facts)

    # ------------------------------------------------------------------------------------------- in a thread of its own

    def _save(self, job: _Job) -> None:
        with contextlib.ExitStack() as ended, contextlib.ExitStack() as image_read:
            image_read.callback(self._image_free.set)
            if STORE in job.tiers:
                ended.callback(self._store_free.set)
            sources, began = self._from_image, time.monotonic()
            if DISK in job.tiers:
                files = self._attempt(DISK, job, sources, began)
                if files and STORE in job.tiers:
                    with contextlib.suppress(OSError):
                        opened = [_opened(self.tiers.tiers[DISK], file.entry, ended) for file in files]
                        sources = lambda: opened
                        image_read.close()
                    began = time.monotonic()
            if STORE in job.tiers:
                self._attempt(STORE, job, sources, began)

    def _from_image(self) -> list[_Source]:
        return [_Source(image.entry(name), image.path) for name, image in self._images.items()]

    def _attempt(self, tier: str, job: _Job, sources: Callable[[], list[_Source]], began: float) -> list[Stored]:
        """Saves to a tier; the files of the state's tensors, none if it failed."""
        checkpoints, lost = self.tiers.tiers[tier], None
        files: list[Stored] = []
        try:
            if tier == DISK:
                self._clean(checkpoints.workspace)
            tensors = [checkpoints.put_file(source.entry, source.path) for source in sources()]
            rest = checkpoints.put_bytes(STATE, job.state)
            if tier == STORE:
                self._before_manifest()
            kept = self._config.checkpoints_kept
            checkpoints.commit(job.step, [*tensors, rest], job.begun_s, kept, job.trusted_step)
            if tier == DISK:
                os.utime(checkpoints.workspace.uri)  # what lies below does not show in the folder's own time
            files = tensors
            size_bytes = sum(file.entry.size_bytes for file in [*files, rest])
            self._news.put(("saved", (tier, job.step, job.stall_s, time.monotonic() - began, size_bytes)))
            if tier in self._outages:
                say(f"  checkpoint {job.step} is saved ({tier}), the first since {self._outages.pop(tier)} was not")
        except Exception as error:  # whatever it is, it must not end training before the last checkpoint
            lost = error
            self._news.put(("failed", (tier, job.step, error)))
            if tier not in self._outages:
                self._outages[tier] = job.step
                say(f"  checkpoint {job.step} is not saved ({tier}), the next one is tried when it is due: {error}")
        if tier == STORE:
            self._lost = lost
        return files

    def _clean(self, workspace: Workspace) -> None:
        """Removes, once, what killed processes left on this node, and the copies of runs that nobody goes on with."""
        if self._cleaned:
            return
        self._cleaned = True
        folder = Path(workspace.uri)
        with contextlib.suppress(OSError):
            for other in folder.parent.iterdir():
                if other != folder and time.time() - other.stat().st_mtime > ACTIVE_S:
                    shutil.rmtree(other, ignore_errors=True)
        try:
            garbage.delete(workspace, garbage.find(workspace, grace_s=_DISK_GRACE_S))
        except ForgeError as error:
            say(f"  what is of no use on this node's disk stays for now: {error.what}")


def _opened(disk: Checkpoints, entry: FileEntry, stack: contextlib.ExitStack) -> _Source:
    """A file on this node's disk, which can be read even when it has been released."""
    descriptor = os.open(disk.workspace.storage.local / blob_name(entry.sha256), os.O_RDONLY)
    stack.callback(os.close, descriptor)
    return _Source(entry, Path(f"/proc/self/fd/{descriptor}"))


# ------------------------------------------------------------------------------------------------------------ in pieces


def save_piece(
    checkpoints: Checkpoints, rank: int, size: int, weights: Mapping[str, Rows], optimizer: Mapping[str, Rows]
) -> list[dict[str, Any]]:
    """Stores a rank's rows; returns what `commit_pieces` wants to know of them, as JSON values."""
    said = []
    for which, rows in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
        tensors = {name: part.tensor for name, part in rows.items()}
        image = Image(tensors)
        image.take(tensors)
        stored = checkpoints.put_file(image.entry(piece_name(which, rank, size)), image.path)
        said.append({"entry": asdict(stored.entry), "new": stored.new, "layout": layout_of(rows)})
    return said


def commit_pieces(
    checkpoints: Checkpoints,
    step: int,
    pieces: Sequence[Sequence[Mapping[str, Any]]],
    extra: Mapping[str, Any],
    begun_s: float,
    keep: int,
) -> Artifact:
    """Makes the pieces of all ranks the checkpoint of a step, called by one of them.

    Args:
        checkpoints: Where the pieces are stored.
        step: Number of finished steps.
        pieces: What `save_piece` gave on each rank.
        extra: What else is needed to go on, as JSON values.
        begun_s: Time since the epoch before the first of them was stored.
        keep: How many checkpoints stay.
    """
    said = [row for piece in pieces for row in piece]
    layout = {row["entry"]["name"]: row["layout"] for row in said}
    files = [Stored(FileEntry(**row["entry"]), row["new"]) for row in said]
    files.append(checkpoints.put_bytes(LAYOUT, json.dumps(layout).encode()))
    files.append(checkpoints.put_bytes(STATE, json.dumps({**extra, "step": step}).encode()))
    return checkpoints.commit(step, files, begun_s, keep)
