"""The company's own vocabulary: a byte-level BPE trained on its documents, with Hugging Face `tokenizers`.

Owns the training sample, the vocabulary and its report. Does not own shards. The artifact is `tokenizer.json`, which
transformers and vLLM read as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.config import TokenizerConfig
from forge_ray.errors import DataError
from forge_ray.runtime import unwrapped
from forge_ray.telemetry import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT_VERSION = 1
REPORT_BYTES = 4 << 20
# The split that GPT-4 and Qwen publish: contractions, words with one leading space or mark, up to three digits, runs of
# punctuation, line ends, blanks.
SPLIT_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def run(config: TokenizerConfig, documents: Artifact, workspace: Workspace) -> tuple[list[FileEntry], dict[str, Any]]:
    """Learns the vocabulary in a Ray task and measures it on held-out text.

    Returns:
        The artifact's files and its metrics (vocabulary size, bytes per token on held-out text).

    Raises:
        DataError: The corpus does not support so many entries.
    """
    import ray

    with unwrapped():
        text, metrics = ray.get(ray.remote(num_cpus=1)(_learn).remote(config, documents.ref, workspace))
    say(f"  {metrics['vocab_size']} entries, {metrics['heldout_bytes_per_token']:.2f} bytes per token on held-out text")
    return [workspace.put_bytes("tokenizer.json", text.encode())], metrics


def load(artifact: Artifact) -> Tokenizer:
    """The tokenizer of an artifact, verified; a special token that stands in a text is text to it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(artifact.read_bytes("tokenizer.json").decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_document(tokenizer: Tokenizer) -> int:
    """The id of the first special token, which ends every document."""
    for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if token.special:
            return token_id
    raise DataError("the tokenizer has no special token to end a document", do="train it with tokenizer.special_tokens")


def sample(documents: Artifact, split: str, max_bytes: int) -> Iterator[dict[str, str]]:
    """Documents of a split in the order of their id (a hash, so a fair draw) until `max_bytes` of text.

    The draw depends on the documents alone, not on how they lie in parts. Memory: the ids, sizes and the drawn rows.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    sizes: list[tuple[str, int]] = []
    parts = [name for name in documents.names(".parquet") if name.startswith(split)]
    for name in parts:
        for batch in pq.ParquetFile(documents.local_path(name)).iter_batches(columns=["id", "text"]):
            sizes += zip(batch["id"].to_pylist(), pc.binary_length(batch["text"]).to_pylist(), strict=True)
    heapq.heapify(sizes)
    chosen, total = set(), 0
    while sizes and total < max_bytes:
        doc_id, size = heapq.heappop(sizes)
        chosen.add(doc_id)
        total += size
    rows = []
    for name in parts:
        for batch in pq.ParquetFile(documents.local_path(name)).iter_batches(columns=["id", "group", "source", "text"]):
            rows += [row for row in batch.to_pylist() if row["id"] in chosen]
    return iter(sorted(rows, key=lambda row: row["id"]))


def _learn(config: TokenizerConfig, documents_ref: str, workspace: Workspace) -> tuple[str, dict[str, Any]]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    documents = workspace.get(documents_ref)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(config.special_tokens),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [row["text"] for row in sample(documents, "train", config.sample_bytes)]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < config.vocab_size:
        raise DataError(
            "the corpus does not support a vocabulary of this size",
            got=f"tokenizer.vocab_size {config.vocab_size}",
            wanted=f"at most {tokenizer.get_vocab_size()}, all that {len(texts)} documents yield",
            do=f"set tokenizer.vocab_size to {tokenizer.get_vocab_size()} or less, or add documents",
        )
    held_out = [row["text"] for row in sample(documents, "heldout", REPORT_BYTES)]
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(held_out))
    num_bytes = sum(len(text.encode()) for text in held_out)
    metrics = {
        "vocab_size": tokenizer.get_vocab_size(),
        "sample_documents": len(texts),
        "sample_bytes": sum(len(text.encode()) for text in texts),
        "heldout_bytes": num_bytes,
        "heldout_tokens": tokens,
        "heldout_bytes_per_token": num_bytes / max(tokens, 1),
    }
    return tokenizer.to_str(), metrics
