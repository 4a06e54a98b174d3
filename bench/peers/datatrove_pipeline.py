"""datatrove's curation of a folder of .jsonl.gz, as its own FineWeb example composes it; run by `bench/data.py`.

It runs under an interpreter of its own, which has datatrove and not forge_ray:

    python bench/peers/datatrove_pipeline.py SPEC.json

SPEC: tokenizer, lid (files), keep_alpha_frac, runs (name, docs and out (folders), tasks). After each run it prints a
line of JSON: documents and tokens at the end, wall seconds of each step. One process does all tasks in turn, so nothing
is lost to waiting.

Where datatrove has a choice, the one that costs it least: what passes the filters is written without compression and
goes on to the signatures without being read again; removing duplicates, private data and tokenizing are one pass; no
final text is written; documents are not shuffled within shards.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.lid import FT176LID
from loguru import logger

Row = dict[str, Any]
BUCKETS, ROWS, NGRAM_WORDS, SEED = 14, 8, 5, 1


def stages(spec: Row, run: Row) -> list[tuple[int, list[Any]]]:
    """(tasks, steps) of each executor, in order."""
    out, tasks = run["out"], run["tasks"]
    minhash = MinhashConfig(n_grams=NGRAM_WORDS, num_buckets=BUCKETS, hashes_per_bucket=ROWS, seed=SEED)
    placeholders = C4QualityFilter(
        remove_citations=False,
        filter_no_terminal_punct=False,
        min_num_sentences=-1,
        min_words_per_line=-1,
        max_word_length=-1,
        filter_javascript=False,
        filter_curly_bracket=False,
        filter_policy=False,
    )
    filters = [
        LanguageFilter(languages=["en"], language_threshold=0.5),
        GopherRepetitionFilter(dup_line_char_frac=0.1),
        GopherQualityFilter(max_non_alpha_words_ratio=spec["keep_alpha_frac"]),
        placeholders,
        FineWebQualityFilter(char_duplicates_ratio=0.1),
    ]
    filtered = JsonlWriter(f"{out}/filtered", compression=None)
    signature = MinhashDedupSignature(output_folder=f"{out}/signatures", config=minhash)
    return [
        (tasks, [JsonlReader(run["docs"]), *filters, filtered, signature]),
        (BUCKETS, [MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=minhash)]),
        (1, [MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=minhash)]),
        (
            tasks,
            [
                JsonlReader(f"{out}/filtered"),
                MinhashDedupFilter(f"{out}/remove"),
                PIIFormatter(),
                DocumentTokenizer(
                    f"{out}/tokens", spec["tokenizer"], eos_token="<|endoftext|>", shuffle_documents=False
                ),
            ],
        ),
    ]


def pipeline(spec: Row, run: Row) -> Row:
    """Runs every stage: what came out, and wall seconds of each step."""
    steps: dict[str, float] = {}
    counts: dict[str, dict[str, int]] = {}
    for number, (tasks, blocks) in enumerate(stages(spec, run)):
        began, inside = time.perf_counter(), 0.0
        done = LocalPipelineExecutor(blocks, tasks=tasks, workers=1, logging_dir=f"{run['out']}/logs/{number}").run()
        for step in done.stats:
            name = f"{number} {step.name.split(': ')[-1].encode('ascii', 'ignore').decode().strip()}"
            # The signatures' clock runs while the steps before them work.
            own_s = step.time_stats.total - (inside if "stage 1" in name else 0.0)
            steps[name], inside = own_s, inside + own_s
            counts[name] = {key: int(value.total) for key, value in step.stats.items()}
        steps[f"{number} unpacking, waiting"] = time.perf_counter() - began - inside
    return {
        "passed": counts["0 FineWeb Quality"]["forwarded"],
        "kept": counts["3 MinHash stage 4"]["forwarded"],
        "tokens": sum(path.stat().st_size for path in Path(run["out"], "tokens").glob("*.ds")) // 2,
        "steps": steps,
        "counts": counts,
    }


def main() -> None:
    """Makes the runs of the specification; after each, waits until the caller has looked at what was used so far."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    logger.remove()
    # The model that the package of the other side holds: nothing is downloaded.
    FT176LID.MODEL_URL = spec["lid"]
    versions = {f"peer_{name}": metadata.version(name) for name in ("datatrove", "spacy", "numpy", "tokenizers")}
    for run in spec["runs"]:
        print(json.dumps({"done": run["name"], **pipeline(spec, run), "versions": versions}), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main()
