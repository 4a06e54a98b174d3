"""Pretrain: elastic data-parallel training beneath Ray Train, resumed from the workspace by whoever runs it next.

Owns the run as the driver sees it: starting the coordinator and Ray Train's agents, showing how it goes, and the
artifact at the end. Who trains with whom is `membership.py`, what a worker does `compute.py`, the step `loop.py`.

Nothing needed to go on lives in the driver or in Ray: workers go on without them for a while, and a killed run finds
its newest checkpoint in the workspace.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import ConfigError, ForgeError, LostError
from forge_ray.events import Events
from forge_ray.model.arithmetic import num_parameters, train_flops_per_token
from forge_ray.runtime import unwrapped
from forge_ray.telemetry import Progress, say
from forge_ray.train import compiled, goodput, goodput_page
from forge_ray.train.saving.checkpoint import OPTIMIZER, STABLE, STATE, WEIGHTS, Checkpoints
from forge_ray.train.spec import RunSpec

if TYPE_CHECKING:
    from forge_ray.model.transformer import Transformer

FORMAT_VERSION = 4
CURVE, REPORT = "curve.json", "goodput.html"
_POLL_S = 0.5
_PATIENCE_S = 30.0
_STOP_S = 30.0


def observe(model: ModelConfig, config: PretrainConfig) -> dict[str, Any]:
    """What is chosen automatically, frozen before the fingerprint: the compute precision, and whether to compile.

    Raises:
        ConfigError: `pretrain.compile` is on, and there is no compiler here.
    """
    return {"precision": precision_of(config), "compiled": compiled.decide(model, config)}


def precision_of(config: PretrainConfig) -> str:
    """`bf16`, `fp32` or `fp8`."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if config.gpus_per_worker or cpu_has_bf16() else "fp32"


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
        The artifact's files (weights, optimizer, state, the curve, the report on the run) and its metrics.

    Raises:
        TrainError: The guardian stops the run, or workers die again and again without a step between.
        LostError: Ray or its nodes failed; the next try goes on from the newest checkpoint.
        ConfigError: The mixture does not fit the corpus, or the shard cache is too small.
        DataError: The corpus holds no whole sequence.
        CorruptError: A shard does not verify.
    """
    from forge_ray.data import loader

    order = loader.plan(config, shards)  # refuses here what every worker would refuse
    begin = _extended(config, model, shards, workspace, frozen) if config.extends else 0
    checkpoints = Checkpoints(workspace, run_id, config.stable_steps)
    spec = RunSpec(
        run_id, workspace, shards.ref, model, config, order.index.vocab_size, frozen["precision"], frozen["compiled"]
    )
    last = checkpoints.newest()
    if last is None or last.read_json(STATE)["step"] < config.steps:
        events = Events(workspace.storage, run_id)
        events.add(
            "start", step=last.read_json(STATE)["step"] if last else begin, host=platform.node(), pid=os.getpid()
        )
        events.flush()
        _train(spec)
        last = checkpoints.newest()
    if last is None or last.read_json(STATE)["step"] != config.steps:
        raise LostError(
            "training ended before its last step",
            got=f"checkpoints {checkpoints.steps()}",
            wanted=f"step {config.steps}",
            do="run the same command again: it goes on from the newest checkpoint",
        )
    events = Events.read(workspace.storage, run_id)
    curve = _curve(events)
    metrics = _metrics(spec, last.read_json(STATE), curve)
    metrics["peak_bytes"] = max((row["peak_bytes"] for row in events if row["event"] == "checkpoint"), default=0)
    metrics["ledger"] = goodput.account(events, config.usd_per_node_hour).as_dict()
    page = goodput_page.as_html(events, run_id, config.usd_per_node_hour)
    files = [*_whole(workspace, last), last.entry(STATE), *_stable(workspace, checkpoints)]
    files.append(workspace.put_bytes(CURVE, json.dumps(curve).encode()))
    return [*files, workspace.put_bytes(REPORT, page.encode())], metrics


def _whole(workspace: Workspace, checkpoint: Artifact) -> list[FileEntry]:
    """Weights and optimizer state as a file each, put together where workers held parts of them."""
    if WEIGHTS in checkpoint.names():
        return [checkpoint.entry(name) for name in (WEIGHTS, OPTIMIZER)]
    from safetensors.torch import save

    from forge_ray.train.saving.pieces import assemble

    tensors = assemble(checkpoint)
    return [workspace.put_bytes(name, save(part)) for name, part in zip((WEIGHTS, OPTIMIZER), tensors, strict=True)]


def _stable(workspace: Workspace, checkpoints: Checkpoints) -> list[FileEntry]:
    """The last checkpoint before the rate fell, if there is one."""
    steps = [step for step in checkpoints.steps() if step <= checkpoints.pinned]
    if not steps:
        return []
    found = checkpoints.get(steps[-1])
    entries = [*_whole(workspace, found), found.entry(STATE)]
    return [replace(entry, name=STABLE + entry.name) for entry in entries]


def _extended(
    config: PretrainConfig, model: ModelConfig, shards: Artifact, workspace: Workspace, frozen: dict[str, Any]
) -> int:
    """The step at which a run goes on from another.

    It is the run that had been this long from the start, with the other's warm-up, so all that decides its steps must
    be the other's: the model, the batch, the order, the optimizer with its rates. Only its length and the rate's fall
    may be its own. Another corpus under the same vocabulary, and compiled blocks, are said and not refused.

    Raises:
        ConfigError: It cannot.
        NotFoundError: There is no such run.
    """
    source = workspace.get(config.extends)
    if STABLE + STATE not in source.names():
        raise ConfigError(
            "the run to extend has no checkpoint from before its rate fell",
            got=f"pretrain.extends {config.extends}",
            do="extend another, or train anew without pretrain.extends",
        )
    state = source.read_json(STABLE + STATE)
    before, chosen = source.manifest.config, source.manifest.frozen
    their_shards = workspace.get(f"tokenize/{source.manifest.inputs['tokenize']}")
    theirs = {
        "model": ModelConfig.model_validate(before["model"]).fingerprinted(),
        "pretrain": _deciding(PretrainConfig.model_validate(before["pretrain"]), chosen),
        "vocabulary": their_shards.manifest.inputs["tokenizer"],
    }
    ours = {
        "model": model.fingerprinted(),
        "pretrain": _deciding(config, frozen),
        "vocabulary": shards.manifest.inputs["tokenizer"],
    }
    if different := list(_differences(theirs, ours)):
        raise ConfigError(
            f"a run goes on from another only with the same {different[0][0]}",
            got="; ".join(f"{name} {mine} here, {other} in {config.extends}" for name, other, mine in different),
            do="take over that run's, or train anew without pretrain.extends",
        )
    if their_shards.ref != shards.ref:
        say(
            f"  {config.extends} has read another corpus: from step {state['step']} on this one is read, in its own "
            "order, so that some documents may come again and others late"
        )
    if chosen.get("compiled", frozen["compiled"]) != frozen["compiled"]:
        say(f"  {config.extends} was {'' if chosen['compiled'] else 'not '}compiled: the longer run's bits are others")
    if state["step"] > config.stable_steps:
        raise ConfigError(
            "the run to extend is longer than this one's part at the full rate",
            got=f"{state['step']} steps of it; with pretrain.steps {config.steps} the rate falls after "
            f"{config.stable_steps}",
            do=f"set pretrain.steps to {math.ceil(state['step'] / (1.0 - config.decay_frac))} or more",
        )
    return int(state["step"])


def _deciding(config: PretrainConfig, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide a run's steps at the full rate, with the precision that `auto` came to."""
    free = ("steps", "warmup_frac", "decay_frac", "extends", "compile")
    fields = {name: value for name, value in config.fingerprinted().items() if name not in free}
    return {**fields, "precision": frozen.get("precision", config.precision)}


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What is not the same: dotted name, theirs, ours; of another kind of thing its kind alone."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = ["kind"] if theirs.get("kind") != ours.get("kind") else sorted({*theirs, *ours})
        for key in keys:
            yield from _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif theirs != ours:
        yield name, theirs, ours


