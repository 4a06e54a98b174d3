"""How many agents run, and on which nodes: fresh views of the cluster, the policy, `fit` and `drain`.

Ray Train 2.60's elastic policy reads node data up to 20 s old, counts resources that others hold, looks for new nodes
once a minute, and while it waits for `min_workers` it spins and hears no Ctrl-C. Here a node counts that is alive and
not draining, with what is free on it now, and before an agent is placed there its raylet has to answer.

What an agent does is not here (`agent.py`), nor how one is placed (`placement.py`). No module imported here loads
torch: an agent is to start in about a CPU second.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster_state
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupState

from forge_ray.errors import TrainError
from forge_ray.train.nodes.placement import AgentTrainer, Placement

logger = logging.getLogger("ray.train")

_SETTLE_S = 2.0  # nodes that come within this time are taken in together
_GROW_EVERY_S = 10.0
_PROBE_S = 2.0


def fit(
    agent: Callable[[dict[str, Any]], None],
    loop_config: dict[str, Any],
    *,
    name: str,
    folder: str,
    workers: tuple[int, int],
    resources: Mapping[str, float],
    max_failures: int,
) -> None:
    """Keeps between `workers[0]` and `workers[1]` agents running until all of them have returned.

    Each agent calls `agent(loop_config)` in a process of its own. One that dies or raises is started again on its node
    and counts as a failure; the others are left alone, and nothing tells them. `ray.train.report` is not for agents: it
    waits for all of them, and their number changes. `agent` must be importable, and neither its module nor anything in
    `loop_config` should load torch.

    Args:
        name: The run's, on Ray's dashboard.
        folder: Where Ray Train keeps its own notes; nothing in it is needed again.
        workers: The smallest number of agents to start with, and the largest. Fewer than the smallest go on
            while the rest is waited for.
        resources: What Ray reserves for an agent, such as CPU and GPU.
        max_failures: Failures survived before the run ends; -1 for no limit. A node that is drained is none.

    Raises:
        ray.train.TrainingFailedError: More failures than that.
        KeyboardInterrupt: Ctrl-C, after the agents have been ended.

    Cost: About 1 CPU second for each start of an agent, and as much on the driver's node for the run.
    """
    scaling_config = ScalingConfig(
        num_workers=workers, use_gpu=bool(resources.get("GPU")), resources_per_worker=dict(resources)
    )
    AgentTrainer(
        agent,
        policy=AgentScaling(scaling_config),
        train_loop_config=loop_config,
        scaling_config=scaling_config,
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    ).fit()


def drain(node_id: str, reason: str, deadline_s: float) -> None:
    """Tells Ray that a node will be taken away, as `ray drain-node` does: nothing new is placed there, agents leave it.

    The node's raylet ends by itself once nothing of Ray runs there any more. To be called from any process that is
    connected to the cluster.

    Args:
        node_id: Ray's hex id, as `ray.get_runtime_context().get_node_id()` gives it.
        reason: For people, on the dashboard.
        deadline_s: Seconds from now until the node is gone.

    Raises:
        TrainError: Ray refuses.
    """
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = gcs.drain_node(node_id, preempted, reason, int((time.time() + deadline_s) * 1000))
    if not accepted:
        raise TrainError(
            "Ray does not drain the node", got=f"{node_id}: {why}", do="see `ray status` for the node's state"
        )


# ------------------------------------------------------------------------------------------------------------- policy


def usable_nodes() -> dict[str, dict[str, Any]]:
    """The nodes that are alive and not draining, by their id, as `ray.nodes()` describes them."""
    draining = cluster_state.get_draining_nodes()
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining}


def rooms(nodes: Iterable[str], resources: Mapping[str, float]) -> dict[str, int]:
    """For how many more agents resources are free on each node now."""
    free = available_resources_per_node()
    needed = {name: amount for name, amount in resources.items() if amount > 0}
    return {
        node: min(int((free.get(node, {}).get(name, 0.0) + 1e-6) // amount) for name, amount in needed.items())
        for node in nodes
    }


def silent(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Those of the nodes whose raylet does not answer.

    GCS takes up to 15 s to miss a node, and an agent placed there would be waited for as long.
    """
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return {node["NodeID"] for node, ok in zip(nodes, pool.map(_raylet_answers, nodes), strict=True) if not ok}


