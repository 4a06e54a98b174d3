"""The vocabulary studio (`forge tokenizer sweep`): own vocabularies of several sizes and patterns, measured.

Each is compared by bytes per token on held-out documents, by type of document, with general tokenizers that packages
ship and with general vocabularies of the same size (the first entries of Llama 3.1's, and those trained on general
text); by the share of the parameters that its embeddings take in the job's model; and by the bits per byte of a small
model trained for equal compute (`equal_compute.py`).

Owns what is compared, on Ray, and the report's facts. The verdict is `recommendation.py`, the page
`vocabulary_page.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from forge_ray.artifact import Artifact, FileEntry, Workspace, digest_bytes
from forge_ray.config import ForgeConfig, PretrainConfig, SweepConfig
from forge_ray.data import layout
from forge_ray.data import tokenizer as vocabulary
from forge_ray.data.reading.formats import Document
from forge_ray.data.sample import Draw, candidates, merged, sample
from forge_ray.errors import DataError
from forge_ray.evaluate import general_tokenizers, recommendation, vocabulary_page
from forge_ray.evaluate.equal_compute import Trial
from forge_ray.memo import Memo
from forge_ray.model.arithmetic import num_parameters
from forge_ray.runtime import unwrapped
from forge_ray.telemetry import Progress
from forge_ray.train.pretrain import precision_of

FORMAT_VERSION = 1
OWN, GENERAL, ELSEWHERE = "own", "general", "general tokenizer"
REPORT, PAGE = "report.json", "report.html"
_TERMS, _TERM_CHARS, _TERM_COUNT, _TERM_WORDS = 24, 8, 5, 4000

Row = dict[str, Any]


def observe(config: SweepConfig) -> dict[str, Any]:
    """Which general tokenizers are here, and what the general sources hold now."""
    listings = [layout.reader(source).listing(source) for source in config.general]
    return {
        "tokenizers": {name: general_tokenizers.digest(name) for name in config.tokenizers},
        "general": digest_bytes(json.dumps(listings, sort_keys=True, default=str).encode())[:16],
    }


def run(config: ForgeConfig, documents: Artifact, workspace: Workspace) -> tuple[list[FileEntry], dict[str, Any]]:
    """Trains, measures, compares and recommends.

    Returns:
        `report.json`, `report.html` and each own vocabulary as `own-SIZE-PATTERN.json`; the report's verdict.

    Raises:
        DataError: The corpus supports none of the sizes, or the general sources hold no text.
    """
    study = _Study(config, documents, workspace)
    rows = study.vocabularies() + study.others()
    study.trials(rows)
    for row in rows:
        row["parameters"] = num_parameters(config.model, row["vocab_size"])
        row["embedding_frac"] = 1 - num_parameters(config.model, 0) / row["parameters"]
    chosen, why = recommendation.recommend(rows)
    report = {
        "documents": documents.ref,
        "heldout_bytes": chosen["bytes"],
        "recommended": {"vocab_size": chosen["vocab_size"], "pattern": chosen["pattern"]},
        "why": why,
        "noise": recommendation.noise(rows),
        "candidates": rows,
        "missing": study.missing,
        "terms": study.terms(chosen, rows),
        "small_model": {
            "parameters": num_parameters(config.sweep.model, chosen["vocab_size"]),
            "flops": config.sweep.train_flops,
            "seq_len": config.sweep.seq_len,
            "scored_bytes": config.sweep.scored_bytes,
        },
    }
    files = [
        workspace.put_bytes(REPORT, json.dumps(report, indent=1).encode()),
        workspace.put_bytes(PAGE, vocabulary_page.as_html(report).encode()),
    ]
    for row in (row for row in rows if row["whose"] == OWN):
        name = f"own-{row['vocab_size']}-{row['pattern']}.json"
        files.append(workspace.put_bytes(name, study.texts[row["name"]].encode()))
    return files, {name: report[name] for name in ("recommended", "why", "heldout_bytes", "missing")}


def terms(
    tokenizer: Any, texts: Iterable[str], others: Mapping[str, Callable[[list[str]], list[int]]]
) -> list[dict[str, Any]]:
    """The domain's long words that are one token here and more everywhere else.

    Args:
        tokenizer: Ours.
        texts: Held-out documents; a word must stand in them `_TERM_COUNT` times.
        others: For each tokenizer to compare with, the numbers of tokens of texts.

    Returns:
        At most `_TERMS` rows of `term`, `count`, `pieces` by tokenizer; those that are cut most come first.
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update(re.findall(rf"(?<= )[^\W\d_]{{{_TERM_CHARS},}}", text))
    frequent = [word for word, count in words.most_common(_TERM_WORDS) if count >= _TERM_COUNT]
    spaced = [f" {word}" for word in frequent]
    whole = [w for w, size in zip(frequent, vocabulary.counter(tokenizer)(spaced), strict=True) if size == 1]
    pieces = {name: count([f" {word}" for word in whole]) for name, count in others.items()}
    rows = [
        {"term": word, "count": words[word], "pieces": {name: sizes[i] for name, sizes in pieces.items()}}
        for i, word in enumerate(whole)
    ]
    cut = [row for row in rows if row["pieces"] and min(row["pieces"].values()) > 1]
    return sorted(cut, key=lambda r: (-sum(r["pieces"].values()), -len(r["term"]), -r["count"], r["term"]))[:_TERMS]