def load_model(artifact: Artifact, model: ModelConfig, max_len: int) -> tuple[Transformer, int]:
    """The trained model in fp32 on the CPU, ready to evaluate, and the id that ends a document."""
    from forge_ray.model.transformer import Transformer, load_weights
    from forge_ray.train.saving.checkpoint import load_tensors

    state = artifact.read_json(STATE)
    trained = load_weights(Transformer(model, state["vocab_size"], max_len), load_tensors(artifact, WEIGHTS))
    return trained.eval(), state["end_token"]


# ------------------------------------------------------------------------------------------------------------ driver


def _train(spec: RunSpec) -> None:
    """Runs agents under Ray Train until the workers have ended.

    Ray Train's storage is a temporary folder of this node, on however many nodes the workers are: only its controller
    writes there, which it attaches to the driver's node (Ray 2.60). Left unset it would be `~/ray_results`, for good.
    """
    import ray

    from forge_ray.train.elastic.coordinator import Coordinator
    from forge_ray.train.nodes import agent, scaling

    config = spec.config
    limits = {
        "min_workers": config.min_workers,
        "max_workers": config.max_workers,
        "hang_s": config.hang_s,
        "data_wait_s": config.store_wait_s,
    }
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 100}
    coordinator = ray.remote(**options)(Coordinator).remote(
        spec.run_id, spec.workspace.uri, limits, config.usd_per_node_hour
    )
    loop_config = {
        "spec": spec.to_json(),
        "coordinator": coordinator,
        "threads": config.cpus_per_worker,
        "orphan_s": config.orphan_s,
        "preemption": config.preemption,
    }
    say(f"  run {spec.run_id}: {num_workers_text(config)}, {spec.precision}{', compiled' if spec.compiled else ''}")
    with (
        tempfile.TemporaryDirectory(prefix="forge-train-", ignore_cleanup_errors=True) as folder,
        _Watch(coordinator, spec) as watch,
        unwrapped(),
    ):
        try:
            scaling.fit(
                agent.work,
                loop_config,
                name=f"pretrain-{spec.run_id}-{int(time.time())}",
                folder=folder,
                workers=(config.min_workers, config.max_workers),
                resources=_resources(config),
                max_failures=config.max_failures,
            )
        except ForgeError:
            raise
        except Exception as error:
            if watch.error() is None:
                raise LostError(
                    "Ray Train gave up", got=str(error)[:2000], do="see the agents' logs on Ray's dashboard"
                ) from error
        finally:
            # However this ends, no worker is left behind; only a killed driver leaves them to the next one.
            try:
                ray.get(coordinator.stop.remote(), timeout=_STOP_S)
            except ray.exceptions.RayError:
                say(f"  the workers could not be told to stop: they end by themselves within {config.orphan_s:.0f} s")
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