def _raylet_answers(node: Mapping[str, Any]) -> bool:
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=_PROBE_S)
        except grpc.RpcError as error:  # any answer will do
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return True


def seats(rooms: Mapping[str, int], held: Mapping[str, int], most: int) -> dict[str, int]:
    """How many agents each node is to have: those that it has, then as many more as fit, the roomiest nodes first.

    Args:
        rooms: What is free on the usable nodes.
        held: How many agents each node has now, usable or not.
        most: The number of agents wanted in all.
    """
    plan = {node_id: held[node_id] for node_id in rooms if held.get(node_id)}
    left = most - sum(plan.values())
    for node_id in sorted(rooms, key=lambda node_id: (-rooms[node_id], node_id)):
        more = min(rooms[node_id], left)
        if more > 0:
            plan[node_id] = plan.get(node_id, 0) + more
            left -= more
    return plan


class AgentScaling(ScalingPolicy):
    """Where agents should run, decided anew with each poll.

    It asks the autoscaler for `max_workers`, as the stock policy does, so that a cluster that can grow does.
    """

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._resources = scaling_config._resources_per_worker_not_none
        self._held: dict[str, int] = {}
        self._held_since_s = float("-inf")
        self._room_since_s: float | None = None

    def hold(self, node_ids: Sequence[str]) -> None:
        """Takes note of where agents run now."""
        self._held, self._held_since_s, self._room_since_s = dict(collections.Counter(node_ids)), time.monotonic(), None

    def make_decision_for_non_running_worker_group(self) -> NoopDecision | Placement:
        """At the start, and after a failure: whatever can run now, at once, unless that is too little."""
        plan = self._plan(doubt_all=True)
        if plan is None or sum(plan.values()) < self.scaling_config.min_workers:
            return NoopDecision()
        return self._placement(plan)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: Any
    ) -> NoopDecision | Placement:
        """Leaves a node that goes at once; takes new ones together, and not too often."""
        plan = self._plan(doubt_all=False)
        if plan is None or plan == self._held or not plan:
            self._room_since_s = None
            return NoopDecision()
        if all(node_id in plan for node_id in self._held) and not self._may_grow():
            return NoopDecision()
        return self._placement(plan)

    def _may_grow(self) -> bool:
        now_s = time.monotonic()
        self._room_since_s = self._room_since_s or now_s
        return now_s - self._room_since_s >= _SETTLE_S and now_s - self._held_since_s >= _GROW_EVERY_S

    def _plan(self, doubt_all: bool) -> dict[str, int] | None:
        """Where agents should run; none if the cluster does not say, which is no reason to end the run.

        Args:
            doubt_all: Whether nodes whose agents are to stay have to answer too.
        """
        self._maybe_send_resource_request()
        try:
            nodes = usable_nodes()
            room = rooms(nodes, self._resources)
            while True:
                plan = seats(room, self._held, self.scaling_config.max_workers)
                doubted = [nodes[node] for node in plan if doubt_all or plan[node] > self._held.get(node, 0)]
                lost = silent(doubted)
                if not lost:
                    return plan
                kept = {} if doubt_all else self._held
                room = {node: 0 if node in lost else room[node] for node in room if node not in lost or node in kept}
        except Exception:
            logger.warning("no view of the cluster; agents stay where they are", exc_info=True)
            return None

    def _placement(self, plan: dict[str, int]) -> Placement:
        now, then = ({node_id[:8]: number for node_id, number in seats.items()} for seats in (self._held, plan))
        logger.info("agents per node: %s -> %s", now, then)
        return Placement(sum(plan.values()), self._resources, plan)

    def _get_num_workers_for_resource_request(self) -> int:
        return self.scaling_config.max_workers
