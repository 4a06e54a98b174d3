"""The compute process of a seat: builds a worker and trains with whomever the coordinator names.

Forked by the seat's keeper, so it starts with everything imported. What is kept of it is `record.py`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket

import torch

from forge_ray.data.loader import SlotLoader
from forge_ray.errors import ForgeError, TrainError
from forge_ray.model import fp8
from forge_ray.model.arithmetic import num_sums
from forge_ray.model.transformer import Transformer
from forge_ray.train import compiled, fitting, loop
from forge_ray.train.elastic.coordinator import LOST_EXIT
from forge_ray.train.elastic.group import GroupLost, store_server
from forge_ray.train.elastic.lines import Lines, Message
from forge_ray.train.elastic.team import Control, Odd, Stopped, Team
from forge_ray.train.fitting import Fit
from forge_ray.train.guardian import Guardian
from forge_ray.train.loop import Worker
from forge_ray.train.optimizer import Optimizer
from forge_ray.train.record import Record
from forge_ray.train.spec import RunSpec

ODD_EXIT = 70


def preload(task: Message) -> None:
    """Imports what a compute process would import later, and compiles, so that a fork has it. Starts no thread."""
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch.distributed  # noqa: F401

    if task["spec"]["config"]["sharding"] == "fsdp":
        import forge_ray.train.sharded.seat  # noqa: F401
    spec = RunSpec.from_json(task["spec"])
    device = _device(spec)
    if device.type == "cpu":
        with contextlib.suppress(ForgeError):  # whoever is forked meets it too, and tells the coordinator
            compiled.warm(spec, _fit(spec, device), device, forking=True)


def main(task: Message, connection: socket.socket) -> None:
    """Trains until the run is done, this worker is told to stop, or it cannot be trusted."""
    spec = RunSpec.from_json(task["spec"])
    torch.set_num_threads(spec.config.cpus_per_worker)
    device = _device(spec)
    if device.type == "cuda" and spec.config.reduction == "exact":
        torch.use_deterministic_algorithms(True, warn_only=True)
    store, at = store_server(task["address"])
    control = Control(Lines(connection), at)
    try:
        check_device(spec.precision, device)
        fit = _fit(spec, device)
        control.host_class = host_class(spec, fit, device)
        if spec.config.sharding == "fsdp":
            from forge_ray.train.sharded import seat as sharded_seat

            sharded_seat.train(spec, task, control, device)
        else:
            _train(spec, fit, task, control, device)
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


def _device(spec: RunSpec) -> torch.device:
    return torch.device("cuda", 0) if spec.config.gpus_per_worker else torch.device("cpu")


def check_device(precision: str, device: torch.device) -> None:
    """Refuses a GPU that cannot compute in a precision.

    Raises:
        TrainError: It cannot.
    """
    if precision == "fp8" and torch.cuda.get_device_capability(device) < fp8.CAPABILITY:
        raise TrainError(
            "this GPU computes no fp8",
            got=f"{torch.cuda.get_device_name(device)}, compute capability {torch.cuda.get_device_capability(device)}",
            wanted="8.9 or newer (Ada, Hopper, Blackwell)",
            do="set pretrain.precision to bf16, or train on newer GPUs",
        )


def _train(spec: RunSpec, fit: Fit, task: Message, control: Control, device: torch.device) -> None:
    worker = build(spec, fit, device)
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


def build(spec: RunSpec, fit: Fit, device: torch.device) -> Worker:
    """A worker without a state: peers or a checkpoint give it one."""
    compiled.warm(spec, fit, device)
    loader = SlotLoader.of(spec.config, spec.workspace.get(spec.shards_ref))
    return _worker(spec, fit, device, loader)


def _worker(spec: RunSpec, fit: Fit, device: torch.device, loader: SlotLoader | None) -> Worker:
    model = Transformer(spec.model, spec.vocab_size, spec.config.seq_len).to(device)
    if spec.precision == "fp8":
        fp8.apply(model)
    return Worker(
        spec.config,
        model,
        Optimizer(model, spec.config.optimizer),
        loader,  # type: ignore[arg-type]
        loader.order.index.end_token if loader else 0,
        spec.precision != "fp32",
        Guardian(spec.config.guard),
        fit=fit,
        compiled=spec.compiled,
    )


def _fit(spec: RunSpec, device: torch.device) -> Fit:
    def attempt(fit: Fit) -> None:
        worker = _worker(spec, fit, device, None)
        if worker.sums.exact:  # else the copy for the others is made when activations are gone
            worker.sums.reserve(num_sums(spec.config.slots, spec.config.min_workers, exact=True))
        loop.backward(worker, torch.zeros((spec.config.micro_batch, spec.config.seq_len + 1), dtype=torch.int64))
        worker.sums.add(0)

    return fitting.choose(spec.model, spec.config, spec.vocab_size, spec.precision, device, attempt)


def _matrix_units() -> str:
    """What processors of one class may have or not, and the library's products of matrices then use."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as table:
        line = next((line for line in table if line.startswith("flags")), "")
        found = sorted({"avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16"} & set(line.split()))
        return "".join(f" {name}" for name in found)
    return ""


def host_class(spec: RunSpec, fit: Fit, device: torch.device) -> str:
    """What the bits of a result depend on besides the configuration: libraries, threads, the kind of processor."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{_matrix_units()}"
    parts = [f"torch {torch.__version__}", processor, f"{spec.config.cpus_per_worker} thread(s)", spec.precision]
    parts += ["compiled"] * spec.compiled
    if fit.at_once < spec.config.micro_batch:
        parts.append(f"{fit.at_once} of {spec.config.micro_batch} sequences at once")
    return ", ".join(parts)
