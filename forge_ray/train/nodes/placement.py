"""Ray Train with agents that come and go one by one: the group, the controller and the trainer.

Ray Train 2.60 starts all workers again when one node comes or goes; its in-place replacement (replica groups) knows
neither elastic sizes nor a limit to its patience where the dead worker's node is gone. Here each agent has a placement
group of its own, pinned to its node, so that none waits for another's node, and a dead agent's place stays reserved
until its successor has it. A dead agent is replaced, a lost or draining node left and a new one filled without touching
the others. Who should run where is the policy's to say (`scaling.py`).

What this uses of Ray beyond its public interface is held by `tests/contract/test_ray_private.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.train import BackendConfig
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks import DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
from ray.train.v2._internal.execution.context import DistributedContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import RunningState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import (
    ReplicaGroup,
    Worker,
    WorkerGroup,
    WorkerGroupContext,
    WorkerGroupState,
)
from ray.train.v2._internal.util import bundle_to_remote_args, invoke_context_managers, time_monotonic
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

logger = logging.getLogger("ray.train")

POLL_S = 1.0
_PLACE_S = 10.0
_START_S = 60.0
_ABORT_S = 20.0

# How the controller polls: agents every second, and one whose process answers nothing for half a minute is dead (Ray's
# own values: 2 s, and 10 minutes).
CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",
}


@dataclasses.dataclass
class Placement(ResizeDecision):
    """A resize decision that says on which nodes."""

    seats: dict[str, int]


# -------------------------------------------------------------------------------------------------------------- group


class Reservations(dict[Any, PlacementGroup]):
    """The placement group of each agent, by its actor; it stands where Ray Train keeps the one of a worker group."""

    def shutdown(self) -> None:
        """Gives all of them back."""
        for reservation in self.values():
            remove_placement_group(reservation)
        self.clear()


class AgentGroup(WorkerGroup):
    """A worker group whose workers are let go, replaced and taken in one by one."""

    def _start_impl(self, worker_group_state_builder: Any) -> None:
        """An empty group; `arrange` fills it."""
        self._assert_inactive()
        for callback in self._callbacks:
            callback.before_worker_group_start(self._worker_group_context)
        here = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        sync_actor = SynchronizationActor.options(label_selector=here).remote()
        self._worker_group_state = WorkerGroupState(time_monotonic(), Reservations(), [], sync_actor)
        self._replica_groups = []

    def arrange(self, plan: Mapping[str, int]) -> None:
        """Gives each node its number of agents; those that live on a node of the plan are not touched.

        An agent that does not come up is left out, and one that dies meanwhile is found by the next poll.

        Raises:
            WorkerGroupStartupTimeoutError: No agent is left.
            RayTaskError: What an agent is to run cannot be loaded.
        """
        with invoke_context_managers([callback.on_worker_group_start for callback in self._callbacks]):
            stay, places = self._part(plan)
            joined = self._launch(places)
            self._settle(stay, joined)
            with _deaths_left_to_the_next_poll():
                self._init_train_context(joined, self._worker_group_state.sync_actor)
            if not self.get_workers():
                raise WorkerGroupStartupTimeoutError(sum(plan.values()))
            for callback in self._callbacks:  # they take stock of the workers: queues of reports, the dashboard's list
                with _deaths_left_to_the_next_poll():
                    callback.after_worker_group_start(self)
            with _deaths_left_to_the_next_poll():
                train_fn = self._worker_group_context.train_fn_ref
                ray.get([worker.actor.run_train_fn.remote(train_fn) for worker in joined], timeout=_START_S)

    def execute_single(self, rank: int, fn: Callable[..., Any], *fn_args: Any, **fn_kwargs: Any) -> Any:
        """Asks one agent, which may have been stopped meanwhile: its answer is not waited for without limit."""
        return ray.get(self.execute_single_async(rank, fn, *fn_args, **fn_kwargs), timeout=_START_S)

    def _part(self, plan: Mapping[str, int]) -> tuple[list[Worker], list[PlacementGroup]]:
        """Lets go whom the plan does not keep; returns who stays, and the places to fill."""
        failed = self._latest_poll_status.errors if self._latest_poll_status else {}
        reservations = self._worker_group_state.placement_group_handle
        room, stay, places = dict(plan), [], []
        for index, worker in enumerate(self.get_workers()):
            node_id = worker.metadata.node_id
            wanted = room.get(node_id, 0) > 0
            if wanted:
                room[node_id] -= 1
            if wanted and index not in failed:
                stay.append(worker)
                continue
            ray.kill(worker.actor)
            reservation = reservations.pop(worker.actor)
            if wanted:
                places.append(reservation)
            else:
                remove_placement_group(reservation)
        return stay, places + [self._reserve(node_id) for node_id, number in room.items() for _ in range(number)]

    def _reserve(self, node_id: str) -> PlacementGroup:
        name = f"{self._train_run_context.run_id}-{uuid.uuid4().hex}"
        return placement_group(
            [self.get_resources_per_worker()], name=name, bundle_label_selector=[{RAY_NODE_ID_KEY: node_id}]
        )

    def _launch(self, places: Sequence[PlacementGroup]) -> list[Worker]:
        """Starts an agent's process in each place, all at once; gives up places where none comes up."""
        resources, reservations = self.get_resources_per_worker(), self._worker_group_state.placement_group_handle
        runtime_env = self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)
        worker_class = ray.remote(runtime_env=runtime_env, **bundle_to_remote_args(resources))(self._worker_cls)
        deadline_s = time.monotonic() + _PLACE_S
        starting = {}
        for place in places:
            if place.wait(max(deadline_s - time.monotonic(), 0.0)):
                actor = worker_class.options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=0)
                ).remote()
                reservations[actor] = place
                starting[actor.get_metadata.remote()] = actor
            else:
                remove_placement_group(place)
        up, _ = ray.wait(list(starting), num_returns=len(starting), timeout=_START_S) if starting else ([], [])
        workers = []
        for answer, actor in starting.items():
            with _deaths_left_to_the_next_poll():
                if answer in up:
                    workers.append(Worker(actor, ray.get(answer), resources, placement_group_bundle_index=0))
                    continue
            ray.kill(actor)
            remove_placement_group(reservations.pop(actor))
        return workers

    def _settle(self, stay: Sequence[Worker], joined: Sequence[Worker]) -> None:
        """Makes them the group. Who stays keeps its rank; a newcomer gets the lowest that is free."""
        taken = {worker.distributed_context.world_rank for worker in stay}
        free = (rank for rank in itertools.count() if rank not in taken)
        for worker, rank in zip(joined, free, strict=False):
            worker.distributed_context = DistributedContext(rank, len(stay) + len(joined), 0, 1, 0)
        workers = sorted([*stay, *joined], key=lambda worker: worker.distributed_context.world_rank)
        polled = {self.get_workers()[index].actor: task for index, task in self._world_rank_to_ongoing_poll.items()}
        self._worker_group_state = dataclasses.replace(self._worker_group_state, workers=workers)
        self._world_rank_to_ongoing_poll = {
            index: polled[worker.actor] for index, worker in enumerate(workers) if worker.actor in polled
        }
        self._worker_rank_to_replica_group_rank = {index: index for index in range(len(workers))}
        self._replica_groups = [
            ReplicaGroup([worker], self.get_resources_per_worker(), self._replica_group_callbacks) for worker in workers
        ]
        self._latest_poll_status = None


