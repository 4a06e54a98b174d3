"""The company's own vocabulary: a byte-level BPE trained on its documents, with Hugging Face `tokenizers`.

Owns the ways of cutting text before merging, the training of a vocabulary and its report. Does not own the sample
(`sample.py`), shards, or the choice of size and pattern (`evaluate/vocabulary.py`). The artifact is `tokenizer.json`,
which transformers and vLLM read as it is.

Memory: the sample, twice for a moment, and the trainer's counts of its distinct words: 310 MB for 31 MB of kernel
documentation, and no more for four times that text (2026-11). Neither grows with the corpus.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.config import TokenizerConfig
from forge_ray.data.sample import candidates, merged, sample
from forge_ray.errors import ConfigError, DataError
from forge_ray.runtime import unwrapped
from forge_ray.telemetry import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "PATTERNS",
    "check_size",
    "counter",
    "cut_to",
    "end_of_document",
    "learnt",
    "load",
    "measure",
    "run",
    "sample",
    "texts_of",
    "train",
]

FORMAT_VERSION = 2
FILE = "tokenizer.json"
REPORT_BYTES = 4 << 20
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = [r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
# How text is cut into pieces before merging; no token reaches across a cut. Alternatives are tried from the left.
PATTERNS: Mapping[str, str] = {
    # What GPT-4 and Qwen publish: contractions, words with one leading blank or mark, up to three digits, runs of
    # punctuation, line ends, blanks.
    "gpt4": "|".join([_SUFFIX, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", *_BLANKS]),
    # GPT-2: words take a leading blank only, digits run on, lines are blanks like others.
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # gpt4 with every digit by itself, as Llama 2 and DeepSeek have it: numbers of any length look alike.
    "digits1": "|".join([_SUFFIX, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", *_BLANKS]),
    # For identifiers and code: `HTTPServerError` is HTTP, Server, Error and `max_len` max, _len; a line's end and the
    # indentation of the next line are one piece.
    "code": "|".join(
        [
            _SUFFIX,
            r"[^\r\n\p{L}\p{N}]?(?:\p{Lu}+(?!\p{Ll})|\p{Lu}?[\p{Ll}\p{Lt}\p{Lm}\p{Lo}\p{M}]+)",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+",
            r"\s*[\r\n]+[ \t]*",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}


def run(config: TokenizerConfig, documents: Artifact, workspace: Workspace) -> tuple[list[FileEntry], dict[str, Any]]:
    """Learns the vocabulary on Ray and measures it on held-out text.

    Returns:
        The artifact's files and its metrics (vocabulary size, bytes per token on held-out text, by type of document).

    Raises:
        DataError: The corpus does not support so many entries.
    """
    import ray

    with unwrapped():
        pieces = candidates(documents, "train", config.sample_bytes)
        text, drawn = ray.get(ray.remote(num_cpus=1)(_learn).remote(config, pieces))
        measured = ray.get(ray.remote(num_cpus=1)(_measured).remote(text, documents.ref, workspace))
    metrics = {**drawn, **measured}
    say(f"  {metrics['vocab_size']} entries, {metrics['heldout_bytes_per_token']:.2f} bytes per token on held-out text")
    return [workspace.put_bytes(FILE, text.encode())], metrics


def load(artifact: Artifact) -> Tokenizer:
    """The tokenizer of an artifact, verified; a special token that stands in a text is text to it."""
    return _parsed(artifact.read_bytes(FILE).decode())


def end_of_document(tokenizer: Tokenizer) -> int:
    """The id of the first special token, which ends every document."""
    for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if token.special:
            return token_id
    raise DataError("the tokenizer has no special token to end a document", do="train it with tokenizer.special_tokens")


def train(texts: Iterable[str], *, vocab_size: int, pattern: str, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE; smaller than asked for where the texts hold no more pairs to merge.

    Raises:
        ConfigError: It would not hold the special tokens and the 256 bytes.
    Cost: 5 MB of text a second and core, then seconds for the merges: 16,384 entries of 31 MB took 9 s on one core
        (2026-11, Zen 4).
    Source: byte-level BPE as in GPT-2 (Radford et al. 2019, section 2.2).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    check_size(vocab_size, special_tokens)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_size(vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Refuses a size that leaves no room for the bytes.

    Raises:
        ConfigError: It is too small.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ConfigError(
            "the vocabulary is too small for its special tokens and the 256 bytes",
            got=f"{vocab_size} entries, {len(special_tokens)} special tokens",
            wanted=f"at least {least} entries",
            do="raise tokenizer.vocab_size (sweep.vocab_sizes in a sweep), or reserve fewer special tokens",
        )


def cut_to(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The vocabulary of a smaller size that the same training would have given: BPE takes its merges one by one."""
    body = json.loads(tokenizer.to_str())
    ids = body["model"]["vocab"]
    merges, highest = [], -1
    for left, right in body["model"]["merges"]:
        if highest == vocab_size - 1 or ids[left + right] >= vocab_size:
            break
        highest = max(highest, ids[left + right])
        merges.append([left, right])
    body["model"] |= {"vocab": {token: i for token, i in ids.items() if i < vocab_size}, "merges": merges}
    return _parsed(json.dumps(body))


