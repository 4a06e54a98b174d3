"""What we use of Ray beyond its public interface, each piece with where and what for: an upgrade says what breaks.

Ray is pinned to one minor version (pyproject.toml). On an upgrade this file fails first; the message names the module
of ours to look at. The semantics that need a cluster are in `tests/integration/test_scaling.py`.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import functools
import importlib
import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXECUTION = "ray.train.v2._internal.execution"
PLACEMENT, SCALING = "train/nodes/placement.py", "train/nodes/scaling.py"
ENGINE, REPLICA = "serve/engine.py", "serve/replica.py"
CHECKS, LAUNCHER = "cluster/checks.py", "cluster/launcher.py"


@dataclass(frozen=True)
class Use:
    """A private name of Ray's that a module of ours imports."""

    module: str
    name: str
    used_in: str
    what_for: str
    parameters: str = ""  # those that we pass by name or position, in order
    attributes: str = ""  # of its instances, which we read, set, call or override

    def __str__(self) -> str:
        return f"{self.module}.{self.name}, used in forge_ray/{self.used_in} to {self.what_for}"


USES = [
    Use("ray._private.grpc_utils", "init_grpc_channel", SCALING, "ask a raylet whether it lives", "address"),
    Use("ray._private.state", "available_resources_per_node", SCALING, "see what is free on each node"),
    Use("ray._private.state", "state", SCALING, "see which nodes drain", attributes="get_draining_nodes"),
    Use("ray._raylet", "GcsClient", SCALING, "drain a node"),  # its methods are found at run time: below
    Use("ray.core.generated.autoscaler_pb2", "DrainNodeReason", SCALING, "say why a node drains", attributes="Value"),
    Use(f"{EXECUTION}.scaling_policy", "NoopDecision", SCALING, "decide that nothing changes"),
    Use(
        f"{EXECUTION}.scaling_policy",
        "ScalingPolicy",
        SCALING,
        "decide how many agents run where",
        "self, scaling_config",
        "make_decision_for_non_running_worker_group make_decision_for_running_worker_group scaling_config "
        "_get_num_workers_for_resource_request _maybe_send_resource_request",
    ),
    Use(f"{EXECUTION}.worker_group", "WorkerGroupState", SCALING, "annotate what the policy is shown"),
    Use("ray._raylet", "RAY_NODE_ID_KEY", PLACEMENT, "pin an agent to its node"),
    Use("ray.train.v2._internal.callbacks", "DatasetsCallback", PLACEMENT, "leave it out: it waits for all workers"),
    Use(
        "ray.train.v2._internal.callbacks",
        "WorkingDirectorySetupCallback",
        PLACEMENT,
        "leave it out: it waits for all workers",
    ),
    Use(
        "ray.train.v2._internal.callbacks.placement_group_callback",
        "PlacementGroupCleanerCallback",
        PLACEMENT,
        "leave it out: it knows one placement group only",
    ),
    Use("ray.train.v2._internal.constants", "get_env_vars_to_propagate", PLACEMENT, "hand settings to the controller"),
    Use(
        "ray.train.v2._internal.exceptions",
        "WorkerGroupStartupTimeoutError",
        PLACEMENT,
        "have the controller try again when no agent came up",
        "self, num_workers",
    ),
    Use(
        f"{EXECUTION}.checkpoint.sync_actor",
        "SynchronizationActor",
        PLACEMENT,
        "give agents the barrier that their context must have",
        attributes="options",
    ),
    Use(
        f"{EXECUTION}.context",
        "DistributedContext",
        PLACEMENT,
        "give an agent its rank",
        "self, world_rank, world_size, local_rank, local_world_size, node_rank",
    ),
    Use(
        f"{EXECUTION}.controller",
        "TrainController",
        PLACEMENT,
        "arrange the group in place of starting it again, and wait without spinning",
        "self, train_fn_ref, train_run_context, scaling_policy, failure_policy, callbacks, validation_config",
        "worker_group_cls _run_control_loop_iteration _execute_resize_decision _run_controller_hook get_state "
        "_get_run_attempt_id _shutdown_worker_group _worker_group _scaling_policy _train_run_context _train_fn_ref "
        "_worker_group_callbacks_to_propagate _state run abort get_result",
    ),
    Use(
        f"{EXECUTION}.controller.controller",
        "TrainControllerLoopIterationResult",
        PLACEMENT,
        "tell the controller that the group runs",
        "self, run_attempt_id, previous_state, next_state",
    ),
    Use(f"{EXECUTION}.controller.state", "RunningState", PLACEMENT, "tell the controller that the group runs", "self"),
    Use(
        f"{EXECUTION}.scaling_policy",
        "ResizeDecision",
        PLACEMENT,
        "say on which nodes agents go",
        "self, num_workers, resources_per_worker",
    ),
    Use(f"{EXECUTION}.scaling_policy", "ScalingPolicy", PLACEMENT, "annotate the trainer's policy"),
    Use(f"{EXECUTION}.worker_group", "ReplicaGroup", PLACEMENT, "keep the list of replica groups that Ray Train reads"),
    Use(
        f"{EXECUTION}.worker_group",
        "Worker",
        PLACEMENT,
        "describe an agent to the controller",
        "self, actor, metadata, resources, distributed_context, log_file_path, placement_group_bundle_index",
    ),
    Use(
        f"{EXECUTION}.worker_group",
        "WorkerGroup",
        PLACEMENT,
        "take agents in and let them go one by one",
        "self, train_run_context, worker_group_context, callbacks",
        "create shutdown abort get_workers get_resources_per_worker execute_single execute_single_async _start_impl "
        "_assert_inactive _init_train_context _get_worker_runtime_env _worker_cls _callbacks _replica_group_callbacks "
        "_worker_group_context _train_run_context _worker_group_state _replica_groups _latest_poll_status "
        "_world_rank_to_ongoing_poll _worker_rank_to_replica_group_rank",
    ),
    Use(
        f"{EXECUTION}.worker_group",
        "WorkerGroupContext",
        PLACEMENT,
        "start the group",
        "self, run_attempt_id, train_fn_ref, num_workers, resources_per_worker",
    ),
    Use(
        f"{EXECUTION}.worker_group",
        "WorkerGroupState",
        PLACEMENT,
        "hold the agents",
        "self, start_time, placement_group_handle, workers, sync_actor",
    ),
    Use("ray.train.v2._internal.util", "bundle_to_remote_args", PLACEMENT, "start an agent's actor", "bundle"),
    Use("ray.train.v2._internal.util", "invoke_context_managers", PLACEMENT, "time the start for Ray's metrics"),
    Use("ray.train.v2._internal.util", "time_monotonic", PLACEMENT, "give the group its start time"),
    Use("ray.llm._internal.serve.core.configs.openai_api_models", "ModelCard", ENGINE, "list the model"),
    Use("ray.llm._internal.serve.core.configs.openai_api_models", "to_model_metadata", ENGINE, "list the model"),
    Use("ray.llm._internal.serve.core.server.llm_server", "LLMServer", ENGINE, "serve with an engine of our own"),
    Use("ray.llm._internal.serve.engines.vllm.vllm_engine", "VLLMEngine", ENGINE, "start vLLM"),
    Use(
        "ray.llm._internal.serve.core.configs.openai_api_models",
        "OpenAIHTTPException",
        REPLICA,
        "answer with OpenAI's form of errors",
    ),
    Use("ray.autoscaler._private.util", "prepare_config", CHECKS, "see what the launcher makes of a file", "config"),
    Use("ray.autoscaler._private.util", "validate_config", CHECKS, "refuse what the launcher would refuse", "config"),
    Use("ray.autoscaler._private.commands", "_bootstrap_config", LAUNCHER, "ask a cloud what is left", "config"),
    Use(
        "ray.autoscaler._private.providers",
        "_get_node_provider",
        LAUNCHER,
        "ask a cloud what is left",
        "provider_config, cluster_name, use_cache",
    ),
]
OF_TRAINING = [use for use in USES if use.used_in.startswith("train/")]