class _Study:
    """One sweep: samples are drawn once, and shared by its Ray tasks of one CPU each. `texts` holds tokenizers."""

    def __init__(self, config: ForgeConfig, documents: Artifact, workspace: Workspace) -> None:
        self.config, self.sweep, self.workspace, self.documents = config, config.sweep, workspace, documents
        self.missing: list[dict[str, str]] = []
        self.texts: dict[str, str] = {}
        pieces = candidates(documents, "train", config.tokenizer.sample_bytes)
        self._own = _task(_gathered, pieces, config.tokenizer.sample_bytes)
        self._general = _task(_general_text, config) if self.sweep.general else None
        self._held_out = _task(_held_out, documents.ref, workspace, self.sweep.heldout_bytes)

    def vocabularies(self) -> list[Row]:
        """A row for each vocabulary that is trained here; sizes that a corpus does not support go to `missing`."""
        sources = [(OWN, self._own)] + ([] if self._general is None else [(GENERAL, self._general)])
        kinds = [(whose, pattern, text) for pattern in self.sweep.patterns for whose, text in sources]
        jobs = [_task(_vocabularies, self.config, *kind, self._held_out) for kind in kinds]
        first = self._beginnings_here()
        if first:
            jobs.append(_task(_beginnings, self.config, self._held_out))
        gave = _ordered("vocabularies", jobs)
        rows = []
        for row, text in (pair for found, _ in gave for pair in found):
            self.texts[row["name"]] = text
            rows.append(row)
        for (whose, pattern, _), (_, largest) in zip(kinds, gave, strict=not first):
            for size in (size for size in sorted(set(self.sweep.vocab_sizes)) if size > largest):
                why = f"the sample yields {largest:,} entries at most"
                self.missing.append({"name": _name(whose, size, pattern), "why": why})
        if not any(row["whose"] == OWN for row in rows):
            raise DataError(
                "the corpus supports none of these vocabularies",
                got=", ".join(f"{row['name']}: {row['why']}" for row in self.missing),
                do="add smaller ones to sweep.vocab_sizes, raise tokenizer.sample_bytes, or add documents",
            )
        return rows

    def _beginnings_here(self) -> bool:
        return "llama3" in self.sweep.tokenizers and general_tokenizers.found("llama3") is not None

    def others(self) -> list[Row]:
        """A row for each general tokenizer that is installed; the others go to `missing`."""
        there = [name for name in self.sweep.tokenizers if general_tokenizers.found(name)]
        for name in (name for name in self.sweep.tokenizers if name not in there):
            why = f"not installed; `{general_tokenizers.how_to_add(name)}` adds it"
            self.missing.append({"name": general_tokenizers.LABELS[name], "why": why})
        if self._general is None and not self._beginnings_here():
            why = "sweep.general names no source and Llama 3.1 is not here, so none of the same size is compared"
            self.missing.append({"name": GENERAL, "why": why})
        return _ordered("tokenizers", [_task(_others, name, self._held_out) for name in there])

    def trials(self, rows: list[Row]) -> None:
        """Trains the small models and adds `trials` to the rows: one each, then more for those that could win."""
        trained = [row for row in rows if row["name"] in self.texts]
        self._try(trained, range(1))
        best = sorted((row for row in trained if row["whose"] == OWN), key=recommendation.mean_bits)[:2]
        sizes = {row["vocab_size"] for row in best}
        general = [row for row in trained if row["whose"] == GENERAL and row["vocab_size"] in sizes]
        self._try(best + general, range(1, self.sweep.seeds))

    def _try(self, rows: list[Row], seeds: range) -> None:
        pairs = [(row, seed) for row in rows for seed in seeds]
        jobs = [
            _task(_tried, self.config, self.texts[row["name"]], seed, self._own, self._held_out, self._memo())
            for row, seed in pairs
        ]
        for (row, _), result in zip(pairs, _ordered("small models", jobs), strict=True):
            row.setdefault("trials", []).append(result)

    def _memo(self) -> Memo:
        """So that a sweep that is killed goes on with the trainings that it lacks."""
        sweep = self.sweep.fingerprinted()
        decides = {name: sweep[name] for name in ("model", "seq_len", "micro_batch", "train_flops", "scored_bytes")}
        decides |= {"heldout_bytes": self.sweep.heldout_bytes, "sample_bytes": self.config.tokenizer.sample_bytes}
        decides |= {"optimizer": trial(self.config).config.fingerprinted(), "documents": self.documents.ref}
        return Memo(self.workspace, "sweep", FORMAT_VERSION, decides)

    def terms(self, chosen: Row, rows: list[Row]) -> list[dict[str, Any]]:
        """`terms` of the recommended vocabulary against the general ones that are here."""
        names = [row["tokenizer"] for row in rows if row["whose"] == ELSEWHERE]
        size = chosen["vocab_size"]
        trained = [row["name"] for row in rows if row["whose"] == GENERAL and row["vocab_size"] == size]
        texts = {name: self.texts[name] for name in trained}
        found = _ordered("terms", [_task(_terms, self.texts[chosen["name"]], self._held_out, names, texts)])
        return list(found[0])


