"""Evaluate: bits per byte on held-out documents, ours beside the baselines on the same bytes, and samples.

Bits per byte compare models of any vocabulary: the bits that a lossless coder driven by the model needs, over the UTF-8
bytes of the text. Owns the choice of text, our model's score, and sampling.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.config import EvaluateConfig, ModelConfig
from forge_ray.data import tokenizer as vocabulary
from forge_ray.data.shards import Shard, ShardIndex, ShardInfo
from forge_ray.evaluate import baselines
from forge_ray.evaluate.baselines import windows
from forge_ray.runtime import map_rows
from forge_ray.telemetry import say
from forge_ray.train.pretrain import load_model

if TYPE_CHECKING:
    import torch

    from forge_ray.model.transformer import Transformer

FORMAT_VERSION = 3
OURS = "model"
_BATCH_DOCUMENTS = 16
_LOGITS_BYTES = 256 << 20
_SEEN_BYTES = 1 << 30
_SEEN_LINE_CHARS = 40


def observe(config: EvaluateConfig) -> dict[str, Any]:
    """Which optional comparators are here, so that one that is installed later gets its row."""
    missing = baselines.smollm2_missing() if "smollm2" in config.baselines else []
    return {"missing": missing}


def run(
    config: EvaluateConfig, model: ModelConfig, seq_len: int, inputs: dict[str, Artifact], workspace: Workspace
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Scores every comparator in its own Ray task.

    Args:
        model: Shape of the trained model.
        seq_len: Its context length.
        inputs: The artifacts `curate`, `tokenizer`, `tokenize`, `pretrain`.

    Returns:
        `report.json` and its figures.
    """
    scorer = _Scorer(config, model, seq_len, {role: artifact.ref for role, artifact in inputs.items()}, workspace)
    jobs = [{"job": name} for name in (OURS, *config.baselines, "samples", "seen")]
    rows = {row["job"]: row for row in map_rows("evaluate", scorer, jobs)}
    samples = rows.pop("samples")["samples"]
    seen_frac = rows.pop("seen")["seen_frac"]
    scores = {name: row["bits_per_byte"] for name, row in rows.items() if row["bits_per_byte"] is not None}
    skipped = {name: row["note"] for name, row in rows.items() if row["bits_per_byte"] is None}
    for name, note in skipped.items():
        say(f"  {name} is left out: {note}")
    metrics = {
        "bits_per_byte": scores,
        "skipped": skipped,
        "heldout_bytes": rows[OURS]["bytes"],
        "heldout_documents": rows[OURS]["documents"],
        "heldout_seen_frac": seen_frac,
        "context_tokens": seq_len,
        "samples": samples,
    }
    if "smollm2" in config.baselines:
        metrics["smollm2_context_tokens"] = config.smollm2_context or seq_len
    if "bigram" in scores:
        counted = sum(shard.tokens for shard in bigram_shards(ShardIndex.of(inputs["tokenize"])))
        metrics["bigram_train_tokens"] = min(counted, baselines.BIGRAM_TRAIN_TOKENS)
    return [workspace.put_bytes("report.json", json.dumps(metrics, indent=1).encode())], metrics