def test_every_private_import_stands_here(repository: Path) -> None:
    found = set()
    for path in (repository / "forge_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and _is_private(node.module or ""):
                found |= {
                    (str(path.relative_to(repository / "forge_ray")), node.module, alias.name) for alias in node.names
                }
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if _is_private(alias.name)], path
    assert found == {(use.used_in, use.module, use.name) for use in USES}


def _is_private(module: str) -> bool:
    first, *rest = module.split(".")
    return first == "ray" and any(part.startswith("_") or part == "generated" for part in rest)


@pytest.mark.parametrize("use", OF_TRAINING, ids=lambda use: f"{use.used_in}:{use.name}")
def test_it_is_there_as_we_use_it(use: Use) -> None:
    try:
        thing = getattr(importlib.import_module(use.module), use.name)
    except (ImportError, AttributeError) as error:
        raise AssertionError(f"gone: {use} ({error})") from None
    if use.parameters:
        wanted = use.parameters.split(", ")
        has = list(inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters)
        assert has[: len(wanted)] == wanted, f"takes {has}, not {wanted}: {use}"
    missing = [name for name in use.attributes.split() if name not in _attributes(thing)]
    assert not missing, f"has no {missing}: {use}"


def _attributes(thing: Any) -> set[str]:
    """Names on it, and those that a class's methods assign to `self`."""
    names = set(dir(thing))
    for base in inspect.getmro(thing) if inspect.isclass(thing) else ():
        if base.__module__.startswith("ray.train"):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
    return names