def texts_of(table: Any) -> Iterator[str]:
    """The column `text`, a batch of Python strings at a time."""
    for batch in table.select(["text"]).to_batches(max_chunksize=256):
        yield from batch["text"].to_pylist()


def counter(tokenizer: Tokenizer) -> Callable[[list[str]], list[int]]:
    """Numbers of tokens of texts, for `measure`."""
    return lambda texts: [len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def measure(count: Callable[[list[str]], list[int]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes and tokens of documents: `bytes`, `tokens`, `bytes_per_token`, and the last by type in `by`.

    A document's types are its origin, its language and the suffix of its file, where they are known.
    """
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row, tokens in zip(rows, count([row["text"] for row in rows]), strict=True):
        size = len(row["text"].encode())
        for kind in (("", ""), *_types(row)):
            sums[kind][0] += size
            sums[kind][1] += tokens
    num_bytes, num_tokens = sums.pop(("", ""), [0, 0])
    by: dict[str, dict[str, Any]] = {}
    for (what, value), (size, tokens) in sorted(sums.items()):
        by.setdefault(what, {})[value] = {"bytes": size, "tokens": tokens, "bytes_per_token": size / max(tokens, 1)}
    return {"bytes": num_bytes, "tokens": num_tokens, "bytes_per_token": num_bytes / max(num_tokens, 1), "by": by}


def _types(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("origin", "language"):
        if row.get(name):
            yield name, str(row[name])
    suffix = PurePosixPath((row.get("key") or row.get("source") or "").partition("#")[0]).suffix.lower()
    if suffix[1:2].isalpha() and suffix[1:].isalnum():
        yield "suffix", suffix


def _parsed(text: str) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ Ray tasks


def _learn(config: TokenizerConfig, pieces: Iterable[Any]) -> tuple[str, dict[str, Any]]:
    import pyarrow.compute as pc
    import ray

    table = merged(map(ray.get, pieces), config.sample_bytes)
    num_bytes = pc.sum(pc.binary_length(table["text"])).as_py() or 0
    return learnt(config, texts_of(table)), {"sample_documents": len(table), "sample_bytes": num_bytes}


def learnt(config: TokenizerConfig, texts: Iterable[str]) -> str:
    """The vocabulary of these texts as the JSON of `tokenizer.json`.

    Raises:
        DataError: They do not support so many entries.
    """
    tokenizer = train(texts, vocab_size=config.vocab_size, pattern=config.pattern, special_tokens=config.special_tokens)
    if tokenizer.get_vocab_size() < config.vocab_size:
        raise DataError(
            "the corpus does not support a vocabulary of this size",
            got=f"tokenizer.vocab_size {config.vocab_size}",
            wanted=f"at most {tokenizer.get_vocab_size()}, all that the sample yields",
            do=f"set tokenizer.vocab_size to {tokenizer.get_vocab_size()} or less, raise sample_bytes or add documents",
        )
    return tokenizer.to_str()


def _measured(text: str, documents_ref: str, workspace: Workspace) -> dict[str, Any]:
    tokenizer = _parsed(text)
    found = measure(counter(tokenizer), list(sample(workspace.get(documents_ref), "heldout", REPORT_BYTES)))
    return {"vocab_size": tokenizer.get_vocab_size(), **{f"heldout_{name}": value for name, value in found.items()}}
