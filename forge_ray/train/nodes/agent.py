"""The agent: what Ray Train starts on a node for each worker. It holds no model; it has a seat, and watches over it.

The compute process lives in the seat's keeper (`seat.py`). An agent that dies, or whose group Ray Train starts again,
disturbs nobody: the next one on the node takes the seat over. Imports no torch.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Any

from forge_ray.errors import ForgeError, LostError
from forge_ray.train.elastic import seat
from forge_ray.train.elastic.lines import Lines, Message
from forge_ray.train.nodes.preemption import Notice, Watch

_WAIT_S = 0.2
_KEEPER_S = 600.0  # where it compiles on a busy node
_DRAIN_S = 120.0


def work(loop_config: dict[str, Any]) -> None:
    """Has a seat until the run is over.

    Args:
        loop_config: `spec` (`RunSpec.to_json`), `coordinator` (the actor), `threads`, `orphan_s`, `preemption`.

    Raises:
        LostError: The keeper does not come up.
    """
    import ray

    context = ray.get_runtime_context()
    spec = loop_config["spec"]
    task = {
        "run_id": spec["run_id"],
        "spec": spec,
        "orphan_s": loop_config["orphan_s"],
        "address": ray.util.get_node_ip_address(),
        "accelerators": {name: list(ids) for name, ids in context.get_accelerator_ids().items()},
    }
    with seat.claim(spec["run_id"], task) as (folder, kept):
        agent = _Agent(folder, loop_config["coordinator"], loop_config["threads"], context.get_node_id())
        watch = Watch(loop_config["preemption"], agent.on_notice).start()
        try:
            agent.run(kept)
        finally:
            watch.close()


class _Agent:
    def __init__(self, folder: Path, coordinator: Any, threads: int, node_id: str) -> None:
        self._folder, self._coordinator, self._threads, self._node_id = folder, coordinator, threads, node_id
        self._keeper: Lines | None = None
        self._log_at = 0

    def run(self, kept: bool) -> None:
        """Until the keeper says that it is over, or the coordinator does."""
        if not kept:
            self._start()
        while True:
            keeper = self._keeper = self._attach()
            introduced = self._introduce(keeper)
            while (messages := self._hear(keeper)) is not None:
                if any(message["kind"] == "over" for message in messages):
                    self._show_log()
                    return
                if not introduced or any(message["kind"] == "unreachable" for message in messages):
                    introduced = self._introduce(keeper)
            keeper.close()
            self._show_log()
            if self._ask("ended"):
                return
            self._start()  # the keeper was killed

    def on_notice(self, notice: Notice) -> None:
        """The node will be taken away: the seat drains, and Ray gives it nothing more."""
        from forge_ray.train.nodes import scaling

        why = f"{notice.kind}: {notice.action}"
        keeper = self._keeper
        if keeper is None or not keeper.send({"kind": "notice", "why": why}):
            raise ConnectionError("no keeper yet")  # the watch tells it again
        deadline_s = notice.deadline_s if notice.deadline_s is not None else time.time() + _DRAIN_S
        scaling.drain(self._node_id, why, max(1.0, deadline_s - time.time()))

    def _start(self) -> None:
        seat.start_keeper(self._folder, self._threads)

    def _attach(self) -> Lines:
        """A connection to the keeper, some seconds after it was started.

        Raises:
            LostError: It ended, or takes too long.
        """
        deadline_s = time.monotonic() + _KEEPER_S
        while time.monotonic() < deadline_s and seat.is_kept(self._folder):
            found = seat.attach(self._folder)
            if found:
                return found
            time.sleep(0.05)
        why = (seat.tail(self._folder).strip() or "it said nothing")[-1000:]
        self._ask("tell", self._folder.name, why)
        raise LostError(
            "a node's compute process does not start",
            got=why,
            do="memory and a full /tmp are the usual causes; Ray starts another agent",
        )

    def _introduce(self, keeper: Lines) -> bool:
        """Tells the keeper where the coordinator is now, if that is known."""
        found = self._ask("address")
        if found:
            address, token = found
            keeper.send({"kind": "attach", "coordinator": address, "token": token})
        return bool(found)

    def _ask(self, method: str, *args: Any) -> Any:
        """What the coordinator answers; none while it is not there."""
        import ray

        try:
            return ray.get(getattr(self._coordinator, method).remote(*args), timeout=_WAIT_S * 50)
        except (ray.exceptions.RayError, ForgeError):
            return None

    def _hear(self, keeper: Lines) -> list[Message] | None:
        self._show_log()
        if not select.select([keeper], [], [], 1.0)[0]:
            return []
        return keeper.receive()

    def _show_log(self) -> None:
        """Passes on what the compute process printed, so that Ray's dashboard shows it."""
        try:
            with (self._folder / seat.LOG).open("rb") as log:
                log.seek(self._log_at)
                text = log.read()
        except OSError:
            return
        self._log_at += len(text)
        if text:
            os.write(1, text)
