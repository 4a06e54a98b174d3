"""`forge tokenizer sweep` on a real cluster: the drawn sample, the report, and a second run that does nothing again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge_ray.artifact import Workspace
from forge_ray.data import tokenizer as vocabulary
from forge_ray.data.sample import sample
from tests.integration.conftest import Finished, Forge

JOB = """
ingest:
  sources: [{kind: botocore, services: [dynamodb, iam, s3, sns, sqs]}]
  held_out_frac: 0.0
  held_out_groups: [sqs]
tokenizer: {vocab_size: 600, sample_bytes: 300000}
sweep:
  vocab_sizes: [400, 600, 900000]
  patterns: [gpt4, code]
  general: [{kind: files, uri: %s}]
  model: {num_layers: 1, d_model: 32, num_heads: 1, num_kv_heads: 1, d_ff: 64}
  seq_len: 64
  train_flops: 5.0e+9
  scored_bytes: 5000
"""
VERSE = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate, number %d of them.\n"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "verses").mkdir()
    for number in range(5):
        (folder / "verses" / f"{number}.txt").write_text("".join(VERSE % (n * number) for n in range(60)))
    path = folder / "sweep.yaml"
    path.write_text(JOB % (folder / "verses"))
    return path


@pytest.fixture(scope="module")
def swept(forge: Forge, job: Path) -> Finished:
    done = forge("tokenizer", "sweep", str(job), "--json")
    assert done.code == 0, done.stderr[-4000:]
    return done


def test_every_size_and_pattern_is_measured_and_one_is_recommended(swept: Finished) -> None:
    report = swept.result
    trained = {(r["whose"], r["vocab_size"], r["pattern"]): r for r in report["candidates"] if r.get("trials")}
    sizes, patterns = {size for _, size, _ in trained}, {pattern for *_, pattern in trained}
    assert patterns == {"gpt4", "code"}
    assert {400, 600} >= sizes >= {400}
    for row in trained.values():
        assert row["bytes_per_token"] == pytest.approx(report["heldout_bytes"] / row["tokens"])
        assert all(abs(trial["flops"] - 5e9) <= trial["flops"] / trial["steps"] for trial in row["trials"])
    chosen = trained["own", report["recommended"]["vocab_size"], report["recommended"]["pattern"]]
    assert len(chosen["trials"]) == 2
    assert "own 900,000 gpt4" in {row["name"] for row in report["missing"]}
    assert Path(report["page"]).read_text().startswith("<!doctype html>")


def test_the_vocabulary_of_the_sweep_is_the_one_that_the_stage_trains(forge: Forge, job: Path, swept: Finished) -> None:
    done = forge("tokenizer", str(job), "--json")
    assert done.code == 0, done.stderr[-4000:]
    workspace = Workspace(str(forge.workspace))
    stages = done.result["stages"]
    learnt = workspace.get(stages["tokenizer"]["ref"]).read_bytes(vocabulary.FILE)
    tried = workspace.get(swept.result["ref"]).read_bytes("own-600-gpt4.json")
    assert json.loads(learnt)["model"] == json.loads(tried)["model"]
    documents = workspace.get(stages["curate"]["ref"])
    alone = list(sample(documents, "train", 300_000))
    assert stages["tokenizer"]["metrics"]["sample_documents"] == len(alone)
    fields = {"vocab_size": 600, "pattern": "gpt4"}
    special = json.loads(learnt)["added_tokens"]
    text = vocabulary.train([r["text"] for r in alone], special_tokens=[t["content"] for t in special], **fields)
    assert json.loads(text.to_str())["model"] == json.loads(learnt)["model"]


def test_a_second_sweep_is_found_published(forge: Forge, job: Path, swept: Finished) -> None:
    again = forge("tokenizer", "sweep", str(job))
    assert again.code == 0, again.stderr[-4000:]
    assert f"published already, {swept.result['ref']}" in again.stderr
    assert "small models" not in again.stderr
    assert "->  own" in again.stdout
    dry = forge("tokenizer", "sweep", str(job), "--dry-run")
    assert f"skip  {swept.result['ref']}" in dry.stdout
