"""Quality figures against slow plain Python from the module's definitions, and each rule on a text made to break it."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from forge_ray.config import BotocoreSource, QualityConfig
from forge_ray.data.curation.quality import Verdict, judge, measure, rules
from forge_ray.data.reading import botocore_docs

WORDS = (
    "the",
    "The",
    "and",
    "to",
    "cat",
    "Dog",
    "runs",
    "42",
    "e9",
    "don't",
    "naïve",
    "Ünïcode",
    "x",
    "lorem",
    "ipsum",
)
MARKS = ("...", "....", "…", ".", "!", "?", '"', "#", "- ", "• ", "{", "}", "::", "--", ",", "’", "。", "'")


def texts(seed: int, count: int = 60) -> list[str]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        vocabulary = rng.sample(WORDS, rng.randint(1, len(WORDS)))
        lines = []
        for _ in range(rng.randint(0, 14)):
            pieces = rng.choices(vocabulary, k=rng.randint(0, 9)) + rng.choices(MARKS, k=rng.randint(0, 3))
            rng.shuffle(pieces)
            lines.append(rng.choice((" ", " ", "  ", "")).join(pieces) + rng.choice(("", " ", "\t")))
        lines += rng.choices(lines, k=rng.randint(0, 4)) if lines else []
        made.append(rng.choice(("\n", "\n", "\n\n")).join(lines))
    return [*made, "", "\n", "...", "lorem "]


def slowly(text: str) -> dict[str, float]:
    words = [match.lower() for match in re.findall(r"[A-Za-z0-9À-ÖØ-öø-ÿ]+(?:['’][A-Za-z0-9À-ÖØ-öø-ÿ]+)*", text)]
    lines = [line.strip(" \t\r\v\f") for line in text.split("\n")]
    solid = [line for line in lines if line]
    pieces = text.split()
    paragraphs = [tuple(p.split("\n")) for p in re.sub(r"\n{2,}", "\0", "\n".join(lines).strip("\n")).split("\0") if p]
    stop_words = {"the", "be", "to", "of", "and", "that", "have", "with"}

    def per(count: float, whole: float) -> float:
        return count / max(whole, 1)

    def of_lines(holds) -> float:
        return per(sum(map(bool, map(holds, solid))), len(solid))

    figures = {
        "words": len(words),
        "mean_word_chars": per(sum(map(len, words)), len(words)),
        "hash_word_ratio": per(text.count("#"), len(words)),
        "ellipsis_word_ratio": per(text.count("...") + text.count("…"), len(words)),
        "bullet_line_frac": of_lines(lambda line: line[0] in "-*•‣◦▪●·"),
        "ellipsis_line_frac": of_lines(lambda line: line.endswith(("...", "…"))),
        "alpha_word_frac": per(sum(bool(re.search(r"[A-Za-z\x80-\U0010ffff]", p)) for p in pieces), len(pieces)),
        "stop_words": len(stop_words & set(words)),
        "placeholders": text.lower().count("lorem ipsum"),
        "braces": text.count("{") + text.count("}"),
        "terminal_punctuation_line_frac": of_lines(lambda line: line.endswith(tuple(".!?\"'”’»…。"))),
        "short_line_frac": of_lines(lambda line: len(line) <= 30),
        "newline_word_ratio": per(text.count("\n"), len(words)),
    }
    folded = [ascii_lower(line) for line in solid]
    again = [line for i, line in enumerate(folded) if line in folded[:i]]
    figures["duplicate_line_frac"] = per(len(again), len(solid))
    figures["duplicate_line_char_frac"] = per(sum(map(len, again)), len(text))
    blocks = [tuple(map(ascii_lower, block)) for block in paragraphs]
    again = [block for i, block in enumerate(blocks) if block in blocks[:i]]
    figures["duplicate_paragraph_frac"] = per(len(again), len(blocks))
    figures["duplicate_paragraph_char_frac"] = per(sum(len(line) for block in again for line in block), len(text))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if n < 5:
            gram, times = Counter(grams).most_common(1)[0] if grams else ((), 0)
            figures[f"top_{n}_gram_char_frac"] = per(len(" ".join(gram)) * times * (times > 1), len(text))
        else:
            later = [i for i, gram in enumerate(grams) if gram in grams[:i]]
            inside = {i + place for i in later for place in range(n)}
            figures[f"duplicate_{n}_gram_char_frac"] = per(sum(len(words[i]) for i in inside), len(text))
    return figures


def ascii_lower(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in text)


@pytest.mark.parametrize("seed", range(8))
def test_figures_are_those_of_plain_python(seed):
    documents = texts(seed)
    found = measure(documents)
    expected = [slowly(text) for text in documents]
    assert set(found) == set(expected[0])
    for name, values in found.items():
        wrong = [
            (text, value, want[name])
            for text, value, want in zip(documents, values, expected, strict=True)
            if abs(value - want[name]) > 1e-9
        ]
        assert not wrong, (name, wrong[:2])


def test_repetition_that_fills_a_text_is_found_at_every_length():
    figures = measure(
        ["one two three four five six seven eight nine ten eleven " * 3, "a b c d e f g h i j k l m n o p"]
    )
    for n in range(5, 11):
        # Two of three copies are repeats; blanks count in the whole.
        assert figures[f"duplicate_{n}_gram_char_frac"][0] == pytest.approx(2 / 3 * 45 / 56)
        assert figures[f"duplicate_{n}_gram_char_frac"][1] == 0


def test_neighbours_in_a_batch_change_nothing(monkeypatch):
    documents = texts(1, 8)
    documents += ["a..", ".b", "lorem ", "ipsum", "{", "word word", "word word"]
    config = QualityConfig(min_words=1, min_mean_word_chars=0, min_alpha_word_frac=0.5, min_stop_words=0)
    together = measure(documents)
    for i, text in enumerate(documents):
        assert {name: values[i] for name, values in together.items()} == {k: v[0] for k, v in measure([text]).items()}
    whole = judge(documents, config)
    assert whole == [judge([text], config)[0] for text in documents]
    monkeypatch.setattr("forge_ray.data.curation.quality.SLICE_CHARS", 50)
    assert judge(documents, config) == whole
    assert all((measure(documents)[name] == values).all() for name, values in together.items())


PROSE = """The harbour was quiet when Martha came down to look for the boat that her uncle had left behind.
Nobody remembered who owned the long red shed with broken windows, and nobody seemed to mind.
She walked along the wall, counted seven gulls, and thought about what she would have to tell him.
"You could be wrong," said a voice behind her, and it was neither friendly nor cold.
It took an hour to find the key, which hung on a nail under a coat of indeterminate colour."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def unlike(count: int, size: int = 5, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=size)) for _ in range(count)]


