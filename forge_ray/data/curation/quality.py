"""Quality heuristics of the Gopher, C4 and FineWeb papers, for a batch of documents at once.

Owns the figures (`measure`) and the verdict (`judge`); the thresholds are `QualityConfig`. It changes no text, so C4's
rules that cut lines out of documents are not here: `dedup` removes lines that repeat across documents.

Sources: Gopher (Rae et al. 2021, arXiv:2112.11446, section A1.1 and table A1); C4 (Raffel et al. 2020,
arXiv:1910.10683, section 2.2); FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.6). Where a paper leaves a
definition open it is this one:

- Words are those of `text.Texts.words`: letters and digits, no punctuation marks. Gopher's share of words with a letter
  counts pieces between blanks instead, so that tables and rules of symbols are seen.
- Lines are stripped, empty ones do not count; two lines are equal without regard to ASCII case. Paragraphs are runs of
  lines without an empty one between.
- The characters of an n-gram are those of its words, with one blank between for the most frequent n-gram; those of
  duplicate n-grams are the words inside any n-gram that occurred before, each word once. Both are divided by all
  characters of the text. Of n-grams equally frequent the first counts; one that occurs once does not.

The rules were tuned on English web pages. Text without blanks between words (Chinese, Japanese) has words of one
character here and fails `min_mean_word_chars`; other languages want other `stop_words`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forge_ray.config.data import QualityConfig
from forge_ray.data.curation.text import Bools, Hashes, Ints, Spans, Texts, mix, slices

Figures = dict[str, NDArray[Any]]

SHORT_LINE_CHARS = 30
SLICE_CHARS = 4 << 20
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)

_BULLETS = ("-", "*", "•", "‣", "◦", "▪", "●", "·")
_ELLIPSES = ("...", "…")
_TERMINAL = (*".!?\"'", *"”’»。！？．｡…؟۔।॥።။։")
_NGRAM = np.uint64(0xD1342543DE82EF95)


class Verdict(NamedTuple):
    """Why a document is refused."""

    reason: str
    """A stable name to count by, such as `gopher_min_words`."""
    detail: str
    """The figure and the limit, such as `12 words, wanted at least 50`."""


class Rule(NamedTuple):
    """A figure and its limit."""

    reason: str
    figure: str
    is_minimum: bool
    limit: float
    unit: str

    def fails(self, values: NDArray[Any]) -> Bools:
        """Which documents break the rule."""
        return values < self.limit if self.is_minimum else values > self.limit

    def verdict(self, value: float) -> Verdict:
        """What is said of a document with this figure."""
        side = "least" if self.is_minimum else "most"
        return Verdict(self.reason, f"{_plain(value)} {self.unit}, wanted at {side} {_plain(self.limit)}")


def judge(texts: Sequence[str], config: QualityConfig) -> list[Verdict | None]:
    """The first rule that each text breaks, in the order of `rules`; None where it breaks none.

    Cost: on one core of an AMD EPYC that others used too, 2026-11-23: 19 to 26 MB/s, 10,000 of botocore's operations
    or 25,000 docstrings a second; datatrove 0.10.1 with spaCy's words did 0.6 MB/s of the same texts by the same rules.
    N-grams are counted only in texts that break no cheaper rule. Memory at its peak: 20 to 30 bytes for each byte of
    `SLICE_CHARS` of prose, or of the longest text if that is longer; 100 for a text of empty lines alone.
    """
    return [verdict for part in slices(texts, SLICE_CHARS) for verdict in _judge(part, config)]


def _judge(texts: Sequence[str], config: QualityConfig) -> list[Verdict | None]:
    batch = Texts(texts)
    verdicts: list[Verdict | None] = [None] * len(batch)
    words = batch.words()
    alive = np.ones(len(batch), np.bool_)
    plain, heavy = rules(config)
    _decide(_measure_plain(batch, words, config.stop_words), plain, alive, verdicts)
    if heavy and alive.any():
        kept = Spans(*(part[alive[words.document]] for part in words)) if not alive.all() else words
        top, duplicate = config.max_top_ngram_char_frac, config.max_duplicate_ngram_char_frac
        _decide(_measure_ngrams(batch, kept, top, duplicate), heavy, alive, verdicts)
    return verdicts


def measure(texts: Sequence[str], stop_words: Sequence[str] = QualityConfig().stop_words) -> Figures:
    """Every figure that a rule may look at, by name: an array with one value for each text.

    Returns:
        `words`, `mean_word_chars`, `hash_word_ratio`, `ellipsis_word_ratio`, `bullet_line_frac`, `ellipsis_line_frac`,
        `alpha_word_frac`, `stop_words`, `placeholders`, `braces`, `terminal_punctuation_line_frac`, `short_line_frac`,
        `newline_word_ratio`, `duplicate_line_frac`, `duplicate_line_char_frac`, `duplicate_paragraph_frac`,
        `duplicate_paragraph_char_frac`, `top_N_gram_char_frac` (N 2 to 4) and `duplicate_N_gram_char_frac` (5 to 10). A
        share of nothing is 0.
    """
    parts = [_measure(part, stop_words) for part in slices(texts, SLICE_CHARS)] or [_measure([], stop_words)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measure(texts: Sequence[str], stop_words: Sequence[str]) -> Figures:
    batch = Texts(texts)
    words = batch.words()
    return _measure_plain(batch, words, stop_words) | _measure_ngrams(batch, words, TOP_NGRAMS, DUPLICATE_NGRAMS)


def rules(config: QualityConfig) -> tuple[list[Rule], list[Rule]]:
    """The rules in their order: those that are cheap to look at, then those that count n-grams."""
    c = config
    plain = [
        Rule("gopher_min_words", "words", True, c.min_words, "words"),
        Rule("gopher_max_words", "words", False, c.max_words, "words"),
        Rule("gopher_min_mean_word_chars", "mean_word_chars", True, c.min_mean_word_chars, "characters a word"),
        Rule("gopher_max_mean_word_chars", "mean_word_chars", False, c.max_mean_word_chars, "characters a word"),
        Rule("gopher_hashes", "hash_word_ratio", False, c.max_symbol_word_ratio, "# a word"),
        Rule("gopher_ellipses", "ellipsis_word_ratio", False, c.max_symbol_word_ratio, "ellipses a word"),
        Rule("gopher_bullet_lines", "bullet_line_frac", False, c.max_bullet_line_frac, "of lines"),
        Rule("gopher_ellipsis_lines", "ellipsis_line_frac", False, c.max_ellipsis_line_frac, "of lines"),
        Rule("gopher_alpha_words", "alpha_word_frac", True, c.min_alpha_word_frac, "of pieces with a letter"),
        Rule("gopher_stop_words", "stop_words", True, c.min_stop_words, "stop words"),
        Rule("c4_placeholder", "placeholders", False, 0 if c.drop_placeholder else np.inf, "lorem ipsum"),
        Rule("c4_braces", "braces", False, 0 if c.drop_braces else np.inf, "curly brackets"),
        Rule(
            "fineweb_terminal_punctuation",
            "terminal_punctuation_line_frac",
            True,
            c.min_terminal_punctuation_line_frac,
            "of lines",
        ),
        Rule("fineweb_short_lines", "short_line_frac", False, c.max_short_line_frac, "of lines"),
        Rule("fineweb_newlines", "newline_word_ratio", False, c.max_newline_word_ratio, "line ends a word"),
    ]
    for kind in ("paragraph", "line"):
        for part, unit in (("", f"of {kind}s"), ("_char", "of characters")):
            figure = f"duplicate_{kind}{part}_frac"
            plain.append(Rule(f"gopher_duplicate_{kind}{part}s", figure, False, getattr(c, f"max_{figure}"), unit))
    heavy = [
        Rule(f"gopher_{kind}_{size}_gram", f"{kind}_{size}_gram_char_frac", False, limit, "of characters")
        for kind, limits in (("top", c.max_top_ngram_char_frac), ("duplicate", c.max_duplicate_ngram_char_frac))
        for size, limit in sorted(limits.items())
    ]
    return plain, heavy


def _decide(figures: Figures, ordered: list[Rule], alive: Bools, verdicts: list[Verdict | None]) -> None:
    for rule in ordered:
        values = figures[rule.figure]
        for i in np.flatnonzero(alive & rule.fails(values)).tolist():
            verdicts[i] = rule.verdict(values[i])
            alive[i] = False


def _measure_plain(batch: Texts, words: Spans, stop_words: Sequence[str]) -> Figures:
    count = np.bincount(words.document, minlength=len(batch))
    word_chars = _sum(batch.chars(words.start, words.end), words.document, len(batch))
    newlines = _count(np.flatnonzero(batch.data == 0x0A), batch)
    hashes = _count(np.flatnonzero(batch.data == ord("#")), batch)
    braces = _count(np.flatnonzero((batch.data == ord("{")) | (batch.data == ord("}"))), batch)
    return {
        "words": count,
        "mean_word_chars": _share(word_chars, count),
        "hash_word_ratio": _share(hashes, count),
        "ellipsis_word_ratio": _share(_ellipses(batch), count),
        "alpha_word_frac": _alpha(batch),
        "stop_words": _stop_words(words, len(batch), stop_words),
        "placeholders": _placeholders(batch),
        "braces": braces,
        "newline_word_ratio": _share(newlines, count),
        **_measure_lines(batch),
    }


def _measure_lines(batch: Texts) -> Figures:
    every = batch.lines()
    solid = every.end > every.start
    lines = Spans(*(part[solid] for part in every))
    chars, size = batch.chars(lines.start, lines.end), len(batch)
    text_chars = batch.chars(batch.offsets[:-1], batch.offsets[1:])

    def of_lines(which: Bools) -> NDArray[np.float64]:
        return _share(np.bincount(lines.document[which], minlength=size), np.bincount(lines.document, minlength=size))

    figures = {
        "bullet_line_frac": of_lines(_touches(batch, lines, _BULLETS, at_end=False)),
        "ellipsis_line_frac": of_lines(_touches(batch, lines, _ELLIPSES, at_end=True)),
        "terminal_punctuation_line_frac": of_lines(_touches(batch, lines, _TERMINAL, at_end=True)),
        "short_line_frac": of_lines(chars <= SHORT_LINE_CHARS),
    }
    again = _repeats(lines.hash, lines.document)
    figures["duplicate_line_frac"] = of_lines(again)
    figures["duplicate_line_char_frac"] = _share(_sum(chars[again], lines.document[again], size), text_chars)
    # A paragraph begins where the line before is empty or of another document.
    number = np.flatnonzero(solid)
    fresh = np.ones(len(number), np.bool_)
    fresh[1:] = (np.diff(number) > 1) | (np.diff(lines.document) > 0)
    first = np.flatnonzero(fresh)
    document = lines.document[first]
    place = np.arange(len(number)) - first[np.cumsum(fresh) - 1]
    keys = _reduce(mix(lines.hash + mix(place.astype(np.uint64))), first)
    again, paragraph_chars = _repeats(keys, document), _reduce(chars, first)
    counts = (np.bincount(document[again], minlength=size), np.bincount(document, minlength=size))
    figures["duplicate_paragraph_frac"] = _share(*counts)
    duplicate_chars = _sum(paragraph_chars[again], document[again], size)
    figures["duplicate_paragraph_char_frac"] = _share(duplicate_chars, text_chars)
    return figures


def _measure_ngrams(batch: Texts, words: Spans, top: Iterable[int], duplicate: Iterable[int]) -> Figures:
    """The n-grams' figures, from the shortest to the longest.

    An n-gram can repeat only where both its (n - 1)-grams do, so each length looks at what the one before left. Of the
    pairs of words in botocore's operations 28% go on to triples, 11% to runs of five, 3% to runs of ten.
    """
    top, duplicate, size = set(top), set(duplicate), len(batch)
    text_chars = batch.chars(batch.offsets[:-1], batch.offsets[1:])
    word_chars = batch.chars(words.start, words.end)
    before = np.append(0, np.cumsum(word_chars))
    figures: Figures = {f"top_{n}_gram_char_frac": np.zeros(size) for n in top}
    figures |= {f"duplicate_{n}_gram_char_frac": np.zeros(size) for n in duplicate}
    at = np.arange(len(words.hash))
    keys = words.hash + mix(words.document.astype(np.uint64))
    for n in range(2, max(top | duplicate, default=0) + 1):
        at, keys = _longer(at, keys, n, words)
        order, groups = _groups(keys)
        if not len(groups):
            break
        sizes = np.diff(np.append(groups, len(order)))
        members = at[order]
        first = np.minimum.reduceat(members, groups)
        if n in top:
            chars = (before[first + n] - before[first] + n - 1) * sizes
            document = words.document[first]
            best = np.lexsort((-first, sizes, document))
            last = best[np.append(np.diff(document[best]) > 0, True)]
            figures[f"top_{n}_gram_char_frac"][document[last]] = chars[last] / text_chars[document[last]]
        if n in duplicate:
            later = np.sort(members[members != np.repeat(first, sizes)])
            # Where one run overlaps the next, its words count up to there.
            stop = np.minimum(later + n, np.append(later[1:], len(words.hash)))
            total = _sum(before[stop] - before[later], words.document[later], size)
            figures[f"duplicate_{n}_gram_char_frac"] = _share(total, text_chars)
        again = np.sort(order)
        at, keys = at[again], keys[again]
    return figures


def _longer(at: Ints, keys: Hashes, size_words: int, words: Spans) -> tuple[Ints, Hashes]:
    """The runs of `size_words` whose two shorter runs are both among those given, and their keys."""
    follows = np.flatnonzero(np.diff(at) == 1)
    at, keys = at[follows], keys[follows]
    last = at + size_words - 1
    within = last < len(words.hash)
    within[within] = words.document[last[within]] == words.document[at[within]]
    at, keys, last = at[within], keys[within], last[within]
    return at, mix(keys * _NGRAM + words.hash[last])


def _groups(keys: Hashes) -> tuple[Ints, Ints]:
    """The indices of keys that occur more than once, equal ones together, and where in that list each key begins."""
    # Most keys occur once. A table of counts by their low bits finds most of those sooner than sorting them would.
    bits = max((2 * len(keys)).bit_length(), 8)
    low = (keys & np.uint64((1 << bits) - 1)).astype(np.int64)
    maybe = np.flatnonzero(np.bincount(low, minlength=1 << bits)[low] > 1)
    order = maybe[np.argsort(keys[maybe])]
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    member = np.zeros(len(order), np.bool_)
    member[1:] |= same
    member[:-1] |= same
    begins = member.copy()
    begins[1:] &= ~same
    return order[member], np.flatnonzero(begins[member])


def _repeats(keys: Hashes, document: Ints) -> Bools:
    """Which keys occurred before in the same document."""
    order, groups = _groups(keys + mix(document.astype(np.uint64)))
    again = np.zeros(len(keys), np.bool_)
    again[order] = True
    if len(groups):
        again[np.minimum.reduceat(order, groups)] = False
    return again


def _touches(batch: Texts, lines: Spans, marks: Sequence[str], *, at_end: bool) -> Bools:
    """Which lines begin, or end, with one of these marks of at most three bytes."""
    found = np.zeros(len(lines.start), np.bool_)
    for size in (1, 2, 3):
        codes = [mark.encode() for mark in marks if len(mark.encode()) == size]
        if not codes:
            continue
        start = lines.end - size if at_end else lines.start
        value = np.zeros(len(start), np.int64)
        for place in range(size):
            value = value << 8 | batch.lower[start + place]
        table = [int.from_bytes(code, "big") for code in codes]
        found |= np.isin(value, table) & (lines.end - lines.start >= size)
    return found


def _alpha(batch: Texts) -> NDArray[np.float64]:
    """Share of the pieces between blanks that have a letter; every character beyond ASCII counts as one."""
    blank, letter = batch.data <= 0x20, (batch.data | 0x20) - np.uint8(0x61) < 26
    letter |= batch.data >= 0x80
    begins = ~blank
    begins[1:] &= blank[:-1]
    inner = batch.offsets[1:-1]
    inner = inner[inner < len(begins)]
    begins[inner] = ~blank[inner]
    starts = np.flatnonzero(begins)
    letters = np.add.reduceat(letter, starts, dtype=np.int32) if len(starts) else np.empty(0, np.int32)
    return _share(_count(starts[letters > 0], batch), _count(starts, batch))


def _ellipses(batch: Texts) -> Ints:
    """How many of `...` (a run of n points has n // 3) and of the character for it."""
    data = batch.data
    points = data == ord(".")
    triples = np.flatnonzero(points[:-2] & points[1:-1] & points[2:]) if len(data) > 2 else np.empty(0, np.int64)
    document = np.searchsorted(batch.offsets, triples, "right") - 1
    inside = triples + 3 <= batch.offsets[document + 1]
    triples, document = triples[inside], document[inside]
    fresh = np.ones(len(triples), np.bool_)
    fresh[1:] = (np.diff(triples) > 1) | (np.diff(document) > 0)
    first = np.flatnonzero(fresh)
    counts = (np.diff(np.append(first, len(triples))) + 2) // 3
    dots = _sum(counts, document[first], len(batch))
    lead = np.flatnonzero(data == 0xE2)
    single = lead[(batch.lower[lead + 1] == 0x80) & (batch.lower[lead + 2] == 0xA6)]
    return dots + _count(single, batch)


def _stop_words(words: Spans, size: int, stop_words: Sequence[str]) -> Ints:
    """How many different stop words each text has."""
    wanted = np.unique(Texts(list(stop_words)).words().hash)
    if not len(wanted):
        return np.zeros(size, np.int64)
    slot = np.minimum(np.searchsorted(wanted, words.hash), len(wanted) - 1)
    hit = wanted[slot] == words.hash
    cells = np.bincount(words.document[hit] * len(wanted) + slot[hit], minlength=size * len(wanted))
    return (cells.reshape(size, len(wanted)) > 0).sum(axis=1)


def _placeholders(batch: Texts) -> Ints:
    """How often the placeholder text's first words occur."""
    at = np.array([match.start() for match in re.finditer(rb"lorem ipsum", batch.lower.data)], np.int64)
    document = np.searchsorted(batch.offsets, at, "right") - 1
    inside = at + len(b"lorem ipsum") <= batch.offsets[document + 1] if len(at) else np.empty(0, np.bool_)
    return _count(at[inside], batch)


def _plain(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _count(places: Ints, batch: Texts) -> Ints:
    """How many of these places, which must rise, each text has."""
    return np.diff(np.searchsorted(places, batch.offsets))


def _sum(values: NDArray[Any], document: Ints, size: int) -> NDArray[np.float64]:
    return np.bincount(document, weights=values, minlength=size)


def _share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    return part / np.maximum(whole, 1)


def _reduce(values: NDArray[Any], first: Ints) -> NDArray[Any]:
    """Sums over pieces that begin at `first`; numpy's own refuses an empty list."""
    return np.add.reduceat(values, first) if len(first) else values[:0]