@contextlib.contextmanager
def _deaths_left_to_the_next_poll() -> Iterator[None]:
    """An error of the agent's own code, such as a module that is not there, is no death: it would only come again."""
    try:
        yield
    except RayTaskError:
        raise
    except RayError:
        logger.warning("an agent died while the group was arranged", exc_info=True)


# --------------------------------------------------------------------------------------------------------- controller


class AgentController(TrainController):
    """Ray Train's control loop, except that a resize arranges the group in place, and that waiting is waiting."""

    worker_group_cls = AgentGroup

    async def _run_control_loop_iteration(self) -> None:
        """One turn; where it changed nothing, the loop would turn without a pause, and `abort` would never be heard."""
        state = self.get_state()
        await super()._run_control_loop_iteration()
        if self.get_state() is state:
            await asyncio.sleep(POLL_S)
            if self.get_state().is_terminal():
                ray.actor.exit_actor()

    def _execute_resize_decision(self, decision: Placement) -> TrainControllerLoopIterationResult:
        failure = self._run_controller_hook("before_controller_execute_resize_decision", decision)
        if failure:
            return failure
        if self._worker_group is None:
            self._worker_group = self.worker_group_cls.create(
                train_run_context=self._train_run_context,
                worker_group_context=WorkerGroupContext(
                    run_attempt_id=self._get_run_attempt_id(),
                    train_fn_ref=self._train_fn_ref,
                    num_workers=decision.num_workers,
                    resources_per_worker=decision.resources_per_worker,
                ),
                callbacks=self._worker_group_callbacks_to_propagate,
            )
        try:
            self._worker_group.arrange(decision.seats)
        except Exception:
            self._shutdown_worker_group()
            self._scaling_policy.hold([])
            raise
        self._scaling_policy.hold([worker.metadata.node_id for worker in self._worker_group.get_workers()])
        return TrainControllerLoopIterationResult(
            run_attempt_id=self._get_run_attempt_id(), previous_state=self._state, next_state=RunningState()
        )


class _NoBackend(Backend):
    """Agents are replaced one by one, so Ray Train is told that each is a replica group."""

    has_replica_groups = True


class AgentConfig(BackendConfig):
    """No communication between agents, and no torch in them."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train makes in the controller."""
        return _NoBackend


class AgentTrainer(DataParallelTrainer):
    """Ray Train's trainer with our controller, and a policy that decides by `Placement` and is told by `hold`."""

    def __init__(self, agent: Callable[[dict[str, Any]], None], *, policy: ScalingPolicy, **options: Any) -> None:
        super().__init__(agent, backend_config=AgentConfig(), **options)
        self._policy = policy

    def _create_default_callbacks(self) -> list[Any]:
        """Without those that wait for all workers, which agents need not, and the keeper of the one placement group."""
        unused = DatasetsCallback, PlacementGroupCleanerCallback, WorkingDirectorySetupCallback
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = self._policy
        environment = CONTROLLER_ENVIRONMENT | get_env_vars_to_propagate() | {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
        controller = (
            ray.remote(AgentController)
            .options(
                num_cpus=0,
                label_selector={RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
                runtime_env={"env_vars": environment},
            )
            .remote(**options)
        )
        try:
            with _ending_on_ctrl_c(controller):
                ray.get(controller.run.remote())
                return ray.get(controller.get_result.remote())
        except (RayActorError, KeyboardInterrupt):
            _remove_reservations(self.train_run_context.run_id)
            raise


@contextlib.contextmanager
def _ending_on_ctrl_c(controller: Any) -> Iterator[None]:
    """Turns Ctrl-C into the run's end in good order and then into a `KeyboardInterrupt`; a second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(controller.abort.remote(), timeout=_ABORT_S)
        ray.kill(controller)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _remove_reservations(run_id: str) -> None:
    """What a controller that ended badly has left; Ray would keep it until the driver ends."""
    for row in ray.util.placement_group_table().values():
        if row["name"].startswith(run_id) and row["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # gone meanwhile
                remove_placement_group(ray.util.get_placement_group(row["name"]))