def trial(config: ForgeConfig) -> Trial:
    """What all small models of a sweep share: the job's optimizer and schedule; the sweep's shape, batch, compute."""
    pretrain = config.pretrain
    return Trial(
        config.sweep.model,
        PretrainConfig(
            slots=1,
            max_workers=1,
            micro_batch=config.sweep.micro_batch,
            seq_len=config.sweep.seq_len,
            **{name: getattr(pretrain, name) for name in ("optimizer", "warmup_frac", "decay_frac", "grad_clip")},
            precision=pretrain.precision,
        ),
        config.sweep.train_flops,
    )


def _name(whose: str, vocab_size: int, pattern: str) -> str:
    return f"{'own' if whose == OWN else 'general text'} {vocab_size:,} {pattern}"


def _task(function: Callable[..., Any], *inputs: Any) -> Any:
    import ray

    return ray.remote(num_cpus=1)(function).remote(*inputs)


def _ordered(name: str, jobs: list[Any]) -> list[Any]:
    """What the tasks give, in their order; progress is shown as they end."""
    import ray

    with unwrapped(), Progress(name, len(jobs)) as progress:
        left = jobs
        while left:
            done, left = ray.wait(left)
            ray.get(done)  # an error ends the sweep now
            progress.update(len(jobs) - len(left))
        return list(ray.get(jobs))


# ------------------------------------------------------------------------------------------------------------ Ray tasks


def _gathered(pieces: list[Any], max_bytes: int) -> Any:
    import ray

    return merged((ray.get(piece) for piece in pieces), max_bytes).select(["text"])


