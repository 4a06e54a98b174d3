"""Copies of sharded state in memory: each worker's own rows, and those of the worker before it.

The copies are files in a folder in memory (`/dev/shm`) that outlive the process that wrote them. When a node is lost,
the worker after it has its rows: any set of lost workers in which no two are neighbours leaves a whole state. It is
brought together from whoever has what, by a group of any size. Owns the copies, finding the newest step that all rows
are there for, and handing rows around. When to copy is the loop's business.

A worker's step waits while its rows are packed into the file, one copy of memory; digest and sending are a thread's.

Memory on a node, for S bytes of state in a worker: 4 S, which is two steps of its own rows and two of its neighbour's,
until the group changes: then what the group before left comes on top, up to the second copy of the new one.

Files: `<generation>-<own|peer>-<0|1>.rows`, fp32 values one after the other, and a `.label` beside each that says
what they are, with the SHA-256 of both. It is removed before a copy begins and written by rename when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from forge_ray.errors import DiskFullError
from forge_ray.telemetry import say
from forge_ray.train.elastic.group import Group, GroupLost
from forge_ray.train.sharded.worker import Rows, num_rows, share

T = TypeVar("T")
_PIECE = 1 << 22  # fp32 values that are digested or sent at a time, 16 MiB


@dataclass(frozen=True)
class Copy:
    """What a copy is, as its label says.

    Args:
        run_id: Whose state.
        generation: Of the group that wrote it: a later group's copies are newer, whatever their step.
        number: Of the copy within its generation.
        step: Finished steps.
        rank: Whose rows, of `size`.
        extra: What the loop keeps beside the tensors.
        tensors: Name, shape of the whole, and number of rows, as they follow each other.
        sha256: Of the values.
    """

    run_id: str
    generation: int
    number: int
    step: int
    rank: int
    size: int
    extra: dict[str, Any]
    tensors: list[tuple[str, list[int], int]]
    sha256: str = ""

    @property
    def num_values(self) -> int:
        """fp32 values of all rows."""
        return sum(rows * prod(shape[1:]) for _, shape, rows in self.tensors)

    def to_text(self) -> bytes:
        """Its label: JSON, after a line with the digest of that."""
        content = json.dumps(asdict(self)).encode()
        return hashlib.sha256(content).hexdigest().encode() + b"\n" + content

    @staticmethod
    def from_text(text: bytes) -> Copy | None:
        """What `to_text` gave; none if it is not as it was."""
        digest, _, content = text.partition(b"\n")
        return Copy(**json.loads(content)) if hashlib.sha256(content).hexdigest().encode() == digest else None


class Buddy:
    """Keeps copies of a worker's rows with it, and with the worker after it. Made by all workers of a group together.

    Args:
        folder: In memory, of this worker alone, and the same one for whoever takes its place.
        run_id: Other runs' copies are not looked at.
        generation: Of this group; grows from group to group.
    """

    def __init__(self, folder: Path, run_id: str, generation: int) -> None:
        self._folder, self._run_id, self._generation = folder, run_id, generation
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")  # of its own: a thread's calls come in no order with others
        self._task: Future[None] | None = None
        self._number = 0
        self._own: dict[str, Rows] = {}

    @property
    def number(self) -> int:
        """Copies begun."""
        return self._number

    @property
    def own(self) -> dict[str, Rows]:
        """The rows as they were last copied. They stay as they are until the copy after the next."""
        return self._own

    def busy(self) -> bool:
        """Whether the last copy is still on its way to, or from, a neighbour.

        Raises:
            GroupLost: A neighbour is gone.
            DiskFullError: The memory does not hold the neighbour's rows.
        """
        return self._task is not None and not finished(self._task)

    def begin(self, step: int, tensors: dict[str, Rows], extra: dict[str, Any]) -> None:
        """Copies these rows, now, and sends them on in the background.

        To be called on all workers after a step at whose beginning none of them was `busy`. A worker that began while
        another's copy was on its way would overwrite its part of the newest step that is there as a whole.

        Raises:
            DiskFullError: The memory does not hold the rows.
        """
        if self._number == 1:  # copy 0 is complete everywhere: nobody needs the groups before
            for path in self._folder.glob("*"):
                if not path.name.startswith(f"{self._generation}-"):
                    path.unlink()
        layout = [(name, list(rows.shape), num_rows(rows.tensor.shape)) for name, rows in tensors.items()]
        copy = Copy(self._run_id, self._generation, self._number, step, self._rank, self._size, extra, layout)
        path = self._path("own", self._number)
        values = _open_new(path, copy.num_values)
        parts = values[: copy.num_values].split([rows.tensor.numel() for rows in tensors.values()])
        self._own = {
            name: Rows(rows.shape, rows.first, part.view(rows.tensor.shape).copy_(rows.tensor))
            for (name, rows), part in zip(tensors.items(), parts, strict=True)
        }
        self._task = in_background(lambda: self._send(copy, values, path), "forge-buddy")
        self._number += 1

    def wait(self) -> None:
        """Until the last copy is complete. Raises as `busy`."""
        if self._task is not None:
            self._task.result()

    def _send(self, copy: Copy, values: Tensor, path: Path) -> None:
        """On the thread: closes the own copy, sends it to the worker after this one, takes that of the one before."""
        copy = replace(copy, sha256=_digest(values[: copy.num_values]))
        _close_new(path, copy)
        if self._size == 1:
            return
        try:
            label = copy.to_text()
            size = self._swap(torch.tensor([len(label)]), torch.zeros(1, dtype=torch.int64))
            label = self._swap(
                torch.frombuffer(bytearray(label), dtype=torch.uint8), torch.zeros(int(size), dtype=torch.uint8)
            )
            theirs = Copy.from_text(bytes(label.numpy()))
            path = self._path("peer", theirs.number)
            kept = _open_new(path, theirs.num_values)
            for start in range(0, max(copy.num_values, theirs.num_values), _PIECE):
                stop = start + _PIECE
                self._swap(values[start : min(stop, copy.num_values)], kept[start : min(stop, theirs.num_values)])
            _close_new(path, theirs)
        except RuntimeError as error:
            raise GroupLost(f"a neighbour is gone: {error}") from None

    def _swap(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """Sends to the worker after this one, and fills `theirs` from the worker before."""
        work = []
        if mine.numel():
            work.append(dist.isend(mine, (self._rank + 1) % self._size, group=self._group))
        if theirs.numel():
            work.append(dist.irecv(theirs, (self._rank - 1) % self._size, group=self._group))
        for each in work:
            each.wait()
        return theirs

    def _path(self, whose: str, number: int) -> Path:
        return self._folder / f"{self._generation}-{whose}-{number % 2}.rows"


class PeerRows:
    """The rows of a state that lies in pieces with the members of a group. A `RowReader`; every call is collective.

    Args:
        holders: Who hands out which piece, by the rank that wrote it.
        pieces: Those that this worker hands out.
    """

    def __init__(self, group: Group, holders: list[int], pieces: dict[int, tuple[Copy, Tensor]]) -> None:
        self._group, self._holders, self._pieces = group, holders, {}
        for rank, (copy, values) in pieces.items():
            sizes = [rows * prod(shape[1:]) for _, shape, rows in copy.tensors]
            names = [name for name, _, _ in copy.tensors]
            self._pieces[rank] = dict(zip(names, values[: copy.num_values].split(sizes), strict=True))
        # The first one's has tensors without dimensions too.
        first = asdict(pieces[0][0]) if 0 in pieces else None
        told = Copy(**group.gather_json(first)[holders[0]])
        self.step, self.extra = told.step, told.extra
        self._shapes = {name: tuple(shape) for name, shape, _ in told.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by name."""
        return self._shapes

    def rows(self, name: str, rows: range) -> Tensor:
        """These rows of a tensor; each worker says which it wants."""
        shape, size = self._shapes[name], len(self._holders)
        width, written = prod(shape[1:]), [share(num_rows(shape), rank, size) for rank in range(size)]
        bounds = torch.empty(2 * self._group.size, dtype=torch.int64)
        self._group.all_gather(bounds, torch.tensor([rows.start, rows.stop]))
        wanted = [range(start, stop) for start, stop in bounds.view(-1, 2).tolist()]
        parts = [
            [(writer, _common(written[writer], theirs)) for writer, _ in sorted(self._pieces.items())]
            for theirs in wanted
        ]
        sent = [
            self._pieces[writer][name][(part.start - written[writer].start) * width :][: len(part) * width]
            for own in parts
            for writer, part in own
            if part
        ]
        due = [
            [_common(written[writer], rows) for writer, who in enumerate(self._holders) if who == holder]
            for holder in range(self._group.size)
        ]
        received = torch.empty(len(rows) * width)
        self._group.all_to_all(
            received,
            torch.cat(sent) if sent else torch.empty(0),
            [sum(len(part) for part in own) * width for own in due],
            [sum(len(part) for _, part in own) * width for own in parts],
        )
        # By holder and then by writer; wanted is by writer.
        out, start = torch.empty(len(rows) * width), 0
        for part in (part for own in due for part in own):
            out[(part.start - rows.start) * width :][: len(part) * width] = received[start : start + len(part) * width]
            start += len(part) * width
        return out.view(len(rows), *shape[1:]) if shape else out.view(())


