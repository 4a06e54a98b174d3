"""Pretrain: elastic data-parallel training under Ray Train, resumed from the workspace by whoever runs it next.

Owns the run: what a Ray Train worker does (`_work`), the board through which workers tell the driver, and the
artifact at the end. The step is `loop.py`. Ray Train's workers compute here by themselves; thin agents with compute
processes of their own take the place of `_work` without a change to `loop.fit`.

Nothing needed to go on lives in the driver or in Ray: a killed run finds its newest checkpoint in the workspace.
"""

from __future__ import annotations

import json
import platform
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import ForgeError, TrainError
from forge_ray.events import Events
from forge_ray.model.arithmetic import num_parameters, train_flops_per_token
from forge_ray.runtime import unwrapped
from forge_ray.telemetry import Progress, say
from forge_ray.train.checkpoint import OPTIMIZER, STATE, WEIGHTS, Checkpoints

if TYPE_CHECKING:
    from forge_ray.model.transformer import Transformer

FORMAT_VERSION = 2
CURVE = "curve.json"
_FLUSH_S = 2.0
_POLL_S = 0.5
_PATIENCE_S = 30.0
_ASK_S = 60.0
_STARTS_WITHOUT_PROGRESS = 10


@dataclass(frozen=True)
class RunSpec:
    """All that a worker needs, as plain values, so that it can be sent anywhere."""

    run_id: str
    workspace: Workspace
    shards_ref: str
    model: ModelConfig
    config: PretrainConfig
    precision: str


def observe(config: PretrainConfig) -> dict[str, Any]:
    """What is chosen automatically, frozen before the fingerprint: the compute precision."""
    if config.precision != "auto":
        return {"precision": config.precision}
    return {"precision": "bf16" if config.gpus_per_worker or _cpu_has_bf16() else "fp32"}