def _general_text(config: ForgeConfig) -> Any:
    """Documents of the general sources in the order of a hash until the vocabulary's sample is filled."""
    import pyarrow as pa

    draw = Draw(config.tokenizer.sample_bytes)
    for source in config.sweep.general:
        reader = layout.reader(source)
        for item in reader.read(reader.unit(source, reader.listing(source)), config.ingest):
            if isinstance(item, Document):
                name = hashlib.sha256(item.text.encode()).hexdigest()
                if draw.wants(name):
                    draw.add({"id": name, "text": item.text})
    if not draw.rows():
        raise DataError("the general sources hold no text", got=", ".join(s.uri for s in config.sweep.general))
    return pa.table({"text": pa.array([row["text"] for row in draw.rows()], pa.large_string())})


def _held_out(ref: str, workspace: Workspace, max_bytes: int) -> list[dict[str, str]]:
    rows = list(sample(workspace.get(ref), "heldout", max_bytes))
    if not rows:
        raise DataError("no document is held out, so nothing can be measured", got=ref, do="raise ingest.held_out_frac")
    return rows


def _vocabularies(
    config: ForgeConfig, whose: str, pattern: str, table: Any, held_out: list[dict[str, str]]
) -> tuple[list[tuple[Row, str]], int]:
    """Every size of a pattern from one training, the smaller ones as its beginnings; and the largest that it gave."""
    sizes = sorted(set(config.sweep.vocab_sizes))
    special = config.tokenizer.special_tokens
    vocabulary.check_size(sizes[0], special)
    largest = vocabulary.train(
        vocabulary.texts_of(table), vocab_size=sizes[-1], pattern=pattern, special_tokens=special
    )
    found = []
    for size in (size for size in sizes if size <= largest.get_vocab_size()):
        tokenizer = vocabulary.cut_to(largest, size)
        found.append((_row(tokenizer, whose, _name(whose, size, pattern), pattern, held_out), tokenizer.to_str()))
    return found, largest.get_vocab_size()


def _beginnings(config: ForgeConfig, held_out: list[dict[str, str]]) -> tuple[list[tuple[Row, str]], int]:
    found = []
    for size in sorted(set(config.sweep.vocab_sizes)):
        tokenizer = general_tokenizers.beginning(size, config.tokenizer.special_tokens)
        if tokenizer.get_vocab_size() == size:
            found.append(
                (_row(tokenizer, GENERAL, f"Llama 3.1's first {size:,}", "gpt4", held_out), tokenizer.to_str())
            )
    return found, max((row["vocab_size"] for row, _ in found), default=0)


def _row(tokenizer: Any, whose: str, name: str, pattern: str, held_out: list[dict[str, str]]) -> Row:
    measured = vocabulary.measure(vocabulary.counter(tokenizer), held_out)
    return {"name": name, "whose": whose, "vocab_size": tokenizer.get_vocab_size(), "pattern": pattern, **measured}


def _others(name: str, held_out: list[dict[str, str]]) -> Row:
    general = general_tokenizers.load(name)
    row = {"name": general_tokenizers.LABELS[name], "whose": ELSEWHERE, "tokenizer": name, "pattern": ""}
    return row | {"vocab_size": general.vocab_size, **vocabulary.measure(general.count, held_out)}


def _tried(config: ForgeConfig, text: str, seed: int, table: Any, held_out: list[dict[str, str]], memo: Memo) -> Row:
    import torch
    from tokenizers import Tokenizer

    plan, scored = trial(config), Draw(config.sweep.scored_bytes)
    bf16 = precision_of(plan.config) != "fp32"
    key = {"tokenizer": digest_bytes(text.encode()), "seed": seed, "bf16": bf16}
    if known := memo.get(key):
        return known[0]
    torch.set_num_threads(1)
    for row in held_out:
        scored.add(row)
    texts = [row["text"] for row in scored.rows()]
    result = plan.run(Tokenizer.from_str(text), vocabulary.texts_of(table), texts, seed=seed, bf16=bf16)
    memo.put(key, [result])
    return result


def _terms(text: str, held_out: list[dict[str, str]], names: list[str], trained: dict[str, str]) -> list[Row]:
    from tokenizers import Tokenizer

    others = {general_tokenizers.LABELS[name]: general_tokenizers.load(name).count for name in names}
    others |= {name: vocabulary.counter(Tokenizer.from_str(other)) for name, other in trained.items()}
    return terms(Tokenizer.from_str(text), (row["text"] for row in held_out), others)
