"""torchft's own recipe for fault-tolerant DDP (its `train_ddp.py`), under Ray Train's `TorchftConfig`.

    python bench/peers/torchft_recipe.py SPEC.json   (on the cluster at RAY_ADDRESS; run by `bench/chaos.py`)

Each worker is a replica group of its own with a fixed share of the batch: when a group is gone, the others train
theirs, and the samples of the lost one are not trained. `ray.train.report`, a barrier of all ranks, is not called.

Where torchft has a choice, the one that recovers soonest, tried on a 2-core machine with torchft 0.2.0 (2026-11):

- the quorum in the background of the forward pass (`use_async_quorum`, its default);
- `init_sync=False`: all begin with the same weights;
- the lighthouse takes a group for dead after HEARTBEAT_MS and waits JOIN_MS for others to join a quorum (5,000 and
  60,000 by default; groups send a heartbeat every 100 ms; with 1,000 and 200 groups that are alive but late were left
  out on a busy machine);
- live weights over HTTP (its default), and a checkpoint by one worker every `checkpoint_every_steps`, for when all
  workers are gone at once;
- `RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2` for 2: Ray Train starts the replacement sooner.

Mended here, in its favour: on CPUs the hook of its DDP fails an assertion (`assert fut._fut`, `torchft/ddp.py`) when a
peer dies during the all-reduce, which ends the survivors, and with them all that was trained.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
HEARTBEAT_MS, JOIN_MS, TICK_MS = 1500, 2000, 20
TIMEOUT_S = 20


def work(spec: dict[str, Any]) -> None:
    """What each worker runs, from a peer's weights on if there are peers."""
    from datetime import timedelta

    import ray.train
    import torch
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    from bench.peers.workload import Workload, share

    class MendedParallel(DistributedDataParallel):
        @staticmethod
        def _comm_hook(state, bucket):  # DDP looks at annotations, and wants none or real types
            state.allreduce(bucket.buffer()).wait()  # an error is on record in the manager: the step will not commit
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

    load, rank = Workload(spec), ray.train.get_context().get_world_rank()
    timeout = timedelta(seconds=TIMEOUT_S)

    saved = Path(spec["storage"], "state.pt")
    saved.parent.mkdir(exist_ok=True)

    def give() -> dict[str, Any]:
        return {"model": load.loss.state_dict(), "optimizer": load.optimizer.state_dict()}

    def take(state: dict[str, Any]) -> None:
        load.loss.load_state_dict(state["model"])
        load.optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        min_replica_size=1,
        load_state_dict=take,
        state_dict=give,
        replica_id=f"worker_{rank}",
        rank=0,
        world_size=1,
        timeout=timeout,
        quorum_timeout=timeout,
        init_sync=False,
    )
    model, optimizer = MendedParallel(manager, load.loss), Optimizer(manager, load.optimizer)
    if saved.exists():
        state = torch.load(saved)
        take(state)
        manager.load_state_dict(state["manager"])
    slots = load.config.slots
    mine = share(rank, spec["workers"], slots)
    load.log("start", step=manager.current_step(), world_size=0, group="")
    while (step := manager.current_step()) < load.config.steps:
        optimizer.zero_grad()  # which begins the quorum
        loss = model(load.samples(step, mine))
        loss.backward()
        step = manager.current_step()  # a peer's, if the quorum found that this worker is behind
        load.prepare_step(step)
        optimizer.step()  # commits, if all that take part can
        after, groups = manager.current_step(), manager.num_participants()
        event = "step" if after > step else "aborted"
        tokens = load.tokens(len(mine)) * groups
        load.log(event, step=after, loss=loss.item(), tokens=tokens, world_size=groups, group="")
        if after % spec["checkpoint_every_steps"] == 0 and manager.participating_rank() == 0:
            torch.save({**give(), "manager": manager.state_dict()}, saved.with_suffix(".new"))
            saved.with_suffix(".new").rename(saved)


def main() -> None:
    """Trains until all steps are done, or the process is ended."""
    os.environ.update(SETTINGS)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.torch.torchft_config import TorchftConfig

    spec = json.loads(Path(sys.argv[1]).read_text())
    ray.init(log_to_driver=False, runtime_env={"py_executable": sys.executable})
    lighthouse = {
        "min_replicas": 1,
        "join_timeout_ms": JOIN_MS,
        "quorum_tick_ms": TICK_MS,
        "heartbeat_timeout_ms": HEARTBEAT_MS,
    }
    TorchTrainer(
        work,
        train_loop_config=spec,
        scaling_config=ScalingConfig(num_workers=spec["workers"], resources_per_worker={"CPU": 1, "worker": 1}),
        torch_config=TorchftConfig(lighthouse_kwargs=lighthouse, backend="gloo"),
        run_config=RunConfig(
            name="torchft", storage_path=spec["storage"], failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


if __name__ == "__main__":
    main()
