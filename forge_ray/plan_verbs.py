"""What `forge plan` and `forge plan fit` do; the arithmetic is in `plan/`.

`fit` trains a ladder of small runs on the job's own documents, through the same stages as the job itself, and writes
down what it expects of the job before that is trained. `against` holds the outcome beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from forge_ray import pipeline, prices
from forge_ray.artifact import Artifact, Manifest, Workspace, fingerprint
from forge_ray.config import ForgeConfig, ModelConfig
from forge_ray.errors import ArtifactError, ConfigError
from forge_ray.model.arithmetic import block_parameters
from forge_ray.plan import planner, text
from forge_ray.plan.planner import Plan
from forge_ray.telemetry import format_bytes, format_s, say

if TYPE_CHECKING:
    from forge_ray.plan.fit import Prediction, Run

FORMAT_VERSION = 1
STAGE = "plan"
Told = tuple[dict[str, Any], str]


def budget(config: ForgeConfig, out: str) -> Told:
    """What a budget buys; the best option is written to `out`, if it is given."""
    corpus_tokens, shards = _corpus(config)
    plan = planner.make(config, prices.read(config.plan.prices), corpus_tokens)
    if shards and (ladder := _ladder(config, shards)):
        plan = _expecting(plan, ladder)
    if out:
        text.write_job(plan.options[0], out)
    return plan.as_json(), text.as_text(plan) + (f"\n\nwritten to {out}" if out else "")


def fit(config: ForgeConfig) -> Told:
    """Trains the ladder, and writes down what it says of the job.

    Raises:
        ConfigError: The job's model is too small for so many rungs.
    """
    from forge_ray.data.shards import ShardIndex
    from forge_ray.plan import fit as fits
    from forge_ray.plan.fit import Run
    from forge_ray.train import compiled
    from forge_ray.train.pretrain import precision_of

    workspace = Workspace(config.workspace, config.cache_bytes)
    with ExitStack() as stack:
        shards = pipeline.run(config, "tokenize", stack)["tokenize"].artifact
        # Compiled or not, all alike, so that their seconds and bytes can be compared.
        compile_ = "on" if compiled.decide(config.model, config.pretrain) else "off"
        training = config.pretrain.replace(compile=compile_)
        vocab_size, precision = ShardIndex.of(shards).vocab_size, precision_of(training)
        target = Run(config.model, training, vocab_size, training.max_workers, precision)
        rungs: list[Run] = []
        refs: list[str] = []
        plan = config.plan
        for frac in sorted(plan.ladder_largest_frac / plan.ladder_step**k for k in range(plan.ladder_rungs)):
            rung = fits.smaller(target, frac)
            if rung.size in [other.size for other in rungs]:
                raise ConfigError(
                    "the job's model is too small for a ladder of so many different sizes",
                    got=f"{target.size:,} parameters in its blocks, plan.ladder_rungs {plan.ladder_rungs}",
                    do="lower plan.ladder_rungs, or plan a larger model",
                )
            say(f"rung of {rung.size:,} parameters, {rung.tokens:,} tokens")
            measured, ref, ledger = _trained(config, rung, stack)
            rungs.append(measured)
            refs.append(ref)
            nodes = ledger["node_hours"] * 3600 / ledger["wall_s"] if ledger["wall_s"] else 1.0
    prediction = fits.predict(rungs, target)
    trained = pipeline.plan(config, "pretrain")[-1]
    row = {
        "target": trained.ref,
        "before_training": not trained.published,
        "size": target.size,
        "tokens": target.tokens,
        "nodes": nodes,
        "prediction": asdict(prediction),
        "rungs": [
            {
                "ref": ref,
                "size": rung.size,
                "tokens": rung.tokens,
                "bits_per_byte": rung.bits_per_byte,
                "step_s": rung.step_s,
                "peak_bytes": rung.peak_bytes,
            }
            for rung, ref in zip(rungs, refs, strict=True)
        ],
    }
    name = fingerprint(STAGE, FORMAT_VERSION, row, {"pretrain": trained.fingerprint}, {})
    manifest = Manifest(
        stage=STAGE,
        fingerprint=name,
        files=(),
        config=config.model_dump(mode="json"),
        inputs={"tokenize": shards.manifest.fingerprint},
        metrics=row,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if not workspace.has(manifest.ref):
        workspace.publish(manifest)
    if row["before_training"]:
        workspace.set_ref(_name(trained.fingerprint), manifest.ref)
    return {"ref": manifest.ref, **row}, _as_text(row, rungs, prediction, manifest.ref)


def against(trained: Artifact, evaluated: Mapping[str, Any]) -> Told | None:
    """What was expected of a run before it was trained, beside what came of it; none where nothing was.

    Time is steps times the median step on both sides, without the forming of groups, stalls and saving, which the clock
    counts too. Money is that time on as many nodes, at the price that the run was told.
    """
    try:
        planned = trained.workspace.resolve(_name(trained.manifest.fingerprint))
    except ArtifactError:
        return None
    expected, metrics = planned.metrics["prediction"], trained.metrics
    ledger = metrics.get("ledger", {})
    wall_s, node_hours = ledger.get("wall_s") or 0.0, ledger.get("node_hours") or 0.0
    nodes = node_hours * 3600 / wall_s if wall_s else 1.0
    price = trained.manifest.config.get("pretrain", {}).get("usd_per_node_hour", 0.0)
    came_s = metrics["tokens"] / metrics["tokens_per_s"]
    bits = evaluated["bits_per_byte"]["model"]
    row: dict[str, Any] = {
        "ref": planned.ref,
        "created": planned.manifest.created,
        "bits_per_byte": {**expected["bits_per_byte"], **_beside(expected["bits_per_byte"]["median"], bits)},
        "steps_s": {**_beside(expected["hours"] * 3600, came_s), "clock": wall_s or None},
        "peak_bytes": _beside(expected["peak_bytes"], metrics["peak_bytes"]),
    }
    if price:
        wanted_usd = expected["hours"] * planned.metrics.get("nodes", nodes) * price
        row["usd"] = {**_beside(wanted_usd, came_s / 3600 * nodes * price), "clock": node_hours * price}
    return row, _against_as_text(row, price)


def _beside(expected: float, came: float) -> dict[str, float]:
    return {"expected": expected, "came": came, "off_frac": came / expected - 1}


def _against_as_text(row: Mapping[str, Any], price: float) -> str:
    bits, steps, memory = row["bits_per_byte"], row["steps_s"], row["peak_bytes"]
    clock = f"; by the clock {format_s(steps['clock'])}" if steps["clock"] else ""
    lines = [
        f"Expected on {row['created'][:10]}, before it was trained ({row['ref']}), and what came",
        f"  bits per byte  {bits['expected']:.3f} ({bits['low']:.3f} to {bits['high']:.3f})  {bits['came']:.3f}  "
        f"{bits['off_frac']:+.1%}",
        f"  training       {format_s(steps['expected'])}  {format_s(steps['came'])}  {steps['off_frac']:+.1%}  "
        f"(steps times the median step{clock})",
        f"  memory         {format_bytes(memory['expected'])}  {format_bytes(memory['came'])}  "
        f"{memory['off_frac']:+.1%}",
    ]
    if money := row.get("usd"):
        lines += [
            f"  money          ${money['expected']:,.2f}  ${money['came']:,.2f}  {money['off_frac']:+.1%}  "
            f"(of that time, at ${price:g} a node-hour; by the clock ${money['clock']:,.2f})"
        ]
    return "\n".join(lines)


def _trained(config: ForgeConfig, rung: Run, stack: ExitStack) -> tuple[Run, str, dict[str, Any]]:
    """The rung with what was measured, the artifact of its score, and its ledger."""
    quiet = config.evaluate.replace(baselines=(), prompts=())
    job = config.replace(model=rung.model, pretrain=rung.config, evaluate=quiet)
    outcomes = pipeline.run(job, "evaluate", stack, named=False)
    trained, scored = (outcomes[name].artifact for name in ("pretrain", "evaluate"))
    measured = replace(
        rung,
        bits_per_byte=scored.metrics["bits_per_byte"]["model"],
        step_s=rung.step_tokens / trained.metrics["tokens_per_s"],
        peak_bytes=trained.metrics["peak_bytes"],
    )
    return measured, scored.ref, trained.metrics["ledger"]


def _name(trained: str) -> str:
    return f"planned/{trained}"


def _as_text(row: Mapping[str, Any], rungs: list[Run], prediction: Prediction, ref: str) -> str:
    loss = prediction.bits_per_byte
    lines = [
        "  parameters of blocks       tokens  bits per byte      time a step",
        *(f"  {r.size:>20,} {r.tokens:>12,} {r.bits_per_byte:>14.3f} {format_s(r.step_s):>16}" for r in rungs),
        f"  {row['size']:>20,} {row['tokens']:>12,} {loss.median:>14.3f}   <- expected",
        "",
        f"  bits per byte  {loss.median:.3f}, with 90% between {loss.low:.3f} and {loss.high:.3f}",
        f"  training       {format_s(prediction.hours * 3600)} on machines like these, as many as here",
        f"  memory         {format_bytes(prediction.peak_bytes)} for each worker",
        "",
    ]
    if row["before_training"]:
        lines += [f"Written down as {ref} before {row['target']} is trained; `forge run` will tell what came of it."]
    else:
        lines += [f"{row['target']} is trained already: this is written down as {ref}, and is no prediction."]
    return "\n".join(lines)


def _ladder(config: ForgeConfig, shards: Artifact) -> Artifact | None:
    """The newest `plan fit` on these shards, of dense models with the job's context and optimizer."""
    wanted = config.model_dump(mode="json")["pretrain"]
    found = []
    for ref in shards.workspace.refs_of_artifacts():
        if ref.startswith(f"{STAGE}/"):
            fitted = shards.workspace.get(ref)
            trained = fitted.manifest.config["pretrain"]
            alike = all(trained[name] == wanted[name] for name in ("seq_len", "optimizer", "mixture"))
            dense = not fitted.manifest.config["model"]["num_experts"]
            if fitted.manifest.inputs.get("tokenize") == shards.manifest.fingerprint and alike and dense:
                found.append(fitted)
    return max(found, key=lambda fitted: fitted.manifest.created, default=None)