def run(
    model: ModelConfig,
    config: PretrainConfig,
    shards: Artifact,
    workspace: Workspace,
    *,
    run_id: str,
    frozen: dict[str, Any],
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Trains, or goes on training, until `config.steps`.

    Args:
        run_id: The fingerprint of the artifact to be; the run's folder has its name.
        frozen: What `observe` gave.

    Returns:
        The artifact's files (weights, optimizer, state, the curve) and its metrics.

    Raises:
        TrainError: The loss is not finite, or workers die again and again without a step between.
        ConfigError: The mixture does not fit the corpus, or the shard cache is too small.
        DataError: The corpus holds no whole sequence.
        CorruptError: A shard does not verify.
    """
    from forge_ray.data import loader

    loader.plan(config, shards)  # refuses here what every worker would refuse
    checkpoints = Checkpoints(workspace, run_id)
    spec = RunSpec(run_id, workspace, shards.ref, model, config, frozen["precision"])
    last = checkpoints.newest()
    if last is None or last.read_json(STATE)["step"] < config.steps:
        _train(spec)
        last = checkpoints.newest()
    if last is None or last.read_json(STATE)["step"] != config.steps:
        raise TrainError(
            "training ended before its last step",
            got=f"checkpoints {checkpoints.steps()}",
            wanted=f"step {config.steps}",
            do="run the same command again: it goes on from the newest checkpoint",
        )
    curve = _curve(workspace, run_id)
    metrics = _metrics(spec, last.read_json(STATE), curve)
    files = [last.entry(name) for name in (WEIGHTS, OPTIMIZER, STATE)]
    return [*files, workspace.put_bytes(CURVE, json.dumps(curve).encode())], metrics


def load_model(artifact: Artifact, model: ModelConfig, max_len: int) -> tuple[Transformer, int]:
    """The trained model in fp32 on the CPU, ready to evaluate, and the id that ends a document."""
    from forge_ray.model.transformer import Transformer, load_weights
    from forge_ray.train.checkpoint import load_tensors

    state = artifact.read_json(STATE)
    trained = load_weights(Transformer(model, state["vocab_size"], max_len), load_tensors(artifact, WEIGHTS))
    return trained.eval(), state["end_token"]


# ------------------------------------------------------------------------------------------------------------ driver


def _train(spec: RunSpec) -> None:
    """Runs Ray Train until its workers have ended.

    Its storage is a temporary folder of this node, on however many nodes the workers are: only the controller writes
    there, which Ray Train attaches to the driver's node, and workers look whether they see that folder when they report
    a checkpoint, which ours never do (Ray 2.60, `StorageContext` and `ray.train.report`). Left unset it would be
    `~/ray_results`, for good.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = spec.config
    workers = (
        (config.min_workers, config.max_workers) if config.min_workers < config.max_workers else config.max_workers
    )
    board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()
    with tempfile.TemporaryDirectory(prefix="forge-train-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"spec": spec, "board": board},
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=_resources(config)
            ),
            run_config=RunConfig(
                name=f"pretrain-{spec.run_id}-{int(time.time())}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=config.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        say(f"  run {spec.run_id}: {num_workers_text(config)}, {spec.precision}")
        with _Watch(board, config.steps) as watch, unwrapped():
            try:
                trainer.fit()
            except ForgeError:
                raise
            except SystemExit:
                # Ray Train catches Ctrl-C, aborts the run in good order and then ends the process by itself.
                raise KeyboardInterrupt from None
            except Exception as error:
                if watch.error() is None:
                    raise TrainError(
                        "Ray Train gave up", got=str(error)[:2000], do="see the workers' logs on Ray's dashboard"
                    ) from error
    if watch.error() is not None:
        raise watch.error()


def num_workers_text(config: PretrainConfig) -> str:
    """`2 workers` or `1 to 4 workers`."""
    span = (
        str(config.max_workers)
        if config.min_workers == config.max_workers
        else f"{config.min_workers} to {config.max_workers}"
    )
    return f"{span} worker{'s' if config.max_workers > 1 else ''}"


def _resources(config: PretrainConfig) -> dict[str, float]:
    gpus = {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    return {"CPU": config.cpus_per_worker, **gpus}


class Board:
    """The actor through which workers tell the driver: records of steps, and an error that ends the run."""

    def __init__(self) -> None:
        self._news: list[dict[str, Any]] = []
        self._error: ForgeError | None = None
        self._starts: dict[int, int] = {}

    def started(self, step: int) -> ForgeError | None:
        """A worker group starts at a step; returns what forbids it."""
        self._starts[step] = self._starts.get(step, 0) + 1
        if self._starts[step] >= _STARTS_WITHOUT_PROGRESS and self._error is None:
            self._error = TrainError(
                "the workers die again and again without a checkpoint between",
                got=f"{self._starts[step]} starts at step {step}",
                do="see the workers' logs on Ray's dashboard; memory is the usual cause: lower pretrain.micro_batch",
            )
        return self._error

    def tell(self, record: dict[str, Any]) -> None:
        """Adds a record for the driver."""
        self._news.append(record)

    def fail(self, error: ForgeError) -> None:
        """Ends the run with an error that a restart would not mend."""
        self._error = self._error or error

    def error(self) -> ForgeError | None:
        """The error that ends the run, if there is one."""
        return self._error

    def news(self) -> tuple[list[dict[str, Any]], ForgeError | None]:
        """What came since the last call."""
        news, self._news = self._news, []
        return news, self._error


class _Watch:
    """Shows the board's news as progress while the driver waits for Ray Train."""

    def __init__(self, board: Any, steps: int) -> None:
        self._board, self._steps = board, steps
        self._stop = threading.Event()
        self._error: ForgeError | None = None
        self._thread = threading.Thread(target=self._watch, name="forge-progress", daemon=True)

    def error(self) -> ForgeError | None:
        """The error that a worker put on the board."""
        return self._error

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        progress: Progress | None = None
        told_s = time.monotonic()
        try:
            while True:
                stopping = self._stop.wait(_POLL_S)
                progress = self._show(progress)
                if stopping:
                    return
                if progress is None and time.monotonic() - told_s > _PATIENCE_S:
                    told_s = time.monotonic()
                    say(f"  still waiting for workers: {_free_resources()}; Ray's dashboard shows who holds the rest")
        finally:
            if progress:
                progress.__exit__(None, None, None)

    def _show(self, progress: Progress | None) -> Progress | None:
        import ray

        try:
            news, self._error = ray.get(self._board.news.remote(), timeout=10)
        except Exception as error:  # the board died with its node: training goes on, only its news are lost
            say(f"  no news from the workers: {type(error).__name__}")
            return progress
        for record in news:
            if record["event"] == "start":
                say(f"  {record['world_size']} worker(s) at step {record['step']}")
                progress = progress or Progress("pretrain", self._steps, record["step"]).__enter__()
            elif progress:
                progress.update(record["step"], f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s")
        return progress


def _free_resources() -> str:
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    return ", ".join(
        f"{free.get(name, 0):g} of {total[name]:g} {name}s are free" for name in ("CPU", "GPU") if name in total
    )


def _curve(workspace: Workspace, run_id: str) -> dict[str, list[Any]]:
    """Loss and rate by step; a step that was computed twice counts once, as committed last."""
    rows = {row["step"]: row for row in Events.read(workspace.storage, run_id) if row["event"] == "step"}
    names = ("step", "loss", "grad_norm", "rate_frac", "world_size", "wall_s", "data_s")
    return {name: [rows[step][name] for step in sorted(rows)] for name in names}


def _metrics(spec: RunSpec, state: dict[str, Any], curve: dict[str, list[Any]]) -> dict[str, Any]:
    config = spec.config
    tokens_per_step = config.slots * config.micro_batch * config.seq_len
    tail = curve["loss"][-20:]
    step_s = sorted(curve["wall_s"])[len(curve["wall_s"]) // 2] if curve["wall_s"] else float("nan")
    vocab_size = state["vocab_size"]
    return {
        "parameters": num_parameters(spec.model, vocab_size),
        "steps": config.steps,
        "tokens": config.steps * tokens_per_step,
        "epochs": state["epochs"],
        "epochs_by_source": state["epochs_by_source"],
        "data_wait_frac": sum(curve["data_s"]) / max(sum(curve["wall_s"]), 1e-9),
        "final_train_loss": sum(tail) / max(len(tail), 1),
        "tokens_per_s": tokens_per_step / step_s,
        "precision": spec.precision,
        "vocab_size": vocab_size,
        "train_flops": train_flops_per_token(spec.model, vocab_size, config.seq_len) * config.steps * tokens_per_step,
    }


def _cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 natively; without it bf16 is slower than fp32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as table:
            flags = table.read()
    except OSError:
        return platform.machine() == "arm64"
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16 "))


# ------------------------------------------------------------------------------------------------------------ worker


def _work(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs, from nothing to the last step.

    Whatever is raised makes Ray Train start the whole group again. A `ForgeError` would only come again: it is put on
    the board first, and every worker of the next group finds it there, before it waits for any other, and returns.
    """
    spec, board = loop_config["spec"], loop_config["board"]
    if _ask(board.error) is not None:
        return
    try:
        _compute(spec, board)
    except ForgeError as error:
        _ask(board.fail, error)
        raise


def _compute(spec: RunSpec, board: Any) -> None:
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    from forge_ray.train import loop

    context = ray_train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(spec.config.cpus_per_worker)
    worker = _build(spec, rank, world_size, get_device())
    if rank == 0:
        forbidden = _ask(board.started, worker.step)
        if forbidden is not None:
            raise forbidden
        board.tell.remote({"event": "start", "step": worker.step, "world_size": world_size})
    reporter = _Reporter(spec, worker, board)
    try:
        loop.fit(worker, checkpoint_due=reporter.checkpoint_due, on_step=reporter.on_step)
    finally:
        worker.loader.reader.close()


def _ask(method: Any, *args: Any) -> Any:
    """What the board answers; none when it is gone, because training does not need it."""
    import ray

    try:
        return ray.get(method.remote(*args), timeout=_ASK_S)
    except ray.exceptions.RayError:
        return None


def _build(spec: RunSpec, rank: int, world_size: int, device: Any) -> Any:
    """A worker with the state of the newest checkpoint, or with initial weights; the same one on every rank."""
    import torch.distributed as dist

    from forge_ray.data.loader import SlotLoader
    from forge_ray.model.transformer import Transformer, load_weights
    from forge_ray.train import loop
    from forge_ray.train.checkpoint import load_tensors
    from forge_ray.train.optimizer import Optimizer

    config = spec.config
    loader = SlotLoader.of(config, spec.workspace.get(spec.shards_ref))
    index = loader.order.index
    model = Transformer(spec.model, index.vocab_size, config.seq_len).initialise(config.seed).to(device)
    optimizer = Optimizer(model, config.optimizer)
    checkpoints = Checkpoints(spec.workspace, spec.run_id)
    newest = checkpoints.newest() if rank == 0 else None
    chosen = [newest.read_json(STATE)["step"] if newest else 0]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    if chosen[0]:
        checkpoint = checkpoints.get(chosen[0])
        load_weights(model, load_tensors(checkpoint, WEIGHTS))
        optimizer.load(load_tensors(checkpoint, OPTIMIZER))
    return loop.Worker(
        config, model, optimizer, loader, index.end_token, spec.precision == "bf16", rank, world_size, chosen[0]
    )


class _Reporter:
    """Tells the board, keeps the events, saves checkpoints and reports to Ray Train."""

    def __init__(self, spec: RunSpec, worker: Any, board: Any) -> None:
        self._spec, self._worker, self._board = spec, worker, board
        self._events = Events(spec.workspace.storage, spec.run_id)
        self._saved_s = self._flushed_s = time.monotonic()
        self._since: list[tuple[int, float]] = []
        self._events.add(
            "start", step=worker.step, world_size=worker.world_size, host=platform.node(), shards=spec.shards_ref
        )

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return time.monotonic() - self._saved_s >= self._spec.config.checkpoint_every_s

    def on_step(self, record: Any, save: bool) -> None:
        """Called on every worker after each step."""
        from ray import train as ray_train

        if self._worker.rank == 0:
            self._tell(record, save)
        if save:
            # A barrier for all workers that takes up to Ray Train's poll interval, so only beside a checkpoint.
            ray_train.report({"step": record.step, "loss": record.loss, "world_size": record.world_size})
            self._saved_s = time.monotonic()

    def _tell(self, record: Any, save: bool) -> None:
        self._events.add("step", **record.as_dict())
        self._since.append((record.tokens, record.wall_s))
        if save:
            # Events first: a kill between the two repeats steps in the log, where the other order would lose them.
            self._events.flush()
            self._save()
            self._events.add("checkpoint", step=record.step)
        if save or time.monotonic() - self._flushed_s >= _FLUSH_S:
            tokens, wall_s = (sum(column) for column in zip(*self._since, strict=True))
            self._board.tell.remote(
                {"event": "step", "step": record.step, "loss": record.loss, "tokens_per_s": tokens / wall_s}
            )
            self._events.flush()
            self._since, self._flushed_s = [], time.monotonic()

    def _save(self) -> None:
        worker, spec = self._worker, self._spec
        weights = {name: p.detach().cpu().contiguous() for name, p in worker.model.named_parameters()}
        optimizer = {name: t.detach().cpu().contiguous() for name, t in worker.optimizer.tensors().items()}
        state = {
            "vocab_size": worker.model.vocab_size,
            "end_token": worker.end_token,
            "epochs": worker.loader.epochs(spec.config.steps),
            "epochs_by_source": worker.loader.epochs_by_source(spec.config.steps),
        }
        Checkpoints(spec.workspace, spec.run_id).save(
            worker.step, weights, optimizer, state, spec.config.checkpoints_kept
        )