def lines_of(words: list[str], per_line: int, end: str = ".") -> str:
    return "\n".join(" ".join(words[i : i + per_line]) + end for i in range(0, len(words), per_line))


BASE = ["the", "and", *unlike(200)]
CASES = {
    "gopher_min_words": "The cat and the dog.",
    "gopher_max_words": " ".join(["the", "and", *unlike(1200)]) + ".",
    "gopher_min_mean_word_chars": "the and " + " ".join(unlike(200, 2)) + ".",
    "gopher_max_mean_word_chars": "the and " + " ".join(unlike(200, 14)) + ".",
    "gopher_hashes": lines_of(BASE, 10, " # # ###."),
    "gopher_ellipses": lines_of(BASE, 5, " ... x."),
    "gopher_bullet_lines": "\n".join("- " + " ".join(unlike(9, 5, i)) + " the and." for i in range(20)),
    "gopher_ellipsis_lines": lines_of(BASE, 20, "..."),
    "gopher_alpha_words": " ".join(f"{word} {i * 7919} |" for i, word in enumerate(BASE)),
    "gopher_stop_words": " ".join(unlike(100)) + " the.",
    "c4_placeholder": PROSE + "\nLorem Ipsum dolor.",
    "c4_braces": PROSE + "\nfunction () { }",
    "fineweb_terminal_punctuation": lines_of(BASE, 12, ""),
    "fineweb_short_lines": lines_of(BASE, 4),
    "fineweb_newlines": "\n\n\n\n".join(" ".join(BASE[i : i + 8]) + "." for i in range(0, 200, 8)),
    "gopher_duplicate_paragraphs": lines_of(BASE, 25) + "\n\nJust this one." * 6,
    "gopher_duplicate_paragraph_chars": lines_of(BASE, 25).replace("\n", "\n\n") + ("\n\n" + PROSE) * 2,
    "gopher_duplicate_lines": lines_of(BASE, 25) + "\nGo on." * 7,
    "gopher_duplicate_line_chars": lines_of(BASE, 25) + ("\n" + " ".join(unlike(25, 6)) + ".") * 3,
    "gopher_top_2_gram": " ".join(f"{word} Strange Bird" for word in BASE) + ".",
    "gopher_top_3_gram": " ".join(" ".join(BASE[i : i + 10]) + " green sands beach" for i in range(0, 200, 10)) + ".",
    "gopher_duplicate_5_gram": PROSE.replace("\n", " ") + " And so. " + " ".join(PROSE.split()[20:60]) + " end.",
}
CONFIG = QualityConfig(enabled=True, drop_braces=True, max_words=1000)


