"""Unicode repair and normalisation: the first step, so that every later one compares like with like.

Owns what a clean text is: mojibake turned back, one kind of line end, no invisible characters, one Unicode form, no
blanks at the ends of lines. It does not own encodings of files (formats.py decodes) and leaves alone what a reader can
see: quotes, dashes, ligatures (under NFC), indentation, blank lines inside.

What stays although it is invisible: single joiners (U+200C, U+200D) after characters that are not ASCII, because
Persian, the Indic scripts and emoji are spelled with them, and single variation selectors. What goes although some use
it: bidirectional marks and overrides (they can make a text read otherwise than it is stored), soft hyphens, and tag
characters, which can hold instructions that no reviewer sees.

Cost, measured 2026-11-23 on one core of an AMD EPYC that others used too: botocore's English 224 MB/s, README and
licence files (nearly all of them lose a last line end) 73, French 52, German 70, Russian 140, Japanese 217, Persian 27.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from forge_ray.config.data import NormalizeConfig
from forge_ray.errors import NotInstalledError

_MAX_PASSES = 8

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_NEXT_LINE = re.compile("(?<![^\x00-\x7f])\x85")
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f"
)
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_CONTROLS = re.compile(f"[{_INVISIBLE}]+|[{_SELECTORS}]{{2,}}")
_JOINERS = re.compile("(?<![^\x00-\x7f])[\u200c\u200d]+|(?<=[\u200c\u200d])[\u200c\u200d]+")
_SURROGATES = re.compile("[\ud800-\udfff]")
# One set of everything that the patterns above look for: a single set is searched at 3 ns a character, each of the
# others takes 7 to 20 (2026-11-23), and most texts have none of it.
_UNUSUAL = re.compile(f"[\r\x0b\x0c\x85\u2028\u2029\u200c\u200d\ud800-\udfff{_SELECTORS}{_INVISIBLE}]")
_ASCII_UNUSUAL = bytes({*range(0x20), 0x7F} - {0x09, 0x0A})
_ASCII_BLANKS, _BLANKS = " \t", " \t\xa0\u3000"


def normalize(texts: Sequence[str], config: NormalizeConfig) -> list[str]:
    """The texts, cleaned as configured; normalising the result again changes nothing.

    Surrogates are always mended: pairs are joined, lone ones removed, because neither Arrow nor UTF-8 can hold them.
    Line ends are always made `\\n` (from `\\r\\n`, `\\r`, vertical tab, form feed, U+0085, U+2028, U+2029).

    Raises:
        NotInstalledError: `repair` is on and ftfy is missing.
    """
    fixer = _Mojibake() if config.repair else None
    return [_normalize(text, config, fixer) for text in texts]


def _normalize(text: str, config: NormalizeConfig, fixer: _Mojibake | None) -> str:
    # A step may uncover work for an earlier one (NFKC makes plain letters, removed characters meet their neighbours),
    # so the steps run until nothing changes. Clean text takes one pass.
    for _ in range(_MAX_PASSES):
        before = text
        text = _clean_ascii(text, config) if text.isascii() else _clean(text, config, fixer)
        if text == before:
            break
    return text


def _clean_ascii(text: str, config: NormalizeConfig) -> str:
    """The few steps that can change ASCII. `bytes.translate` searches five times as fast as `re`."""
    raw = text.encode("ascii")
    if len(raw.translate(None, _ASCII_UNUSUAL)) != len(raw):
        text = _LINE_ENDS.sub("\n", text)
        text = _CONTROLS.sub("", text) if config.drop_controls else text
    return _trim(text, _ASCII_BLANKS)


def _clean(text: str, config: NormalizeConfig, fixer: _Mojibake | None) -> str:
    if fixer is not None:
        text = fixer.repair(text)
    if _UNUSUAL.search(text):
        if _SURROGATES.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
        text = _LINE_ENDS.sub("\n", text)
        if config.drop_controls:
            text = _JOINERS.sub("", _CONTROLS.sub("", text))
    return _trim(unicodedata.normalize(config.form, text), _BLANKS)


def _trim(text: str, blanks: str) -> str:
    """Without blanks at the ends of lines and without empty lines at both ends of the text."""
    if any(blank + "\n" in text for blank in blanks) or text[-1:] in tuple(blanks):
        # Not a regular expression: on long runs of blanks inside a line it would take quadratic time.
        text = "\n".join([line.rstrip(blanks) for line in text.split("\n")])
    return text.strip("\n")


class _Mojibake:
    """ftfy's repair of text that was decoded with the wrong encoding, line by line, and only where it looks wrong.

    Line by line, because one good curly quote elsewhere would keep ftfy from decoding the whole. Its other repairs
    (quotes, ligatures, widths, HTML entities) are not used: they are matters of taste or of another step.
    """

    def __init__(self) -> None:
        try:
            from ftfy import TextFixerConfig, fix_encoding
        except ImportError:
            raise NotInstalledError(
                "the repair of mojibake needs the package ftfy",
                do="pip install ftfy, or set curate.normalize.repair to false",
            ) from None
        self._fix, self._suspicious = fix_encoding, _suspicious()
        self._config: Any = TextFixerConfig(explain=False)

    def repair(self, text: str) -> str:
        if not self._suspicious.search(text):
            return text
        # U+0085 is a line end after ASCII; after another character it may be half of one ("Ã\x85" is "Å").
        lines = _NEXT_LINE.sub("\n", text).split("\n")
        return "\n".join([self._fix(line, self._config) if self._suspicious.search(line) else line for line in lines])


@cache
def _suspicious() -> re.Pattern[str]:
    """What every text has that ftfy finds bad, and few others have.

    ftfy's own pattern has thirty alternatives, and takes 150 ns for each character of good French. All but three of
    them want two adjacent characters of those that it names, and not both of them common letters; so this pattern wants
    the same, as one set of characters with conditions, which is searched at 3 ns a character.
    """
    from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES

    every = "".join(map(chr, range(0x80, 0xD800)))
    members = {name: set(re.findall(f"[{chars}]", every)) for name, chars in MOJIBAKE_CATEGORIES.items()}
    named = {char for char in BADNESS_RE.pattern if not char.isascii()}.union(*members.values())
    telling = named - members["lower_common"] - members["upper_common"] | {"\u0402"}
    either, one = (f"[{''.join(map(re.escape, sorted(chars)))}]" for chars in (named, telling))
    alone = "(?<=[\x80-\x9f])|(?<=[Œœ])(?![A-Za-z])|(?<=[ÃÂ]) "
    return re.compile(f"{one}(?:{alone}|{either}|(?<={either}{one}))")
