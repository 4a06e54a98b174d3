"""Words, lines and shingles of a batch against slow plain Python, over texts made to hit the edges."""

import random
import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.data.curation.text import _OWN, _SEPARATORS, Spans, Texts, shingles

PIECES = (
    *("a", "Z", "9", "'", "''", "\u2019", " ", "\t", "\n", "\n\n", "\r\n", ".", "_", "-", "word", "STRASSE", "don't"),
    *("é", "ß", "\u00a0", "\u00ab", "\u2014", "\u200d", "\u3000", "\u3002", "日本", "カ", "한국어", "ﾃ"),
    *("😀", "𠮷", "𝒳", "नमस्ते"),
    *("x" * 7, "y" * 8, "z" * 9, "Abc" * 40, "\x00", "\x7f", "\ud800", "Привет", "٣", "\ufffd"),
)


def texts(seed: int, count: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.choice([0, 1, 2, 5, 40, 200]))) for _ in range(count)]


def kind(char: str) -> str:
    point = ord(char)
    if point < 0x80:
        return "letter" if char.isalnum() else "separator"
    if any(first <= point <= last for first, last in _OWN):
        return "own"
    return "separator" if any(first <= point <= last for first, last in _SEPARATORS) else "letter"


def words_slowly(text: str) -> list[str]:
    found, current = [], ""
    for i, char in enumerate(text):
        inside = char in "'\u2019" and 0 < i < len(text) - 1 and kind(text[i - 1]) == kind(text[i + 1]) == "letter"
        if kind(char) == "letter" or inside:
            current += char
            continue
        found += [current] if current else []
        found += [char] if kind(char) == "own" else []
        current = ""
    return found + ([current] if current else [])


def pieces(batch: Texts, spans: Spans) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(len(batch))]
    for start, end, document in zip(spans.start, spans.end, spans.document, strict=True):
        assert batch.offsets[document] <= start <= end <= batch.offsets[document + 1]
        found[document].append(batch.data[start:end].tobytes().decode("utf-8", "surrogatepass"))
    return found


def ascii_lower(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in text)


@pytest.mark.parametrize("seed", range(6))
def test_words_are_those_of_plain_python(seed):
    documents = texts(seed)
    batch = Texts(documents)
    assert pieces(batch, batch.words()) == [words_slowly(text) for text in documents]


@pytest.mark.parametrize("seed", range(6))
def test_lines_are_those_of_split_and_strip(seed):
    documents = texts(seed)
    batch = Texts(documents)
    assert pieces(batch, batch.lines()) == [[x.strip(" \t\r\v\f\n") for x in t.split("\n")] for t in documents]


@pytest.mark.parametrize("spans", ["words", "lines"])
def test_hashes_are_equal_exactly_for_texts_equal_but_for_ascii_case(spans):
    documents = texts(7, 200)
    batch = Texts(documents)
    found = getattr(batch, spans)()
    keys = [ascii_lower(piece) for document in pieces(batch, found) for piece in document]
    by_hash = dict(zip(found.hash.tolist(), keys, strict=True))
    assert [by_hash[value] for value in found.hash.tolist()] == keys
    assert len(by_hash) == len(set(keys))


def test_hashes_do_not_depend_on_neighbours_or_place():
    alone = {text: Texts([text]).words().hash[0] for text in ("a", "seven77", "exactly8", "longerthaneight")}
    for text, expected in alone.items():
        for before in range(9):
            batch = Texts(["x" * before + " " + text.upper() + " tail"])
            assert batch.words().hash[1 if before else 0] == expected


def test_every_bit_of_the_hash_is_mixed():
    hashes = Texts([" ".join(f"w{i}" for i in range(20_000))]).words().hash
    ones = [int(((hashes >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    # Five standard deviations of a fair coin: 354.
    assert all(abs(count - 10_000) < 354 for count in ones)


def test_pieces_of_the_same_chunks_in_another_order_differ():
    first, second = Texts(["aaaaaaaabbbbbbbb bbbbbbbbaaaaaaaa"]).words().hash
    assert first != second


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_shingles_are_equal_exactly_for_equal_runs_of_words(seed, size):
    documents = texts(seed) + texts(seed)[:3] + ["a b c d e f", "f e d c b a", "", "a"]
    words = Texts(documents).words()
    hashes, document = shingles(words, size)
    expected = []
    for i in range(len(documents)):
        own = words.hash[words.document == i].tolist()
        expected += [(i, tuple(own[j : j + size])) for j in range(len(own) - size + 1)]
    assert document.tolist() == [i for i, _ in expected]
    runs = dict(zip(hashes.tolist(), (run for _, run in expected), strict=True))
    assert [runs[value] for value in hashes.tolist()] == [run for _, run in expected]
    assert len(runs) == len({run for _, run in expected})


@pytest.mark.parametrize(
    "documents",
    [
        [],
        [""],
        ["", "", ""],
        ["\n"],
        ["a'", "b"],
        ["a", "'b"],
        ["a", "", "b"],
        ["日", "本"],
        ["a\u2019", "b"],
        ["a\n", "\n"],
    ],
)
def test_documents_never_run_into_each_other(documents):
    batch = Texts(documents)
    assert pieces(batch, batch.words()) == [words_slowly(text) for text in documents]
    assert pieces(batch, batch.lines()) == [[line.strip() for line in text.split("\n")] for text in documents]
    assert all(len(part) == len(batch.words().start) for part in batch.words())


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_arrow_gives_what_a_list_gives(type_):
    documents = [text.replace("\ud800", "") for text in texts(3)]
    whole = pa.array(["before", *documents, None, "after"], type_)
    chunks = pa.chunked_array([whole.slice(1, 5), whole.slice(6, len(documents) - 5)])
    for array in (whole.slice(1, len(documents)), chunks):
        batch, wanted = Texts(array), Texts(documents)
        assert all((a == b).all() for a, b in zip(batch.words(), wanted.words(), strict=True))
        assert all((a == b).all() for a, b in zip(batch.lines(), wanted.lines(), strict=True))
    assert pieces(Texts(whole), Texts(whole).lines())[-2:] == [[""], ["after"]]
    assert len(Texts(pa.array([], type_)).words().start) == 0


def test_characters_are_counted_not_bytes():
    documents = texts(5)
    for chosen in (documents, ["plain", "ascii text"]):
        batch = Texts(chosen)
        words = batch.words()
        expected = [len(word) for text in chosen for word in words_slowly(text)]
        assert batch.chars(words.start, words.end).tolist() == expected


def test_the_separators_are_no_letters_of_unicode():
    wrong = [
        hex(point)
        for first, last in _SEPARATORS
        for point in range(first, last + 1)
        if unicodedata.category(chr(point)) in {"Ll", "Lu", "Lt", "Lo", "Mn", "Mc", "Nd"}
        and not 0x3000 <= point <= 0x303F
        and point < 0xE0000
    ]
    assert not wrong
