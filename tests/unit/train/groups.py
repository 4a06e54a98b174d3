"""Real gloo groups: processes forked from the test's own, which has imported everything.

They meet in a file. A TCPStore's server thread in the parent could hold glibc's resolver lock at the moment of a fork
(each of its connections is looked up in the DNS), and the child would wait for ever.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from forge_ray.train.elastic.group import Group

ADDRESS = "127.0.0.1"
T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """One of the processes; `number` stays the same in whatever groups it is a member of."""

    number: int
    store_path: str
    limit_s: float

    def form(self, generation: int, members: Sequence[int]) -> Group:
        """The group of these processes, which all form it, ranked as listed."""
        store = dist.PrefixStore(str(generation), dist.FileStore(self.store_path, -1))
        store.set_timeout(timedelta(seconds=self.limit_s))
        return Group.form(store, members.index(self.number), len(members), torch.device("cpu"), ADDRESS)


def in_processes(count: int, body: Callable[[Peer], T], limit_s: float = 60.0) -> list[T]:
    """What `body` returns in each of `count` processes; fails with the first traceback, or when the time is over."""
    fork = multiprocessing.get_context("fork")
    ends, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in range(count):
                end, other = fork.Pipe(duplex=False)
                peer = Peer(number, os.path.join(folder, "store"), limit_s)
                process = fork.Process(target=_child, args=(other, body, peer), daemon=True)
                process.start()
                other.close()  # so that the end of the process is the end of the pipe
                ends.append(end)
                processes.append(process)
            return _results(ends, time.monotonic() + limit_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def in_group(size: int, body: Callable[[Group], T], limit_s: float = 60.0) -> list[T]:
    """What `body` returns on each rank of one group."""
    return in_processes(size, lambda peer: body(peer.form(0, range(size))), limit_s)


def _child(end: multiprocessing.connection.Connection, body: Callable[[Peer], Any], peer: Peer) -> None:
    torch.set_num_threads(1)
    answer: tuple[bool, Any]
    try:
        answer = True, body(peer)
    except BaseException:
        answer = False, traceback.format_exc()
    end.send_bytes(pickle.dumps(answer))  # `send` would pass tensors as file descriptors, which end with the process


def _results(ends: Sequence[multiprocessing.connection.Connection], until: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = [end for number, end in enumerate(ends) if number not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, until - time.monotonic()))
        assert ready, f"only processes {sorted(results)} of {len(ends)} ended in time"
        for end in ready:
            fine, results[ends.index(end)] = pickle.loads(end.recv_bytes())
            assert fine, f"process {ends.index(end)} failed:\n{results[ends.index(end)]}"
    return [results[number] for number in range(len(ends))]
