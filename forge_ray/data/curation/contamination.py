"""Evaluation texts kept out of training, by n-grams of words that both hold.

`Grams`, a task for each held-out part and each file of an evaluation set: the distinct n-grams of each evaluation
document, sorted, as runs. `Join`, a task for each generation that has many runs: as few as fit in memory. `Match`, a
task for each training part and set of runs: the documents of which too large a share stands in the runs. All are
remembered by what went in (`memo.py`), runs of a generation apart from those of others, so that new documents cost
their own reading and one pass over the old text with their n-grams alone.

A training document is contaminated when more than `max_overlap_frac` of its n-grams stand in the evaluation documents
of its own and earlier generations together. A held-out document gives way to an earlier generation's training document
of which it holds more than that share, so that a shard that was made stays as it is.

Owns n-grams, runs and shares. Not covered: documents and evaluation texts of fewer words than an n-gram have none, and
texts that say the same in other words.

Memory of a task: runs are mapped files; a filter of `spill_bytes` / 8 keeps most n-grams from being looked up; text is
read in batches. A match goes once over all n-grams of the evaluation texts for its filter, so many held-out documents
cost as often as there are training parts: lower `ingest.held_out_frac` as a corpus grows. Cost of the rest, measured
2026-11-23 on one busy core: 50 MB/s of English of which 6 documents in 100 overlap, 12 MB/s where half of them do,
because each of these is looked at by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from forge_ray.artifact import FileEntry, Workspace
from forge_ray.config import CurateConfig, FilesSource, IngestConfig
from forge_ray.data.curation.grouping import Part
from forge_ray.data.curation.spill import Columns, read_columns, write_columns
from forge_ray.data.curation.text import Bools, Hashes, Ints, Texts, shingles
from forge_ray.data.reading import formats
from forge_ray.memo import Memo
from forge_ray.runtime import map_rows

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
_OF_FILES = 1 << 32
_BYTES_PER_TEXT_BYTE = 32  # words, their hashes and n-grams, sorted: 17 to 28 by tracemalloc on English text
_BYTES_PER_JOINED = 64  # rows of 16 bytes as they are read, one behind the other, their order, and sorted
_FEW_RUNS = 16
_ROWS_AT_ONCE = 1 << 20
_EVALUATION = IngestConfig(min_document_chars=1)


def find(
    parts: Sequence[Part], firsts: Ints, dropped: Ints, config: CurateConfig, workspace: Workspace
) -> tuple[dict[int, int], dict[int, str]]:
    """Which documents go because of evaluation texts, or, held out, because of older training documents.

    Args:
        parts: The corpus.
        firsts: The number of each part's first document.
        dropped: Documents that are gone already, rising.
        config: What to look for, and where else evaluation texts lie.
        workspace: Where the parts lie and what is remembered.

    Returns:
        For each document that goes the one that it overlaps most (of older training documents the first), and the ids
        of those that are no documents of the corpus: evaluation texts of files, with negative numbers.

    Raises:
        StorageError: An evaluation set does not exist or cannot be read.
    """
    gone = np.zeros(int(firsts[-1]) + parts[-1].documents if len(parts) else 0, np.bool_)
    gone[dropped] = True
    runs, names = _evaluation(parts, firsts, dropped, config, workspace)
    match = Match(config, workspace)
    memo = Memo(workspace, "contamination", FORMAT_VERSION, match.memory())
    train = [i for i, part in enumerate(parts) if part.split == "train" and part.documents]
    found: dict[int, int] = {}
    rows, places = [], []
    for i in train:
        for generation in sorted(runs):
            if generation > parts[i].generation:
                rows.append({"clean": parts[i].clean, "runs": runs[generation], "skip": None, "each": True})
                places.append(int(firsts[i]))
    for first, result in zip(places, map_rows("contamination: new evaluation texts", match, rows, memo)):
        for row, owner in result["found"]:
            if not gone[first + row]:
                found.setdefault(owner, first + row)
    gives_way = np.array(sorted(found), np.int64)
    rows, places = [], []
    for generation, of_one in groupby(train, key=lambda i: parts[i].generation):
        mine = [entry for earlier in sorted(runs) if earlier <= generation for entry in runs[earlier]]
        numbers = list(of_one)
        past = int(firsts[numbers[-1]]) + parts[numbers[-1]].documents  # of later generations all come behind
        skipped = gives_way[gives_way < past]
        skip = write_columns(workspace, {"owner": skipped}) if len(skipped) and mine else None
        rows += [{"clean": parts[i].clean, "runs": mine, "skip": skip, "each": False} for i in numbers if mine]
        places += [int(firsts[i]) for i in numbers if mine]
    for first, result in zip(places, map_rows("contamination", match, rows, memo)):
        found.update({first + row: owner for row, owner in result["found"] if not gone[first + row]})
    return found, names


def _evaluation(
    parts: Sequence[Part], firsts: Ints, dropped: Ints, config: CurateConfig, workspace: Workspace
) -> tuple[dict[int, list[FileEntry]], dict[int, str]]:
    """The runs of each generation's held-out documents, of named files as generation -1, and the files' ids."""
    grams = Grams(config, workspace)
    rows, generations = units(config), []
    generations += [-1] * len(rows)
    for part, first in zip(parts, firsts.tolist()):
        if part.split == "heldout" and part.documents:
            start, end = np.searchsorted(dropped, [first, first + part.documents])
            rows.append({"clean": part.clean, "first": first, "skip": (dropped[start:end] - first).tolist()})
            generations.append(part.generation)
    memo = Memo(workspace, "evaluation", FORMAT_VERSION, grams.memory())
    runs: dict[int, list[FileEntry]] = {}
    names: dict[int, str] = {}
    for generation, row, result in zip(generations, rows, map_rows("evaluation texts", grams, rows, memo), strict=True):
        if result["runs"]:
            runs.setdefault(generation, []).extend(result["runs"])
        if "unit" in row:
            names |= {i - (row["number"] + 1) * _OF_FILES: name for i, name in enumerate(result["ids"])}
    many = sorted(generation for generation, entries in runs.items() if len(entries) > _FEW_RUNS)
    memo = Memo(workspace, "evaluation-joined", FORMAT_VERSION, {})
    rows = [{"runs": runs[generation]} for generation in many]
    joined = map_rows("evaluation texts, joined", Join(config.spill_bytes, workspace), rows, memo)
    return runs | {generation: result["runs"] for generation, result in zip(many, joined, strict=True)}, names


def units(config: CurateConfig) -> list[dict[str, Any]]:
    """A row of `Grams` for each file of the evaluation sets that are named.

    Raises:
        StorageError: A set does not exist or cannot be listed.
    """
    sources = [FilesSource(kind="files", uri=uri) for uri in config.decontaminate.uris]
    listed = [(source, row) for source in sources for row in formats.listing(source)]
    return [{"unit": formats.unit(source, [row]), "number": i} for i, (source, row) in enumerate(listed)]


class Grams:
    """The task of a held-out part or of a file of an evaluation set: its n-grams, as sorted runs.

    Evaluation documents have numbers: their place in the corpus, or negative ones if they come from named files.
    """

    __name__ = "evaluation texts"

    def __init__(self, config: CurateConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace

    def memory(self) -> dict[str, Any]:
        """What decides the result besides the row."""
        return {
            "ngram_words": self.config.decontaminate.ngram_words,
            "normalize": self.config.normalize.fingerprinted(),
        }

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row has a part (`clean`, `first`, `skip`: rows that are dropped) or a `unit` of files and its `number`.

        Returns:
            The entries of the runs, and for files the ids of their documents.
        """
        texts_bytes = _batch_bytes(self.config)
        runs, ids = [], list[str]()
        if "clean" in row:
            skip = np.array(row["skip"], np.int64)
            for start, column in _column(self.workspace, row["clean"], texts_bytes):
                runs += self._run(Texts(column), np.arange(len(column)) + start, row["first"], skip)
        else:
            for texts, sources in self._read(row["unit"], texts_bytes):
                numbers = np.arange(len(texts)) + len(ids)
                runs += self._run(Texts(texts), numbers, -(row["number"] + 1) * _OF_FILES, np.empty(0, np.int64))
                ids += sources
        return [{"runs": runs, "ids": ids}]

    def _read(self, unit: dict[str, Any], texts_bytes: int) -> Iterator[tuple[list[str], list[str]]]:
        """Batches of texts, made alike to the corpus's by the same normalisation, and where they come from."""
        texts, sources, total = list[str](), list[str](), 0
        for item in formats.read(unit, _EVALUATION):
            if not isinstance(item, formats.Document):
                continue
            texts.append(item.text)
            sources.append(item.source)
            total += len(item.text)
            if total > texts_bytes:
                yield self._normalized(texts), sources
                texts, sources, total = [], [], 0
        if texts:
            yield self._normalized(texts), sources

    def _normalized(self, texts: list[str]) -> list[str]:
        if not self.config.normalize.enabled:
            return texts
        from forge_ray.data.curation.normalize import normalize

        return normalize(texts, self.config.normalize)

    def _run(self, texts: Texts, rows: Ints, first: int, skip: Ints) -> list[FileEntry]:
        grams, document = shingles(texts.words(), self.config.decontaminate.ngram_words)
        there = ~np.isin(rows, skip)[document]
        grams, owner = grams[there], rows[document[there]] + first
        if not len(grams):
            return []
        order = np.lexsort((owner, grams))
        grams, owner = grams[order], owner[order]
        new = np.append(True, (grams[1:] != grams[:-1]) | (owner[1:] != owner[:-1]))
        return [write_columns(self.workspace, {"gram": grams[new], "owner": owner[new]})]