def _expecting(plan: Plan, fitted: Artifact) -> Plan:
    """The plan with what a ladder expects of its options."""
    from forge_ray.plan.fit import Ladder

    ladder = Ladder.of(fitted.metrics)
    options = []
    for option in plan.options:
        size = block_parameters(ModelConfig(depth=option.depth))
        expected = ladder.expects(size, option.tokens, plan.corpus_tokens)
        options.append(replace(option, bits_per_byte=expected))
    return replace(plan, options=tuple(options), ladder=fitted.ref, spoken_for=ladder.spoken_for)


def _corpus(config: ForgeConfig) -> tuple[float, Artifact | None]:
    """Tokens of the training documents: said, guessed from their bytes, or counted in the job's shards, then those."""
    if config.plan.corpus_tokens or config.plan.corpus_bytes:
        return config.plan.corpus_tokens or (config.plan.corpus_bytes or 0.0) / config.plan.bytes_per_token, None
    if config.ingest.sources:
        planned = pipeline.plan(config, "tokenize")[-1]
        if planned.published:
            shards = Workspace(config.workspace, config.cache_bytes).get(planned.ref)
            return float(shards.metrics["train_tokens"]), shards
    raise ConfigError(
        "a plan needs to know how much there is to train on",
        got="neither plan.corpus_tokens nor plan.corpus_bytes, nor token shards that are published",
        do="add --plan.corpus_bytes 2e9, or run `forge tokenize` with the job and plan with it",
    )