# ---------------------------------------------------------------------------------------------------------- semantics


@functools.cache
def _controller() -> Any:
    from ray.train.v2._internal.execution.controller import TrainController

    return TrainController


def _fake_controller(**members: Any) -> Any:
    """A controller's methods on plain members, for steps that need no cluster."""
    plain = SimpleNamespace(_get_run_attempt_id=lambda: "attempt", **members)
    name = "_make_and_handle_scaling_decision_for_non_running_worker_group"
    setattr(plain, name, functools.partial(getattr(_controller(), name), plain))
    return plain


def test_a_decision_to_do_nothing_leaves_the_very_same_state() -> None:
    """`AgentController` rests where the state is the same object (train/nodes/placement.py); else it would spin."""
    from ray.train.v2._internal.execution.controller.state import InitializingState
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision

    state = InitializingState()
    policy = SimpleNamespace(make_decision_for_non_running_worker_group=NoopDecision)
    plain = _fake_controller(get_state=lambda: state, _scaling_policy=policy)
    assert asyncio.run(_controller()._step(plain)).next_state is state


def test_a_decision_of_ours_comes_back_to_be_executed() -> None:
    """`Placement` travels as it is through the controller's states to where it is executed (nodes/placement.py)."""
    from ray.train.v2._internal.execution.controller.state import InitializingState

    from forge_ray.train.nodes.placement import Placement

    decision = Placement(1, {"CPU": 1}, {"node": 1})
    policy = SimpleNamespace(make_decision_for_non_running_worker_group=lambda: decision)
    executed: list[Any] = []
    plain = _fake_controller(
        get_state=InitializingState, _scaling_policy=policy, _execute_resize_decision=executed.append
    )
    scheduling = asyncio.run(_controller()._step(plain)).next_state
    plain.get_state = lambda: scheduling
    asyncio.run(_controller()._step(plain))
    assert executed == [decision]


