"""Ray Train's own elastic mode as its documentation composes it: TorchTrainer, DDP, checkpoints by `ray.train.report`.

    python bench/peers/ray_elastic.py SPEC.json      (on the cluster at RAY_ADDRESS; run by `bench/chaos.py`)

Where Ray Train has a choice, the one that recovers soonest, measured on a 2-core machine with ray 2.60 (2026-11):

- `num_workers=(1, N)`, so that a lost node costs a smaller group and not a wait for its return;
- `RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=10` for 60: a group planned on a node that is gone gives up sooner (84.6 s
  from a node's kill to the next step become 27.7 s);
- `RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2` for 2: deaths and reports are seen sooner;
- `elastic_resize_monitor_interval_s=5` for 60: a node that comes back is used sooner;
- no limit to failures (the default is none allowed);
- a checkpoint every `checkpoint_every_steps`, uploaded in the background (Young's interval for a kill every 30 s and
  0.2 s a checkpoint: 3.5 s).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
RESIZE_S, COLLECTIVE_S = 5.0, 20
STATE = "state.pt"


def work(spec: dict[str, Any]) -> None:
    """What each worker of a group runs, from the newest checkpoint on."""
    import ray.train
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from bench.peers.workload import Workload, share

    load, context = Workload(spec), ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    step, checkpoint = 0, ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, STATE), map_location="cpu")
        load.loss.load_state_dict(state["model"])
        load.optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model = DistributedDataParallel(load.loss, gradient_as_bucket_view=True, static_graph=True)
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name)
    load.log("start", step=step, world_size=world_size, group=name[0])
    slots = load.config.slots
    mine = share(rank, world_size, slots)
    while step < load.config.steps:
        load.optimizer.zero_grad()
        loss = model(load.samples(step, mine))
        # DDP averages over workers, whose shares may differ.
        (loss * (len(mine) * world_size / slots)).backward()
        load.prepare_step(step)
        load.optimizer.step()
        step += 1
        tokens = load.tokens(slots)
        load.log("step", step=step, loss=loss.item(), tokens=tokens, world_size=world_size, group=name[0])
        if step % spec["checkpoint_every_steps"] == 0:
            _report(load, step, rank)


def _report(load: Any, step: int, rank: int) -> None:
    import ray.train
    import torch
    from ray.train import CheckpointUploadMode

    saved = None
    if rank == 0:
        folder = tempfile.mkdtemp()
        state = {"model": load.loss.state_dict(), "optimizer": load.optimizer.state_dict(), "step": step}
        torch.save(state, Path(folder, STATE))
        saved = ray.train.Checkpoint.from_directory(folder)
    ray.train.report({"step": step}, checkpoint=saved, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)


def main() -> None:
    """Trains until all steps are done, or the process is ended."""
    os.environ.update(SETTINGS)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    spec = json.loads(Path(sys.argv[1]).read_text())
    ray.init(log_to_driver=False)
    TorchTrainer(
        work,
        train_loop_config=spec,
        scaling_config=ScalingConfig(num_workers=(1, spec["workers"]), elastic_resize_monitor_interval_s=RESIZE_S),
        torch_config=TorchConfig(backend="gloo", timeout_s=COLLECTIVE_S),
        run_config=RunConfig(
            name="elastic",
            storage_path=spec["storage"],
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main()