class _Scorer:
    """The Ray task: one comparator over the held-out text."""

    __name__ = "evaluate"

    def __init__(
        self, config: EvaluateConfig, model: ModelConfig, seq_len: int, refs: dict[str, str], workspace: Workspace
    ) -> None:
        self.config, self.model, self.seq_len, self.refs, self.workspace = config, model, seq_len, refs, workspace

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        name = row["job"]
        if name == "samples":
            return [{"job": name, "samples": self._samples()}]
        began = time.monotonic()
        documents = self._get("curate")
        texts = [document["text"] for document in vocabulary.sample(documents, "heldout", self.config.max_bytes)]
        if name == "seen":
            return [{"job": name, "seen_frac": seen_frac(texts, training_texts(documents))}]
        num_bytes = sum(len(text.encode()) for text in texts)
        bits, note = None, ""
        try:
            bits = getattr(self, f"_{name}")(texts)
        except baselines.NotInstalledError as error:
            note = error.what
        return [
            {
                "job": name,
                "bits_per_byte": None if bits is None else bits / num_bytes,
                "note": note,
                "bytes": num_bytes,
                "documents": len(texts),
                "wall_s": time.monotonic() - began,
            }
        ]

    def _get(self, role: str) -> Artifact:
        return self.workspace.get(self.refs[role])

    def _gzip(self, texts: list[str]) -> float:
        return baselines.gzip_bits(texts)

    def _zstd(self, texts: list[str]) -> float:
        return baselines.zstd_bits(texts)

    def _smollm2(self, texts: list[str]) -> float:
        return baselines.smollm2_bits(texts, self.config.smollm2_context or self.seq_len)

    def _bigram(self, texts: list[str]) -> float:
        import numpy as np

        shards = self._get("tokenize")
        index = ShardIndex.of(shards)
        opened = [Shard(shards.local_path(shard.name)) for shard in bigram_shards(index)]
        bigram = baselines.Bigram([shard.tokens for shard in opened], index.vocab_size)
        return sum(bigram.nats(np.asarray(ids)) for ids in self._ids(texts)) / float(np.log(2))

    def _model(self, texts: list[str]) -> float:
        import math

        model, _ = self._trained()
        return sum(nats(model, ids, self.seq_len) for ids in _batched(self._ids(texts))) / math.log(2)

    def _trained(self) -> tuple[Transformer, int]:
        return load_model(self._get("pretrain"), self.model, self.seq_len)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Each text's tokens behind the end token that opens a document."""
        tokenizer = vocabulary.load(self._get("tokenizer"))
        end = vocabulary.end_of_document(tokenizer)
        return [[end, *encoding.ids] for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _samples(self) -> list[dict[str, str]]:
        import torch

        model, end = self._trained()
        tokenizer = vocabulary.load(self._get("tokenizer"))
        generator = torch.Generator().manual_seed(0)
        out = []
        for prompt in self.config.prompts:
            ids = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
            new = generate(model, ids, self.config.sample_tokens, self.config.temperature, end, generator)
            out.append({"prompt": prompt, "continuation": tokenizer.decode(new)})
        return out


def bigram_shards(index: ShardIndex) -> list[ShardInfo]:
    """The training shards whose bigrams are counted: in the order of their SHA-256, which is a fair draw from all
    sources, until `BIGRAM_TRAIN_TOKENS` are reached; the one that reaches them is the last.
    """
    chosen: list[ShardInfo] = []
    num_tokens = 0
    for shard in sorted(index.shards, key=lambda shard: shard.sha256):
        if num_tokens >= baselines.BIGRAM_TRAIN_TOKENS:
            break
        chosen.append(shard)
        num_tokens += shard.tokens
    return chosen


def training_texts(documents: Artifact) -> Iterator[str]:
    """The training documents, at most `_SEEN_BYTES` of them."""
    import pyarrow.parquet as pq

    left = _SEEN_BYTES
    for name in (name for name in documents.names(".parquet") if name.startswith("train")):
        for batch in pq.ParquetFile(documents.local_path(name)).iter_batches(columns=["text"]):
            for text in batch["text"].to_pylist():
                if left <= 0:
                    return
                left -= len(text)
                yield text


def seen_frac(held_out: list[str], training: Iterator[str]) -> float:
    """Share of the held-out bytes in lines that stand word for word in training documents too.

    Holding whole groups out does not keep boilerplate out, and what was seen is easy: the reader should know how much
    of it there is. Lines shorter than `_SEEN_LINE_CHARS` are left out of the count of what was seen.

    Memory: the held-out lines.
    """
    wanted = {line for text in held_out for line in text.splitlines() if len(line) >= _SEEN_LINE_CHARS}
    seen: set[str] = set()
    for text in training:
        seen.update(wanted.intersection(text.splitlines()))
    num_bytes = sum(len(text.encode()) for text in held_out)
    shared = sum(len(line.encode()) for text in held_out for line in text.splitlines() if line in seen)
    return shared / max(num_bytes, 1)


def _batched(documents: list[list[int]]) -> Iterator[list[list[int]]]:
    # Longest first, so that a batch is padded little.
    ordered = sorted(documents, key=len, reverse=True)
    for start in range(0, len(ordered), _BATCH_DOCUMENTS):
        yield ordered[start : start + _BATCH_DOCUMENTS]


def nats(model: Transformer, documents: list[list[int]], context: int) -> float:
    """Negative log-likelihood of every token of every document but its first, in nats."""
    import torch
    import torch.nn.functional as F

    pieces = [(ids[a:b], first - a) for ids in documents for a, b, first in windows(len(ids), context)]
    total = 0.0
    size = max(1, _LOGITS_BYTES // (4 * context * model.vocab_size))
    with torch.inference_mode():
        for start in range(0, len(pieces), size):
            batch = pieces[start : start + size]
            longest = max(len(ids) for ids, _ in batch)
            tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
            targets = torch.full((len(batch), longest - 1), -100)
            for row, (ids, first) in enumerate(batch):
                targets[row, first - 1 : len(ids) - 1] = tokens[row, first : len(ids)]
            logits = model(tokens[:, :-1])
            total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"))
    return total


def generate(
    model: Transformer,
    ids: list[int],
    num_tokens: int,
    temperature: float,
    end: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continues a text token by token, recomputing all each time: for short samples; serving is vLLM's work.

    Args:
        ids: The beginning, at least one token.
        num_tokens: Stops after so many new tokens, or at `end`.
        temperature: 0 takes the likeliest token.

    Returns:
        The new tokens, without `end`.
    """
    import torch

    ids, new = list(ids), []
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = model(torch.tensor([ids[-model.max_len :]]))[0, -1].float()
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
            if token == end:
                break
            ids.append(token)
            new.append(token)
    return new