class Join:
    """The task of a generation: its runs as few as fit in memory, one behind the other.

    Each task `Match` opens all of them, so ten thousand held-out parts must not mean ten thousand files for each of ten
    thousand training parts.
    """

    __name__ = "join evaluation texts"

    def __init__(self, spill_bytes: int, workspace: Workspace) -> None:
        self.spill_bytes, self.workspace = spill_bytes, workspace

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row has the `runs`; so has the result."""
        runs = [read_columns(self.workspace, entry) for entry in row["runs"]]
        pieces = max(1, -(-sum(len(run["gram"]) for run in runs) * _BYTES_PER_JOINED // self.spill_bytes))
        bounds = np.array([-(-(piece << 64) // pieces) for piece in range(1, pieces)], np.uint64)
        cuts = [[0, *np.searchsorted(run["gram"], bounds).tolist(), len(run["gram"])] for run in runs]
        found = []
        for piece in range(pieces):
            spans = [slice(cut[piece], cut[piece + 1]) for cut in cuts]
            grams, owner = (np.concatenate([r[name][s] for r, s in zip(runs, spans)]) for name in ("gram", "owner"))
            order = np.lexsort((owner, grams))
            if len(order):
                found.append(write_columns(self.workspace, {"gram": grams[order], "owner": owner[order]}))
        return [{"runs": found}]


class Match:
    """The task of a training part: which of its documents stand in evaluation texts, or the other way round."""

    __name__ = "contamination"

    def __init__(self, config: CurateConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace

    def memory(self) -> dict[str, Any]:
        """What decides the result besides the row."""
        return self.config.decontaminate.fingerprinted()

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row has a part (`clean`), the `runs` to look in, and as `skip` a file of documents to pass over there.

        Returns:
            As `found` pairs of a row of the part and an evaluation document. If the row asks for `each`: every pair of
            which the second alone holds too much of the first. Otherwise: documents of which too much stands in all
            evaluation documents together, with the one that holds most, the first of several.
        """
        runs = [read_columns(self.workspace, entry) for entry in row["runs"]]
        skip = read_columns(self.workspace, row["skip"])["owner"] if row["skip"] else np.empty(0, np.int64)
        filter_ = _Filter(runs, self.config.spill_bytes // 8)
        found = list[list[int]]()
        for start, column in _column(self.workspace, row["clean"], _batch_bytes(self.config)):
            grams, document = shingles(Texts(column).words(), self.config.decontaminate.ngram_words)
            limits = np.bincount(document, minlength=len(column)) * self.config.decontaminate.max_overlap_frac
            there = filter_.may_hold(grams)
            grams, document = grams[there], document[there]
            there = _held(grams, runs)
            grams, document = grams[there], document[there]
            candidates = np.flatnonzero(np.bincount(document, minlength=len(column)) > limits)
            bounds = np.searchsorted(document, np.stack([candidates, candidates + 1]))
            for i, first, last in zip(candidates.tolist(), *bounds.tolist()):
                covered, shares = _shares(grams[first:last], runs, skip)
                if row["each"]:
                    found += [[start + i, owner] for owner in sorted(shares) if shares[owner] > limits[i]]
                elif covered > limits[i]:
                    found.append([start + i, min(shares.items(), key=lambda item: (-item[1], item[0]))[0]])
        return [{"found": found}]


class _Filter:
    """A table of the n-grams' leading bits: most n-grams of other texts are turned away by one look."""

    def __init__(self, runs: Sequence[Columns], limit_bytes: int) -> None:
        count = sum(len(run["gram"]) for run in runs)
        bits = min(max((16 * count).bit_length(), 10), max(limit_bytes.bit_length() - 1, 10))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        for run in runs:
            for start in range(0, len(run["gram"]), _ROWS_AT_ONCE):
                self._table[run["gram"][start : start + _ROWS_AT_ONCE] >> self._shift] = True

    def may_hold(self, grams: Hashes) -> Bools:
        return self._table[grams >> self._shift]


def _held(grams: Hashes, runs: Sequence[Columns]) -> Bools:
    """Which n-grams stand in a run."""
    found = np.zeros(len(grams), np.bool_)
    for run in runs:
        at = np.minimum(np.searchsorted(run["gram"], grams), len(run["gram"]) - 1)
        found |= run["gram"][at] == grams
    return found


def _shares(grams: Hashes, runs: Sequence[Columns], skip: Ints) -> tuple[int, Counter[int]]:
    """How many of a document's n-grams stand in evaluation documents, in any and in each of them.

    A phrase of every evaluation document makes as many rows as there are of these for each n-gram, so rows are looked
    at in pieces.
    """
    distinct, times = np.unique(grams, return_counts=True)
    covered = np.zeros(len(distinct), np.bool_)
    shares: Counter[int] = Counter()
    for run in runs:
        first = np.searchsorted(run["gram"], distinct)
        counts = np.searchsorted(run["gram"], distinct, "right") - first
        ends = np.cumsum(counts)
        for start in range(0, int(ends[-1]), _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, int(ends[-1])))
            gram = np.searchsorted(ends, rows, "right")
            owner = run["owner"][first[gram] + rows - (ends - counts)[gram]]
            counted = ~np.isin(owner, skip)
            gram, owner = gram[counted], owner[counted]
            covered[gram] = True
            owners, place = np.unique(owner, return_inverse=True)
            sums = np.bincount(place, times[gram], minlength=len(owners)).astype(np.int64)
            for one, share in zip(owners.tolist(), sums.tolist()):
                shares[one] += share
    return int(times[covered].sum()), shares


def _batch_bytes(config: CurateConfig) -> int:
    return max(config.spill_bytes // _BYTES_PER_TEXT_BYTE, 1)


def _column(workspace: Workspace, clean: FileEntry, texts_bytes: int) -> Iterator[tuple[int, pa.Array]]:
    """The texts of a part in batches of about so many bytes, with the row of the first."""
    import pyarrow.parquet as pq

    start = 0
    file = pq.ParquetFile(workspace.verified(clean, "dedup: cleaned documents"))
    for batch in file.iter_batches(batch_size=256, columns=["text"]):
        texts = batch.column(0)
        sizes = np.diff(np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, texts.offset * 4))
        piece = np.cumsum(sizes) // texts_bytes
        cuts = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(texts)]
        for first, last in pairwise(cuts):
            yield start + first, texts.slice(first, last - first)
        start += len(texts)
