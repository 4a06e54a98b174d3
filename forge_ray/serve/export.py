"""Export: the Hugging Face folder that transformers and vLLM load, compared with the trained model before it is
published.

Owns the model card and the check; names and files are `model/hf.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge_ray import __version__
from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.config import ExportConfig, ModelConfig
from forge_ray.runtime import unwrapped
from forge_ray.telemetry import say

FORMAT_VERSION = 1
_COMPARED_SEQUENCES = 4


def run(
    config: ExportConfig, model: ModelConfig, seq_len: int, inputs: dict[str, Artifact], workspace: Workspace
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Writes and checks the folder in a Ray task.

    Args:
        inputs: The artifacts `ingest`, `tokenizer`, `tokenize`, `pretrain`, `evaluate`.

    Returns:
        The folder's files and the largest difference of log-probabilities.

    Raises:
        ExportError: transformers computes something else from the folder than we do.
    """
    import ray

    refs = {role: artifact.ref for role, artifact in inputs.items()}
    with unwrapped():
        files, metrics = ray.get(ray.remote(num_cpus=1)(_export).remote(config, model, seq_len, refs, workspace))
    say(f"  transformers' log-probabilities differ by at most {metrics['max_logprob_difference']:.1e} (fp32)")
    return files, metrics


def _export(
    config: ExportConfig, shape: ModelConfig, seq_len: int, refs: dict[str, str], workspace: Workspace
) -> tuple[list[FileEntry], dict[str, Any]]:
    import torch

    from forge_ray.data.shards import Shard
    from forge_ray.model import hf
    from forge_ray.train.pretrain import load_model

    inputs = {role: workspace.get(ref) for role, ref in refs.items()}
    model, end_token = load_model(inputs["pretrain"], shape, seq_len)
    shard = Shard(
        inputs["tokenize"].local_path(next(n for n in inputs["tokenize"].names(".tok") if n.startswith("heldout")))
    )
    length = min(seq_len, shard.header.num_tokens)
    starts = [i * length % (shard.header.num_tokens - length + 1) for i in range(_COMPARED_SEQUENCES)]
    tokens = torch.stack([torch.from_numpy(shard.tokens[s : s + length].astype("int64")) for s in starts])
    with tempfile.TemporaryDirectory(prefix="forge-export-") as name:
        folder = Path(name)
        hf.write_folder(folder, model, inputs["tokenizer"].read_bytes("tokenizer.json").decode(), end_token)
        difference = hf.compare(folder, model, tokens, config.logit_tolerance)
        (folder / "README.md").write_text(model_card(config, inputs), encoding="utf-8")
        files = [workspace.put_file(path.name, path) for path in sorted(folder.iterdir())]
    return files, {"max_logprob_difference": difference, "model_name": config.name, "max_model_len": seq_len}


def model_card(config: ExportConfig, inputs: dict[str, Artifact]) -> str:
    """What a reader of the folder should know: origin, size, data, quality, limits."""
    trained, corpus, curated = (inputs[role].metrics for role in ("pretrain", "ingest", "curate"))
    scores = inputs["evaluate"].metrics["bits_per_byte"]
    rows = "\n".join(f"| {name} | {bits:.3f} |" for name, bits in sorted(scores.items(), key=lambda item: item[1]))
    lineage = "\n".join(f"- {role}: `{artifact.ref}`" for role, artifact in inputs.items())
    return f"""---
license: {config.licence}
library_name: transformers
pipeline_tag: text-generation
---
# {config.name}

A language model trained from scratch with Forge-Ray {__version__}: {trained["parameters"]:,} parameters in the shape of
Qwen3, its own vocabulary of {trained["vocab_size"]:,} entries, {trained["tokens"]:,} training tokens from
{curated["train_documents"]:,} documents ({trained["epochs"]:.2f} passes), {trained["train_flops"]:.2e} floating-point
operations.

## Quality on held-out documents

Bits per byte over {inputs["evaluate"].metrics["heldout_bytes"]:,} bytes of {corpus["num_heldout_groups"]} groups
that were never trained on; less is better. All rows score the same bytes, and
{inputs["evaluate"].metrics["heldout_seen_frac"]:.1%} of them stand in lines that training documents have too.

| | bits per byte |
|---|---|
{rows}

## Documents

Of {corpus["train_documents"] + corpus["heldout_documents"]:,} documents that were read,
{curated["train_documents"] + curated["heldout_documents"]:,} were kept.
Curation: {", ".join(curated["steps"]) or "none"}.
Left out: {_counts(curated["dropped"])}. Private details found and treated: {_counts({"": curated["found"]})}.

## Limits

It continues text of its training documents' kind and knows nothing else; it is not tuned to follow instructions. What
it writes may be wrong.

## Lineage

{lineage}
"""


def _counts(groups: Mapping[str, Mapping[str, int]]) -> str:
    """`12 near: near, 3 quality: gopher_min_words`, or `none`."""
    rows = [f"{n:,} {f'{group}: ' if group else ''}{name}" for group, by in groups.items() for name, n in by.items()]
    return ", ".join(rows) or "none"
