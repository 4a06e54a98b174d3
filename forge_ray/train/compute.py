"""The compute process of a seat: builds a worker and trains with whomever the coordinator names.

Forked by the seat's keeper, so it starts with everything imported. What is kept of it is `record.py`.
"""

from __future__ import annotations

import os
import platform
import socket

import torch

from forge_ray.data.loader import SlotLoader
from forge_ray.errors import ForgeError
from forge_ray.model.transformer import Transformer
from forge_ray.train import loop
from forge_ray.train.elastic.coordinator import LOST_EXIT
from forge_ray.train.elastic.group import GroupLost, store_server
from forge_ray.train.elastic.lines import Lines, Message
from forge_ray.train.elastic.team import Control, Odd, Stopped, Team
from forge_ray.train.guardian import Guardian
from forge_ray.train.loop import Worker
from forge_ray.train.optimizer import Optimizer
from forge_ray.train.record import Record
from forge_ray.train.spec import RunSpec

ODD_EXIT = 70


def preload(task: Message) -> None:
    """Imports what a compute process would import later, so that a fork has it. Starts no thread."""
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch.distributed  # noqa: F401

    if task["spec"]["config"]["sharding"] == "fsdp":
        import forge_ray.train.sharded.seat  # noqa: F401


def main(task: Message, connection: socket.socket) -> None:
    """Trains until the run is done, this worker is told to stop, or it cannot be trusted."""
    spec = RunSpec.from_json(task["spec"])
    torch.set_num_threads(spec.config.cpus_per_worker)
    device = torch.device("cuda", 0) if spec.config.gpus_per_worker else torch.device("cpu")
    store, at = store_server(task["address"])
    control = Control(Lines(connection), at, host_class(spec, device))
    try:
        if spec.config.sharding == "fsdp":
            from forge_ray.train.sharded import seat as sharded_seat

            sharded_seat.train(spec, task, control, device)
        else:
            _train(spec, task, control, device)
    except GroupLost as error:  # of sharded workers; the others go on in another group
        print(f"the group is lost: {error}", flush=True)
        os._exit(LOST_EXIT)
    except ForgeError as error:
        control.status("failed", 0, -1, error=error.as_dict())
    except Odd as error:
        print(f"this worker's state cannot be trusted: {error}", flush=True)
        os._exit(ODD_EXIT)
    except Stopped:
        pass
    del store  # others meet there as long as this process lives


def _train(spec: RunSpec, task: Message, control: Control, device: torch.device) -> None:
    worker = build(spec, device)
    record = Record(spec, worker, control)
    team = Team(control, task["address"], device, record.resume, record.on_formed, record.distrust, record.stored)
    record.team = team
    try:
        loop.fit(worker, team, record.on_step, record.on_verdict)
        _finish(worker, team, record)
        control.status("done", team.generation, worker.step, members=[])
    except Stopped:
        record.stop()
        raise
    finally:
        worker.loader.reader.close()


def _finish(worker: Worker, team: Team, record: Record) -> None:
    """All wait until the last checkpoint stands; if who writes it dies, the next one does."""
    while True:
        try:
            team.settle(worker)
            if team.rank == 0:
                record.finish()
            team.progress("waiting")
            team.group.gather_json("saved")
            return
        except GroupLost as error:
            team.lost(error)


def build(spec: RunSpec, device: torch.device) -> Worker:
    """A worker without a state: peers or a checkpoint give it one."""
    config = spec.config
    loader = SlotLoader.of(config, spec.workspace.get(spec.shards_ref))
    index = loader.order.index
    model = Transformer(spec.model, index.vocab_size, config.seq_len).to(device)
    optimizer = Optimizer(model, config.optimizer)
    bf16 = spec.precision == "bf16"
    return Worker(config, model, optimizer, loader, index.end_token, bf16, Guardian(config.guard))


def host_class(spec: RunSpec, device: torch.device) -> str:
    """What the bits of a result depend on besides the configuration: libraries, threads, the kind of processor."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, {processor}, {spec.config.cpus_per_worker} thread(s), {spec.precision}"