def newest(folder: Path, run_id: str, group: Group) -> PeerRows | None:
    """The newest state of a run of which every piece is with some member of a group, and verifies. Collective.

    Args:
        folder: This worker's.
        group: Of processes that see each other's CPU memory: gloo's.
    """
    labels = _labels(folder, run_id)
    while True:
        held = group.gather_json([[copy.generation, copy.number, copy.size, copy.rank] for copy in labels.values()])
        there = {tuple(key) for keys in held for key in keys}
        whole = {key[:3] for key in there if all((*key[:3], rank) in there for rank in range(key[2]))}
        if not whole:
            return None
        key = max(whole)
        chosen = {path: copy for path, copy in labels.items() if (copy.generation, copy.number, copy.size) == key}
        values = {path: _mapped(path, copy.num_values) for path, copy in chosen.items()}
        damaged = {path for path, copy in chosen.items() if _digest(values[path][: copy.num_values]) != copy.sha256}
        for path in damaged:
            say(f"  a copy in memory is passed over: {path.name} of step {chosen[path].step} is damaged")
        pieces = {copy.rank: (copy, values[path]) for path, copy in chosen.items() if path not in damaged}
        told = group.gather_json(sorted(pieces))
        if all(any(rank in ranks for ranks in told) for rank in range(key[2])):
            holders = [next(who for who, ranks in enumerate(told) if rank in ranks) for rank in range(key[2])]
            mine = {rank: piece for rank, piece in pieces.items() if holders[rank] == group.rank}
            return PeerRows(group, holders, mine)
        labels = {path: copy for path, copy in labels.items() if path not in chosen}


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Calls it on a thread of its own, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def finished(future: Future[Any]) -> bool:
    """Whether it is; raises what it raised."""
    if future.done():
        future.result()
    return future.done()


