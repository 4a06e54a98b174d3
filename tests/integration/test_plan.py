"""A job predicted from small runs of its own documents, and what came of it beside what was expected."""

from __future__ import annotations

from forge_ray.artifact import Workspace
from tests.integration.conftest import TINY, Finished, Forge

JOB = (
    str(TINY),
    "--model.num_layers=3",
    "--model.d_model=160",
    "--model.d_ff=432",
    "--pretrain.steps=30",
    "--pretrain.min_workers=1",
    "--evaluate.baselines=[]",
    "--plan.ladder_rungs=4",
)


def test_a_job_is_predicted_before_it_is_trained_and_the_outcome_is_told_beside_it(forge: Forge, ran: Finished) -> None:
    workspace = Workspace(str(forge.workspace))
    named = workspace.resolve("evaluate").ref
    planned = forge("plan", "fit", *JOB, "--json")
    assert planned.code == 0, planned.stderr[-3000:]
    result = planned.result
    assert result["before_training"]
    assert [rung["size"] for rung in result["rungs"]] == sorted(rung["size"] for rung in result["rungs"])
    assert workspace.resolve("evaluate").ref == named, "a rung is a trial: names stay with the job"

    again = forge("plan", "fit", *JOB, "--json")
    assert again.result == result
    assert "published already" in again.stderr, "rungs are not trained twice"

    trained = forge("evaluate", *JOB)
    assert trained.code == 0, trained.stderr[-3000:]
    assert f"before it was trained ({result['ref']}), and what came" in trained.stdout
    (line,) = (line for line in trained.stdout.splitlines() if line.startswith("  bits per byte  "))
    came = workspace.resolve("evaluate").metrics["bits_per_byte"]["model"]
    assert f"  {came:.3f}  " in line
    late = forge("plan", "fit", *JOB)
    assert "and is no prediction" in late.stdout
    planned_ref = workspace.resolve(f"planned/{result['target'].partition('/')[2]}").ref
    assert planned_ref == result["ref"], "what was written down before stays"