def test_a_group_without_agents_is_tried_again() -> None:
    """`AgentGroup.arrange` raises it when no agent came up (train/nodes/placement.py); the run must not end of that."""
    from ray.train import FailureConfig
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
    from ray.train.v2.api.exceptions import ControllerError

    policy = create_failure_policy(FailureConfig(max_failures=0))
    decisions = {policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(1))) for _ in range(3)}
    assert decisions == {FailureDecision.RETRY}


def test_polls_count_workers_by_their_place_in_the_group() -> None:
    """`AgentGroup._part` takes the errors' keys for places in `get_workers()` (train/nodes/placement.py)."""
    from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerStatus

    lost = OSError("lost")
    status = WorkerGroupPollStatus({0: WorkerStatus(running=True), 1: WorkerStatus(running=False, error=lost)})
    assert status.errors == {1: lost}


def test_the_state_of_a_group_can_be_changed_in_its_workers_alone() -> None:
    """`AgentGroup._settle` does that, and `Reservations` stands in for the placement group (nodes/placement.py)."""
    from ray.train.v2._internal.execution.worker_group import WorkerGroupState

    state = WorkerGroupState(0.0, {}, [], None)
    assert dataclasses.replace(state, workers=["a", "b"]).num_workers == 2
    assert "placement_group_handle.shutdown()" in inspect.getsource(WorkerGroupState.shutdown)


def test_replica_groups_keep_the_preemption_watcher_out() -> None:
    """It would end all agents when one node drains; to `_NoBackend` each is a replica group (nodes/placement.py)."""
    from ray.train.backend import Backend, BackendConfig

    from forge_ray.train.nodes.placement import AgentConfig

    assert BackendConfig().backend_cls is Backend
    assert Backend.has_replica_groups is False
    assert AgentConfig().backend_cls.has_replica_groups is True
    source = inspect.getsource(_controller().__init__)
    assert source.index("if self._manages_replica_groups:") < source.index("PreemptionCallback()")


def test_the_trainer_hands_its_policy_to_a_method_of_its_own() -> None:
    """`AgentTrainer` puts its policy and controller there (train/nodes/placement.py)."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    call = inspect.getsource(DataParallelTrainer.fit)
    assert "self._initialize_and_run_controller(" in call
    assert "scaling_policy=create_scaling_policy(" in call
    assert "callbacks=self._create_default_callbacks()" in call


def test_ray_train_reads_the_settings_that_we_make() -> None:
    """`CONTROLLER_ENVIRONMENT` (train/nodes/placement.py); an unknown name would do nothing."""
    from ray.train.v2._internal import constants

    from forge_ray.train.nodes.placement import CONTROLLER_ENVIRONMENT

    assert set(CONTROLLER_ENVIRONMENT) == {
        constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR,
        constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
    }
    assert set(CONTROLLER_ENVIRONMENT) <= constants.ENV_VARS_TO_PROPAGATE  # so that a user's own values win


def test_a_placement_group_takes_a_node_for_its_bundle() -> None:
    """`AgentGroup._reserve` pins an agent so (train/nodes/placement.py)."""
    from ray._raylet import RAY_NODE_ID_KEY
    from ray.util.placement_group import placement_group

    assert "bundle_label_selector" in inspect.signature(placement_group).parameters
    assert RAY_NODE_ID_KEY == "ray.io/node-id"


def test_a_node_can_be_drained_for_the_reason_that_we_give() -> None:
    """`drain` (train/scaling.py); the client's methods are those of an inner one."""
    from ray._raylet import InnerGcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    assert callable(InnerGcsClient.drain_node)
    assert "DRAIN_NODE_REASON_PREEMPTION" in DrainNodeReason.keys()  # noqa: SIM118


def test_an_agent_loads_no_torch() -> None:
    """What Ray Train's worker and our trainer import, in a fresh interpreter; agents unpickle the trainer's config."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "import ray.train.v2._internal.execution.worker_group.worker\n"
        "import forge_ray.train.nodes.scaling, forge_ray.train.nodes.agent\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'vllm', 'transformers'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[]"
