"""What normalisation mends, what it leaves alone, and that a second time changes nothing."""

import random
import unicodedata

import pytest
from faker import Faker
from ftfy.badness import is_bad

from forge_ray.config.data import NormalizeConfig
from forge_ray.data.curation.normalize import _suspicious, normalize

ALL = NormalizeConfig(enabled=True)
COMPATIBLE = NormalizeConfig(enabled=True, form="NFKC")
BARE = NormalizeConfig(enabled=True, repair=False, drop_controls=False)

PIECES = (
    *("a", "Z ", "é", "e\u0301", "ﬁ", "①", "  ", "\t", "\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"),
    *("\u200b", "\u200c", "\u200d", "\u202e", "\u2066", "\ufeff", "\xad", "\x00", "\x1b", "\x93", "\ud83d", "\ude00"),
    *(
        "Ã©",
        "â€œ",
        "Ã\x85",
        "Ã ",
        "â\x80\x99",
        "Ð¿Ñ€Ð¸",
        "Ã",
        "€",
        "“",
        "”",
        "\u3000",
        "\xa0",
        "日本",
        "क्ष",
        "می\u200cخواهم",
    ),
    *("\ufe0f", "\ufe0f\ufe0f", "\U000e0041", "👩\u200d🚀", "\u0338", "=", "\u1100", "\u1161", "ࢄ", "½", "ª"),
)

CODE = '''def f(x: list[int]) -> str:
\t"""Doc – “quoted”."""
    if x != [] and (x[0] << 2) >= 3:
        return "…" * 3  # naïve → fast

    return f"{x!r}\\n"'''


@pytest.mark.parametrize("config", [ALL, COMPATIBLE, BARE], ids=["all", "nfkc", "bare"])
@pytest.mark.parametrize("seed", range(4))
def test_a_second_time_changes_nothing(config, seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(1500)]
    once = normalize(texts, config)
    assert normalize(once, config) == once
    for text in once:
        text.encode("utf-8")
        assert unicodedata.is_normalized(config.form, text)
        assert not set(text) & set("\r\x0b\x0c\x85\u2028\u2029")
        assert all(line == line.rstrip(" \t") for line in text.split("\n"))


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\r\nb\rc\u2028d\u2029e\x85f\x0cg", "a\nb\nc\nd\ne\nf\ng"),
        ("end  \nof\t\nlines \xa0\n  indented\u3000", "end\nof\nlines\n  indented"),
        ("\n\n  text\n\nmore\n\n", "  text\n\nmore"),
        ("zero\u200bwidth\ufeff so\xadft", "zerowidth soft"),
        ("pay \u202eesrever\u202c \u2066x\u2069", "pay esrever x"),
        ("bell\x07 \x1b[31mred\x1b[0m nul\x00", "bell [31mred[0m nul"),
        ("a\u200db \u200cc é\u200d\u200d\u200c", "ab c é\u200d"),
        ("hid\U000e0069\U000e0067den", "hidden"),
        ("pair \ud83d\ude00, lone \ud83d.", "pair 😀, lone ."),
        ("cafe\u0301", "café"),
        ("cafÃ© â€œnaÃ¯veâ€\x9d", "café “naïve”"),
        ("good “quote”\nbad cafÃ©", "good “quote”\nbad café"),
        ("Ã\x85land", "Åland"),
        ("", ""),
    ],
)
def test_what_is_mended(dirty, clean):
    assert normalize([dirty], ALL) == [clean]


def test_switches_leave_what_they_are_for():
    text = "cafÃ©\u200b\x07 ﬁ"
    assert normalize([text], NormalizeConfig(repair=False)) == ["cafÃ© ﬁ"]
    assert normalize([text], NormalizeConfig(drop_controls=False)) == ["café\u200b\x07 ﬁ"]
    assert normalize([text], NormalizeConfig(form="NFKC")) == ["café fi"]
    assert normalize(["a\x07b\x00"], BARE) == ["a\x07b\x00"]


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        "He said “don’t” – it’s €5 … ½ price",
        "می‌خواهم بروم",
        "क्‍ष and ക്‍",
        "👩‍🚀 👨‍👩‍👧 ❤️ 1️⃣",
        "葛󠄀城市",
        "ÀÉÎÕÜ Ångström Œuvre",
        "« C’est l’été », dit-il à l’œuvre.",
    ],
)
def test_good_text_is_left_alone(text):
    assert normalize([text], ALL) == [text]


LOCALES = (
    "de_DE",
    "fr_FR",
    "es_ES",
    "it_IT",
    "pl_PL",
    "cs_CZ",
    "ru_RU",
    "el_GR",
    "ar_AA",
    "fa_IR",
    "he_IL",
    "ja_JP",
    "th_TH",
)


@pytest.mark.parametrize("locale", LOCALES)
def test_sentences_of_many_languages_are_left_alone_and_found_again_after_a_wrong_decoding(locale):
    fake = Faker(locale)
    fake.seed_instance(11)
    texts = [unicodedata.normalize("NFC", fake.text(160)).strip() for _ in range(40)]
    assert normalize(texts, ALL) == ["\n".join(line.rstrip() for line in text.split("\n")) for text in texts]
    foreign = [text for text in texts if not text.isascii()]
    wrong = [text.encode("utf-8").decode("latin-1") for text in foreign]
    assert normalize(wrong, ALL) == normalize(foreign, ALL)


def test_the_quick_search_misses_nothing_that_ftfy_finds():
    rng = random.Random(5)
    alphabet = [chr(point) for point in range(0x80, 0x2600)] + list("aZ 0.,!?") * 200
    alphabet += list("ВГРСвЂГўΒΓΞΟβ€ÂÃÎÐØÙ√≈‚àœŒ×²³° ™\xa0\x85ā–’“”") * 40
    texts = ["".join(rng.choices(alphabet, k=rng.choice([3, 4, 5]))) for _ in range(60_000)]
    bad = [text for text in texts if is_bad(text)]
    assert len(bad) > 2000
    assert [text for text in bad if not _suspicious().search(text)] == []


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        (" " * 400_000 + "x", " " * 400_000 + "x"),
        ("é" + "\u200c" * 400_000, "é\u200c"),
        ("é\u200d" * 200_000, "é\u200d" * 200_000),
        ("Ã©" * 200_000, "é" * 200_000),
        ("\ud800" * 400_000, ""),
        ("a\r\n" * 200_000 + "é", "a\n" * 200_000 + "é"),
    ],
)
def test_hostile_text_ends(dirty, clean):
    """Each takes minutes where a step takes quadratic time."""
    assert normalize([dirty], ALL) == [clean]
