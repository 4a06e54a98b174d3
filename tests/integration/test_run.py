"""The whole way, from documents to an answer over HTTP, and what stands in the workspace afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge_ray.artifact import Workspace
from forge_ray.pipeline import STAGE_NAMES
from tests.integration.conftest import TINY, Finished, Forge


def test_every_stage_is_published_with_its_inputs_and_provenance(forge: Forge, ran: Finished) -> None:
    workspace = Workspace(str(forge.workspace))
    for name in STAGE_NAMES:
        artifact = workspace.get(ran.result["stages"][name]["ref"])
        assert artifact.manifest.files
        assert artifact.manifest.wall_s > 0
        assert artifact.manifest.made_by["libraries"]["ray"]
        for role, fingerprint in artifact.manifest.inputs.items():
            assert workspace.has(f"{role}/{fingerprint}")
        for file in artifact.names():
            artifact.local_path(file)


def test_the_held_out_service_is_in_no_training_document(forge: Forge, ran: Finished) -> None:
    import pyarrow.parquet as pq

    documents = Workspace(str(forge.workspace)).get(ran.result["stages"]["ingest"]["ref"])
    groups = {
        split: {
            group
            for name in documents.names(".parquet")
            if name.startswith(split)
            for group in pq.read_table(documents.local_path(name), columns=["group"])["group"].to_pylist()
        }
        for split in ("train", "heldout")
    }
    assert groups["heldout"] == {"sqs"}
    assert "sqs" not in groups["train"]
    assert len(groups["train"]) == 4


def test_all_comparators_scored_the_same_bytes_and_the_missing_one_says_why(ran: Finished) -> None:
    metrics = ran.result["stages"]["evaluate"]["metrics"]
    assert {"model", "gzip", "zstd", "bigram"} <= set(metrics["bits_per_byte"])
    assert ("smollm2" in metrics["bits_per_byte"]) != ("make smollm2" in metrics["skipped"].get("smollm2", ""))
    assert all(0 < bits < 9 for bits in metrics["bits_per_byte"].values())
    assert 0 <= metrics["heldout_seen_frac"] < 0.5


def test_transformers_computes_what_we_do_from_the_exported_folder(ran: Finished) -> None:
    assert ran.result["stages"]["export"]["metrics"]["max_logprob_difference"] < 1e-5


def test_a_second_run_skips_all_stages_and_changes_nothing(forge: Forge, ran: Finished) -> None:
    forge("export", str(TINY))  # other tests trained other models: `latest` comes back to this job's
    before = _state(forge.workspace)
    done = forge("export", str(TINY), "--json")
    assert done.code == 0, done.stderr
    assert all(stage["skipped"] for stage in done.result["stages"].values())
    assert _state(forge.workspace) == before


def test_show_prints_the_way_back_to_the_documents(forge: Forge, ran: Finished) -> None:
    done = forge("show", ran.result["stages"]["export"]["ref"], "--json")
    stages = [row["ref"].partition("/")[0] for row in done.result["lineage"]]
    assert stages[0] == "export"
    assert set(stages) == set(STAGE_NAMES)
    assert "forge_ray" in done.result["lineage"][0]["made_by"]


@pytest.mark.parametrize(
    ("stage", "suffix", "verb"),
    [
        ("tokenize", ".tok", "pretrain"),
        ("pretrain", "model.safetensors", "evaluate"),
        ("export", "model.safetensors", "serve"),
    ],
)
def test_a_flipped_byte_is_refused_with_the_name_of_the_file(
    forge: Forge, ran: Finished, tmp_path: Path, stage: str, suffix: str, verb: str
) -> None:
    damaged = forge.in_copy(tmp_path)
    # Without the verified copy in the session's cache, which is served whatever became of the workspace's.
    damaged.environment = damaged.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ref = ran.result["stages"][stage]["ref"]
    artifact = Workspace(str(damaged.workspace)).get(ref)
    name = artifact.names(suffix)[0]
    flip(artifact.local_path(name))
    # Another setting for the stage that reads it, so that it has to read.
    done = damaged(
        verb,
        str(TINY),
        "--json",
        *{"pretrain": ["--pretrain.seed=7"], "evaluate": ["--evaluate.max_bytes=9999"]}.get(verb, []),
    )
    assert done.code == 4, done.stderr[-3000:]
    assert done.result["error"] == "CorruptError"
    assert f"{ref}:{name}" in done.result["got"]
    assert done.result["do"]


def test_a_flipped_byte_in_the_newest_checkpoint_falls_back_to_the_one_before(
    forge: Forge, ran: Finished, tmp_path: Path
) -> None:
    """The run goes on from an older checkpoint that verifies, says so, and ends in the same weights."""
    damaged = forge.in_copy(tmp_path)
    workspace = Workspace(str(damaged.workspace))
    run = ran.result["stages"]["pretrain"]["ref"]
    newest = sorted((damaged.workspace / "runs" / run.partition("/")[2] / "checkpoints").glob("*.json"))[-1]
    before = {entry["name"]: entry["sha256"] for entry in json.loads(newest.read_text())["files"]}
    (damaged.workspace / "artifacts" / f"{run}.json").unlink()
    flip(damaged.workspace / "blobs" / before["optimizer.safetensors"][:2] / before["optimizer.safetensors"])
    done = damaged("pretrain", str(TINY), "--json")
    assert done.code == 0, done.stderr[-3000:]
    assert workspace.get(run).entry("model.safetensors").sha256 == before["model.safetensors"]


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _state(workspace: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(workspace.rglob("*")) if p.is_file()}