class _Watch:
    """Shows the coordinator's news as progress while the driver waits for Ray Train."""

    def __init__(self, coordinator: Any, spec: RunSpec) -> None:
        self._coordinator, self._spec = coordinator, spec
        self._stop = threading.Event()
        self._error: ForgeError | None = None
        self._progress: Progress | None = None
        self._rates: list[tuple[float, int]] = []
        self._silent = False
        self._thread = threading.Thread(target=self._watch, name="forge-progress", daemon=True)

    def error(self) -> ForgeError | None:
        """The error that ends the run."""
        return self._error

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        told_s = time.monotonic()
        try:
            while True:
                stopping = self._stop.wait(_POLL_S)
                self._show()
                if stopping:
                    return
                if self._progress is None and time.monotonic() - told_s > _PATIENCE_S:
                    told_s = time.monotonic()
                    say(f"  still waiting for workers: {self._waiting_for()}")
        finally:
            if self._progress:
                self._progress.__exit__(None, None, None)

    def _waiting_for(self) -> str:
        compiling = "they compile first, which takes a minute or two; " if self._spec.compiled else ""
        return f"{compiling}{_free_resources()}, and Ray's dashboard shows who holds the rest"

    def _show(self) -> None:
        import ray

        try:
            news, self._error, summary = ray.get(self._coordinator.news.remote(), timeout=10)
            self._silent = False
        except Exception as error:  # it died with its node, and will be back: training goes on
            if not self._silent:
                say(f"  no news from the workers for now: {type(error).__name__}")
            self._silent = True
            return
        for record in news:
            told = _told(record)
            if told:
                say(f"  {told}")
            if record["event"] == "form" and self._progress is None:
                self._progress = Progress("pretrain", self._spec.config.steps, record["step"]).__enter__()
        steps = [record for record in news if record["event"] == "step"]
        if steps and self._progress:
            last = steps[-1]
            tokens_per_s = sum(row["tokens"] for row in steps) / max(sum(row["wall_s"] for row in steps), 1e-9)
            note = f"loss {last['loss']:.3f}  {tokens_per_s:,.0f} tokens/s  {summary}"
            self._progress.update(last["step"], note.rstrip())


def _told(record: dict[str, Any]) -> str:
    """A line for a person, where an event deserves one."""
    kind = record["event"]
    if kind == "form":
        workers = f"{record['world_size']} worker{'s' if record['world_size'] > 1 else ''} at step {record['step']}"
        lost = f", without {', '.join(record['lost'])}" if record["lost"] else ""
        joined = f", {', '.join(record['joined'])} new" if record["joined"] and record["cause"] == "join" else ""
        stall = f" after {record['stall_s']:.2f} s" if record["cause"] in ("lost", "join", "drain") else ""
        return f"{workers}{lost}{joined}{stall}"
    if kind == "seat" and record["what"] not in ("came", "gone", "stacks"):
        return f"{record['seat']}: {record['what']}{f' ({why})' if (why := record['why']) else ''}"
    if kind == "guard":
        return f"step {record['step']}: {record['verdict']}: {record['reason']}"
    if kind == "checkpoint_failed":
        return f"no checkpoint at step {record['step']}: {record['why']}"
    return ""


def _free_resources() -> str:
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    return ", ".join(
        f"{free.get(name, 0):g} of {total[name]:g} {name}s are free" for name in ("CPU", "GPU") if name in total
    )


def _curve(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Loss and rate by step; a step that was computed twice counts once, as committed last."""
    rows = {row["step"]: row for row in events if row["event"] == "step"}
    names = ("step", "loss", "grad_norm", "rate_frac", "world_size", "wall_s", "data_s")
    return {name: [rows[step].get(name, 0.0) for step in sorted(rows)] for name in names}


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
        "compiled": spec.compiled,
        "reduction": config.reduction,
        "bits_depend_on": state["host_class"],
        "vocab_size": vocab_size,
        "train_flops": train_flops_per_token(spec.model, vocab_size, config.seq_len) * config.steps * tokens_per_step,
    }


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 natively; without it bf16 is slower than fp32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as table:
            flags = table.read()
    except OSError:
        return platform.machine() == "arm64"
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16 "))