def _labels(folder: Path, run_id: str) -> dict[Path, Copy]:
    """What lies in a folder and is complete."""
    found = {}
    for label in sorted(folder.glob("*.label")):
        copy, path = Copy.from_text(label.read_bytes()), label.with_suffix(".rows")
        if copy and copy.run_id == run_id and path.exists() and path.stat().st_size >= 4 * copy.num_values:
            found[path] = copy
    return found


def _open_new(path: Path, num_values: int) -> Tensor:
    """The file's values, to be written; until `_close_new` the file counts for nothing."""
    path.with_suffix(".label").unlink(missing_ok=True)
    size_bytes = 4 * max(num_values, 1)
    try:
        if path.exists() and path.stat().st_size != size_bytes:
            path.unlink()
        with path.open("ab") as file:  # memory that is not there would be a signal at the first write, and the end
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    except OSError as error:
        raise DiskFullError(
            "no memory for copies of the sharded state",
            got=f"{path}: {error}",
            wanted=f"4 files of {size_bytes:,} bytes",
            do="enlarge /dev/shm, or take more workers",
        ) from None
    return _mapped(path, num_values)


def _close_new(path: Path, copy: Copy) -> None:
    label = path.with_suffix(".label")
    label.with_suffix(".tmp").write_bytes(copy.to_text())
    label.with_suffix(".tmp").replace(label)


def _digest(values: Tensor) -> str:
    sha256 = hashlib.sha256()
    for piece in values.split(_PIECE):
        sha256.update(piece.numpy())
    return sha256.hexdigest()


def _mapped(path: Path, num_values: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=max(num_values, 1), dtype=torch.float32)


def _common(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
