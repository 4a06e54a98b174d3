"""The processes that compute a step together, and how one of them finds out that another is gone.

A group is formed anew in milliseconds whenever its members change; nothing global is set up, so that an old group, with
a call still stuck in it, can be left behind. Owns forming, the collective calls and their interruption. Who is a
member is the coordinator's business.

No test executes without a GPU: NCCL in `_connect` and in `_run`, which asks whether the GPU is done: NCCL's future is
done when the call is queued, and a CPU that waits for the GPU cannot be interrupted.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

# A call that waits for a peer which the network has lost without a word; the coordinator finds out long before.
_TIMEOUT = timedelta(minutes=30)
_POLL_S, _POLL_GPU_S = 0.1, 0.0005
_CONNECT_S = 2.0


class GroupLost(Exception):
    """A member of the group is gone, or another group takes its place: nothing more can be computed in this one."""


class Group:
    """Members of one generation, by rank.

    Every call is collective: all members make the same calls in the same order. All raise `GroupLost`.

    Args:
        process_group: gloo's or NCCL's; none for a group of one.
        rank: This process.
        size: Members.
        device: Where tensors live that are sent.
        interrupted: Asked ten times a second while waiting: whether this group is to be left behind.
    """

    def __init__(
        self, process_group: Any, rank: int, size: int, device: torch.device, interrupted: Callable[[], bool]
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._process_group, self._interrupted = process_group, interrupted
        self._changed = threading.Event()

    @staticmethod
    def alone(device: torch.device | None = None) -> Group:
        """A group of this process only."""
        return Group(None, 0, 1, device or torch.device("cpu"), lambda: False)

    @staticmethod
    def form(
        store: Any,
        rank: int,
        size: int,
        device: torch.device,
        address: str,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Group:
        """Meets the other members, who do the same.

        Args:
            store: A torch store of their own, the same for all members.
            address: Of this machine, for the others.

        Raises:
            GroupLost: It was interrupted, or a member is gone before all have met.
        """
        if size == 1:
            return Group(None, rank, size, device, interrupted)
        group = Group(None, rank, size, device, interrupted)
        made: list[Any] = []
        failed: list[Exception] = []

        def connect() -> None:
            try:
                made.append(_connect(store, rank, size, device, address))
            except Exception as error:  # torch raises RuntimeError and its children
                failed.append(error)
            group._changed.set()

        threading.Thread(target=connect, name="forge-connect", daemon=True).start()
        group._wait(lambda: bool(made or failed))
        if failed:
            raise GroupLost(f"the group could not form: {failed[0]}") from None
        group._process_group = made[0]
        return group

    def wake(self) -> None:
        """Makes a call that waits look whether it is interrupted. From any thread."""
        self._changed.set()

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums over the members, in place, in the order that the library likes best."""
        if self.size > 1:
            self._run(lambda group: group.allreduce([tensor]))

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        """Puts everybody's `mine` one after the other. Shapes: out (size * N,), mine (N,)."""
        if self.size > 1:
            self._run(lambda group: group._allgather_base(out, mine, AllgatherOptions()))
        else:
            out.copy_(mine)

    def all_to_all(self, out: Tensor, mine: Tensor, out_counts: Sequence[int], in_counts: Sequence[int]) -> None:
        """Sends `in_counts[r]` elements of `mine` to each rank r and gets `out_counts[r]` from it. Flat tensors."""
        if self.size > 1:
            counts = list(out_counts), list(in_counts)
            self._run(lambda group: group.alltoall_base(out, mine, *counts, AllToAllOptions()))
        else:
            out.copy_(mine)

    def gather_json(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = torch.empty(self.size, dtype=torch.int64, device=self.device)
        self.all_gather(sizes, torch.tensor([len(content)], device=self.device))
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(content)] = content
        out = torch.empty(self.size * longest, dtype=torch.uint8, device=self.device)
        self.all_gather(out, padded)
        rows = out.view(self.size, longest).cpu()
        return [json.loads(bytes(row[:size].numpy())) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def leave(self) -> None:
        """Lets go of the connections. Members with a call in flight hear of it from the coordinator."""
        group, self._process_group = self._process_group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()  # of NCCL; gloo has none

    def _run(self, call: Callable[[Any], Any]) -> None:
        if self._process_group is None:
            raise GroupLost("the group has been left")
        try:
            work = call(self._process_group)
            # Not `is_completed` of the work: gloo tells the future first.
            future, changed = work.get_future(), self._changed
            future.add_done_callback(lambda _: changed.set())
            try:
                if self.device.type == "cuda":
                    self._wait(work.is_completed, _POLL_GPU_S)
                else:
                    self._wait(future.done)
            except GroupLost:
                threading.Thread(
                    target=_bury, args=(self._process_group, future), name="forge-bury", daemon=True
                ).start()
                raise
            work.wait()
        except RuntimeError as error:
            raise GroupLost(str(error).split("\n")[0]) from None

    def _wait(self, done: Callable[[], bool], poll_s: float = _POLL_S) -> None:
        while not done():
            if self._interrupted():
                raise GroupLost("another group takes its place")
            self._changed.wait(poll_s)
            self._changed.clear()


def _bury(process_group: Any, future: Any) -> None:
    """Keeps a group that was left with a call in flight until the call has failed, and lets go of it then.

    To destroy it earlier waits for the call, or, from gloo's own thread, aborts the process. To keep it for ever costs
    half a core: after a failed call gloo's thread goes on asking when it may send the rest to the peers that live
    (`Pair::write` of gloo in April 2026: the buffer is gone, the interest in EPOLLOUT stays).
    """
    with contextlib.suppress(RuntimeError):
        future.wait()
    del process_group


def store_server(address: str) -> tuple[Any, str]:
    """A store at which members meet, and `host:port`; each process offers one, and rank 0's is used."""
    store = dist.TCPStore(address, 0, None, is_master=True, wait_for_workers=False)
    return store, f"{address}:{store.port}"


def store_client(at: str, generation: int, timeout_s: float, interrupted: Callable[[], bool] = lambda: False) -> Any:
    """The store of a generation, at the member who offers it.

    Args:
        at: `host:port`.
        timeout_s: For an answer from its host, and for each value that is asked of the store.

    Raises:
        GroupLost: It was interrupted, or nobody answers there.
    """
    host, _, port = at.rpartition(":")
    _knock(host, int(port), timeout_s, interrupted)
    try:
        store = dist.TCPStore(
            host, int(port), None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_CONNECT_S)
        )
    except RuntimeError as error:
        raise GroupLost(f"no store at {at}: {error}") from None
    store.set_timeout(timedelta(seconds=timeout_s))
    return dist.PrefixStore(str(generation), store)


def _knock(host: str, port: int, timeout_s: float, interrupted: Callable[[], bool]) -> None:
    """Returns when a port is open. torch's store goes on trying one that is closed for 1.5 times its time (2.13)."""
    until_s = time.monotonic() + timeout_s
    while not interrupted():
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S / 2).close()
            return
        except TimeoutError:
            if time.monotonic() > until_s:
                raise GroupLost(f"no answer from {host} within {timeout_s:g} s") from None
        except OSError as error:  # refused: whoever offers a store has it before it is named
            raise GroupLost(f"no store at {host}:{port}: {error}") from None
    raise GroupLost("another group takes its place")


def _connect(store: Any, rank: int, size: int, device: torch.device, address: str) -> Any:
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = _TIMEOUT
    return dist.ProcessGroupGloo(store, rank, size, options)