def test_prose_is_kept():
    assert judge([PROSE], CONFIG) == [None]


@pytest.mark.parametrize("reason", sorted(CASES))
def test_each_rule_is_broken_by_its_text(reason):
    # The duplicate lines and paragraphs are each other's neighbours: a text may break the other rule first.
    off = {"gopher_duplicate_lines": {"max_duplicate_line_char_frac": 1.0}}.get(reason, {})
    assert judge([CASES[reason]], CONFIG.replace(**off))[0].reason == reason


def test_a_verdict_says_the_figure_and_the_limit():
    few, many = judge(["The cat and the dog.", CASES["gopher_max_words"]], CONFIG)
    assert few == Verdict("gopher_min_words", "5 words, wanted at least 50")
    assert many == Verdict("gopher_max_words", "1202 words, wanted at most 1000")


def test_every_rule_can_be_switched_off():
    off = QualityConfig(
        **{"min_words": 0, "max_words": 10**9, "min_mean_word_chars": 0, "max_mean_word_chars": 1e9},
        **{"max_symbol_word_ratio": 1e9, "max_bullet_line_frac": 1, "max_ellipsis_line_frac": 1},
        **{"min_alpha_word_frac": 0, "min_stop_words": 0, "stop_words": (), "drop_placeholder": False},
        **{"drop_braces": False, "min_terminal_punctuation_line_frac": 0, "max_short_line_frac": 1},
        **{"max_newline_word_ratio": 1e9, "max_duplicate_line_frac": 1, "max_duplicate_line_char_frac": 1},
        **{"max_duplicate_paragraph_frac": 1, "max_duplicate_paragraph_char_frac": 1},
        **{"max_top_ngram_char_frac": {}, "max_duplicate_ngram_char_frac": {}},
    )
    assert judge([*CASES.values(), *texts(1)], off) == [None] * (len(CASES) + len(texts(1)))


def test_other_ngrams_and_stop_words_than_the_papers_can_be_asked_for():
    text = " ".join(unlike(30)) + " ein Satz der sich wiederholt" * 3
    base = {"min_words": 10, "stop_words": ("ein", "der"), "max_top_ngram_char_frac": {}}
    kept = QualityConfig(**base, max_duplicate_ngram_char_frac={})
    assert judge([text + "."], kept) == [None]
    assert judge([text + "."], QualityConfig(**base, max_duplicate_ngram_char_frac={3: 0.1}))[0].reason == (
        "gopher_duplicate_3_gram"
    )


def test_reasons_are_stable_and_each_once():
    names = [rule.reason for part in rules(QualityConfig()) for rule in part]
    assert len(names) == len(set(names))
    assert set(CASES) <= set(names)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    figures = measure(["x"])
    assert all(rule.figure in figures for part in rules(QualityConfig()) for rule in part)


def test_real_documentation_is_mostly_kept():
    source = BotocoreSource(kind="botocore", services=("sqs", "iam"))
    unit = botocore_docs.unit(source, botocore_docs.listing(source))
    documents = [document.text for document in botocore_docs.read(unit, None)]
    verdicts = judge(documents, QualityConfig())
    assert len(documents) > 150
    assert sum(verdict is None for verdict in verdicts) > 0.7 * len(documents)


@pytest.mark.parametrize(
    "text", ["", "\n" * 300_000, "." * 300_000, " a" * 300_000, "x" * 300_000, "# " * 300_000, "\ud800"]
)
def test_hostile_texts_are_refused(text):
    assert judge([text], QualityConfig())[0] is not None
    assert all(np.isfinite(values).all() for values in measure([text]).values())
