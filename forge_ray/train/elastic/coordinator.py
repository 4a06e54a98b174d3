"""The coordinator: an actor to which all seats of a run are connected, and from which the driver hears how it goes.

Owns the connections; who trains with whom is `membership.py`. It may die with its node at any time: training goes on,
Ray starts it again, agents tell their keepers where, and it learns from them what it must know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from typing import Any

from forge_ray.errors import ForgeError, TrainError
from forge_ray.events import Events
from forge_ray.storage import Storage
from forge_ray.train import goodput
from forge_ray.train.elastic.lines import LIMIT_BYTES, Message
from forge_ray.train.elastic.membership import Membership, snapshot
from forge_ray.train.goodput import Ledger

_TICK_S = 0.5
_FLUSH_S = 2.0
_HELLO_S = 10.0
_DEATHS_WITHOUT_PROGRESS = 10  # or three of each seat: a node that hangs may take all of a large group with it
_LOSSES_WITHOUT_PROGRESS = 20  # of each seat: ends with a group that broke
_STOP_S = 20.0
LOST_EXIT = 71  # a sharded worker ends with its group: no fault of its own


class Coordinator:
    """The actor. Its methods run in one event loop, so nothing is locked.

    Args:
        run_id, workspace_uri: Where its records go.
        limits: What `Membership` takes.
        usd_per_node_hour: For the ledger.
    """

    def __init__(self, run_id: str, workspace_uri: str, limits: dict[str, Any], usd_per_node_hour: float = 0.0) -> None:
        self._ledger = Ledger(usd_per_node_hour)
        self._membership = Membership(**limits)
        self._run_id, self._storage = run_id, Storage(workspace_uri)
        self._events = Events(self._storage, run_id)
        self._gauges: dict[str, Any] = {}
        self._token = secrets.token_hex(16)
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._news: list[Message] = []
        self._error: ForgeError | None = None
        self._deaths: list[str] = []
        self._losses = 0
        self._stopping = False
        self._address = ""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def address(self, host: str = "") -> tuple[str, str]:
        """Where seats connect, `host:port`, and the token that they must bring; opens the door at the first call.

        Args:
            host: Address of this node; Ray's, if it is not given.
        """
        if not self._server:
            if not host:
                import ray

                host = ray.util.get_node_ip_address()
            self._server = await asyncio.start_server(self._serve, host, 0, limit=LIMIT_BYTES)
            self._address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
            await asyncio.to_thread(self._look_back)
            for work in (self._tick(), self._flush()):
                task = asyncio.get_running_loop().create_task(work)
                self._tasks.add(task)
        return self._address, self._token

    async def news(self) -> tuple[list[Message], ForgeError | None, str]:
        """Events since the last call, the error that ends the run, if there is one, and a line on how the run does."""
        news, self._news = self._news, []
        return news, self._error, goodput.line(self._ledger.account())

    async def state(self) -> dict[str, Any]:
        """Generation, members and seats."""
        return snapshot(self._membership)

    async def tell(self, seat: str, why: str) -> None:
        """An agent's keeper did not come up."""
        self._record({"event": "seat", "seat": seat, "host": "", "what": "failed to start", "why": why})
        self._count_death(f"{seat}: it does not start", why)

    async def ended(self) -> bool:
        """Whether agents have nothing more to do."""
        return self._membership.done or self._error is not None or self._stopping

    async def stop(self) -> None:
        """Ends all compute processes at their next boundary, and waits until their keepers are gone."""
        if not self._membership.done:
            self._record({"event": "stop"})
        self._stopping = True
        for name in list(self._writers):
            self._send(name, {"kind": "stop"})
        deadline_s = time.monotonic() + _STOP_S
        while self._writers and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        await self._publish()

    # ------------------------------------------------------------------------------------------------------------ seats

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = ""
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), _HELLO_S))
            if not secrets.compare_digest(str(hello.get("token")), self._token):
                return
            name = str(hello["seat"])
            self._writers[name] = writer
            self._membership.hello(name, hello["pid"], time.monotonic())
            if self._stopping or self._error:
                self._send(name, {"kind": "stop"})
            while line := await reader.readline():
                self._hear(name, json.loads(line))
                self._speak()
        except (OSError, ValueError, KeyError, TypeError, TimeoutError):
            pass  # not one of ours, or broken off: the end of the connection says it all
        finally:
            if name and self._writers.get(name) is writer:
                del self._writers[name]
                self._membership.gone(name, time.monotonic())
                self._speak()
            writer.close()

    def _hear(self, name: str, message: Message) -> None:
        now_s, kind = time.monotonic(), message["kind"]
        if kind == "status":
            self._membership.status(name, message, now_s)
            if message["state"] == "failed":
                self._fail(ForgeError.from_dict(message["error"]))
        elif kind == "beat":
            self._membership.beat(name, message, now_s)
        elif kind == "event":
            if message["record"]["event"] == "step":
                self._deaths, self._losses = [], 0
            self._keep(message["record"])
        elif kind == "died":
            ordered = self._membership.is_replaced(name)
            self._membership.died(name, message["pid"], message["why"], now_s)
            self._losses += message["code"] == LOST_EXIT
            if self._losses >= _LOSSES_WITHOUT_PROGRESS * max(1, len(self._writers)):
                self._give_up(self._losses, f"{name}: its group broke again", message["tail"])
            elif message["code"] not in (0, LOST_EXIT) and not ordered and not self._membership.done:
                self._count_death(f"{name}: {message['why']}", message["tail"])
        elif kind == "stacks":
            record = {"event": "seat", "seat": name, "host": name.partition("/")[0]}
            self._record({**record, "what": "stacks", "why": message["stacks"]})
        elif kind == "notice":
            self._membership.drain(name, now_s, message["why"])

    def _count_death(self, what: str, tail: str) -> None:
        self._deaths.append(what)
        if len(self._deaths) >= max(_DEATHS_WITHOUT_PROGRESS, 3 * len(self._writers)):
            self._give_up(len(self._deaths), what, tail)

    def _give_up(self, deaths: int, what: str, tail: str) -> None:
        last = tail.strip().splitlines()[-1:] or [what]
        self._fail(
            TrainError(
                "the workers die again and again without a step between",
                got=f"{deaths} deaths, the last of {what}: {last[0][:500]}",
                do="memory is the usual cause of SIGKILL: lower pretrain.micro_batch; the workers' logs are on "
                "Ray's dashboard",
            )
        )

    def _fail(self, error: ForgeError) -> None:
        self._error = self._error or error
        for name in list(self._writers):
            self._send(name, {"kind": "stop"})

    def _speak(self) -> None:
        out, news = self._membership.take()
        for record in news:
            self._record(record)
        for name, message in out:
            self._send(name, message)

    def _send(self, name: str, message: Message) -> None:
        writer = self._writers.get(name)
        if writer:
            writer.write(json.dumps(message).encode() + b"\n")

    def _record(self, record: Message) -> None:
        self._events.add(**{"kind" if key == "event" else key: value for key, value in record.items()})
        self._keep({**record, "time_s": round(time.time(), 3)})

    def _keep(self, record: Message) -> None:
        self._news.append(record)
        self._ledger.add(record)

    def _look_back(self) -> None:
        """Takes what was recorded of the run before into the ledger."""
        with contextlib.suppress(ForgeError):
            for record in Events.read(self._storage, self._run_id):
                self._ledger.add(record)

    def _publish_metrics(self) -> None:
        """Into Ray's metrics, where this is an actor."""
        if "ray" not in sys.modules:
            return
        from ray.util.metrics import Gauge

        for name, value in goodput.metrics(self._ledger.account()).items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run_id})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._membership.tick(time.monotonic())
            self._speak()
            for name in set(self._writers) - set(self._membership.seats):
                self._writers[name].close()  # dropped: its keeper hangs too

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self._publish()
            self._publish_metrics()

    async def _publish(self) -> None:
        with contextlib.suppress(ForgeError):  # the store is away: the records are kept and published later
            await asyncio.to_thread(self._events.flush)
