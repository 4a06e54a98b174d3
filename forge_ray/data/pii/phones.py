"""Finders of telephone numbers.

Owns the shapes in which numbers are written, and when a shape wants a word beside it. The plans of the countries, which
say whether a number can exist, are those of phonenumbers (libphonenumber).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import phonenumbers

from forge_ray.data.pii.context import Line
from forge_ray.data.pii.identifiers import Finder, Span, shortened

_EXTENSION = r"(?:[ ,;]{0,2}(?:x|ext\.?|extension|#|Durchwahl|poste|int\.?|Apparat)[ .:]{0,2}\d{1,6})?"
_PHONE = re.compile(
    r"(?=[+(\d])(?<![\w.+/#$%@-])(?<![\d:]:)(?!97[89][ -]?\d)(?:\+|\(\+)?\(?\d(?:[ .\-/()]{0,3}\d){6,16}"
    + _EXTENSION
    + r"(?![\w%]|[-/.]\d)"
)
_NANP = re.compile(r"(?:(?:\+|00)?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])\d{3}[.-]\d{4}(?!\d)")
_TRUNK = re.compile(r"\(?0[1-9]\d{0,4}\)?(?:[ ./-]{1,3}|(?<=\)))\d")
# Two digits each: five in France; otherwise, or beside more of them, bytes.
_PAIRS = re.compile(r"\d\d(?:[ .-]{1,3}\d\d)+")
_BYTE_BEFORE = re.compile(r"[0-9A-Fa-f]{2} {1,2}$")
_BYTE_AFTER = re.compile(r" {1,2}[0-9A-Fa-f]{2}\b")
_NO_PHONE = re.compile(
    r"(?:19|20)\d\d([-./ ])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"  # 2026-01-31
    r"|\d{1,2}([-./ ])\d{1,2}\2(?:19|20)\d\d|\d{1,2}/\d{1,2}/\d\d(?!\d)"  # 31.01.2026, 1/31/26
    r"|\+?\d+\.\d+$|\+?\d{1,3}(?:\.\d{1,3}){3}$|\d(?:\.\d+){3,}$"  # 3.14159265, 192.168.100.1, 1.3.6.1.4.1
    r"|\d{5}-\d{4}$|\d{3}-\d\d-\d{4}$"  # ZIP codes, social security numbers
)
_WORDS = re.compile(
    r"phone|fon\b|fono\b|\btele?[fp]|\btel\b|\btél|\bmobil|\bmóvil|\bcell(?:phone| ?no| ?num|:)|^cell$|cellul|portable|"
    r"\bhandy|\bfax|\bdial|\bsms\b|whatsapp|hotline|rufnummer|anruf|\bruf\b|\bring (?:me|us)\b|\btext me|erreich|"
    r"\bm.?appeler|\bappele[rz]|\bjoindre|\bllám|\bllama(?:r|me)|chiam|numero di|recapit|\bmsisdn|\bkontakt|"
    r"\bcontact (?:me|us|number|no)|\breach(?:ed)? (?:me|us|him|her|them|at|on)\b|\bcall(?:ing)?\b[a-z ]{0,12} \|"
)


def phones(regions: tuple[str, ...]) -> Finder:
    """A finder of telephone numbers: international ones of anywhere, national ones of these regions.

    `+` and a country's code, the groups of North America, and groups after a trunk zero stand by themselves if the plan
    has the number; in North America if it could (area codes come and go). Digits in one piece, other groups, and
    numbers whose length alone is right (fictional ones) want a word such as `tel` near them. An extension is taken
    along.
    """
    nanp = bool({"US", "CA", "PR"} & set(regions))

    def find(line: Line) -> Iterator[Span]:
        near: bool | None = None  # whether the line holds such a word at all
        for match in _PHONE.finditer(line.text, line.start, line.end):
            value = match[0]
            if _NO_PHONE.match(value):
                continue
            kind = _shape(line.text, match.start(), value, nanp)
            near = line.says(_WORDS) if near is None else near
            named = near and bool(_WORDS.search(line.context(*match.span())))
            if not kind and not named:
                continue
            for stop in shortened(value, 7):
                # A part of a number shows nothing by itself, but for what begins with a plus.
                shown = kind if stop == len(value) or kind == "international" else ""
                if (shown or named) and _dialable(value[:stop], shown, named, regions):
                    yield match.start(), match.start() + stop
                    break

    return find


def _shape(text: str, start: int, value: str, nanp: bool) -> str:
    """How a number shows that it is one without a word beside it; empty: it does not."""
    if value.startswith(("+", "(+")):
        return "international"
    if nanp and _NANP.match(value):
        return "nanp"
    if not _TRUNK.match(value):
        return ""
    end = start + len(value)
    if _PAIRS.fullmatch(value):
        five = len(value) == 14 and len(set(value[2::3])) == 1
        bytes_ = _BYTE_BEFORE.search(text, max(0, start - 4), start) or _BYTE_AFTER.match(text, end)
        return "trunk" if five and not bytes_ else ""
    return "" if _BYTE_BEFORE.search(text, max(0, start - 4), start) else "trunk"


@lru_cache(maxsize=1 << 14)
def _dialable(value: str, kind: str, named: bool, regions: tuple[str, ...]) -> bool:
    """Whether a plan has the number, or, where shape or words say telephone, has numbers of this length."""
    digits = re.sub(r"\D", "", value)
    if len(set(digits)) < 3 and kind != "nanp":
        return False
    if kind == "international":
        number = _parse(value, None)
        likely = named or len(re.findall(r"\d+", value)) > 1
        return number is not None and (
            phonenumbers.is_valid_number(number) or (likely and phonenumbers.is_possible_number(number))
        )
    if kind == "trunk" and len(digits) < 9 and not named:
        return False
    numbers = [number for region in regions if (number := _parse(value, region))]
    possible = kind == "nanp" or (named and len(digits) >= 9)
    return any(
        phonenumbers.is_valid_number(number) or (possible and phonenumbers.is_possible_number(number))
        for number in numbers
    )


def _parse(value: str, region: str | None) -> phonenumbers.PhoneNumber | None:
    try:
        return phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None
