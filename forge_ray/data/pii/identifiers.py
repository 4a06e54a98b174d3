"""Finders of e-mail addresses, IP addresses, bank accounts, cards and identity numbers.

Owns what such a value looks like, how it is verified, and which words beside it are wanted where its shape alone says
little. Does not own which lines are looked at, nor what is done about a find (privacy.py), nor telephone numbers
(phones.py), keys and passwords (secrets.py). Check digits and formats of numbers are those of python-stdnum.

A finder gets a line of a text and yields (start, end) in the text. Digits are ASCII here: privacy.py folds other
scripts' digits and blanks first.
"""

from __future__ import annotations

import importlib
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from stdnum import iban, luhn

from forge_ray.data.pii.context import Line

Span = tuple[int, int]
Finder = Callable[[Line], Iterator[Span]]

# E-mail -------------------------------------------------------------------------------------------------------------

# Possessive and bounded parts: linear on hostile lines. The local part is RFC 5322's dot-atom without the rare marks.
_EMAIL = re.compile(
    r"(?<![\w.%+&$-])\w(?:[\w.%+'&-]{0,62}[\w+-])?@"
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:[^\W\d_]{2,24}|xn--[a-z0-9-]{2,59})(?![\w@(\[-]|\.\w)"
)
# What follows the last dot of image names (`icon@2x.png`), systemd units (`getty@tty1.service`) and matrix products.
_NOT_TLD = re.compile(
    r"(?i)png|jpe?g|gif|svg|webp|ico|css|m?jsx?|tsx?|map|json|html?|php|ya?ml|toml|txt|md|rst|conf|log|"
    r"service|socket|timer|mount|target|slice|device|path|scope|shape|size|data|dtype"
)


def emails(line: Line) -> Iterator[Span]:
    """E-mail addresses, international ones too; `git@host:path` and `user@host` without a domain are none."""
    for match in _EMAIL.finditer(line.text, line.start, line.end):
        local, _, domain = match[0].rpartition("@")
        if _NOT_TLD.fullmatch(domain.rpartition(".")[2]) or ".." in local:
            continue
        # An account of a code host in an address to clone from, the same for everyone.
        if local == "git":
            continue
        yield match.span()


# IP addresses -------------------------------------------------------------------------------------------------------

_IPV4 = re.compile(r"(?<![\w.:-])(?:\d{1,3}\.){3}\d{1,3}(?:/\d{1,2})?(?![\w-]|\.\d|:\d+\.|\.in-addr)")
_IPV6 = re.compile(r"(?<![\w.:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:/\d{1,3})?(?![\w:]|\.\d)")
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|version|release|rev|revision|firmware|driver|build|section|chapter|clause|figure|table|rfc|oid|sect?|"
    r"par|appendix|kernel|update|upgrade(?:d)?(?: to)?)s?[\s:=#.\"'(]*|§ ?|[A-Za-z0-9)_]/|[<>=~!]= ?|[<>~^] ?)$",
    re.IGNORECASE,
)
# Public resolvers and the like: infrastructure that documentation names, nobody's address.
_WELL_KNOWN = frozenset(
    ["12.34.56.78", "8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "4.4.4.4", "2.2.2.2", "3.3.3.3"]
)
_IP_WORDS = re.compile(
    r"\bip|addr|host|client|remote|server|peer|login|logged|connect|request|from|://|gateway|route|dns"
)
_DOCUMENTATION6 = (ipaddress.ip_network("2001:db8::/32"), ipaddress.ip_network("3fff::/20"))


def ips(line: Line) -> Iterator[Span]:
    """Public addresses of single hosts; networks (`/24`), private and documentation ranges, and versions are none."""
    for match in _IPV4.finditer(line.text, line.start, line.end):
        address, _, prefix = match[0].partition("/")
        if address in _WELL_KNOWN or prefix not in ("", "32"):
            continue
        if not _public4(address) or _VERSION_BEFORE.search(
            line.text, max(line.start, match.start() - 24), match.start()
        ):
            continue
        # Four small numbers are oftener a version or a section: they want a word that says address.
        small = len(address) <= 8
        if not small or _IP_WORDS.search(line.context(*match.span())):
            yield match.start(), match.start() + len(address)
    for match in _IPV6.finditer(line.text, line.start, line.end):
        address, _, prefix = match[0].partition("/")
        if prefix in ("", "128") and _public6(address):
            yield match.start(), match.start() + len(address)


def _public4(address: str) -> bool:
    try:
        ip = ipaddress.IPv4Address(address)
    except ValueError:
        return False
    parts = [int(part) for part in address.split(".")]
    # 12.0.0.0 is a network; 123.124.125.126 and 11.22.33.44 are made up.
    made_up = len({b - a for a, b in itertools.pairwise(parts)}) == 1 or address.startswith(("1.2.3.", "123.45.67."))
    return ip.is_global and not ip.is_multicast and not address.endswith(".0.0") and not made_up


def _public6(address: str) -> bool:
    try:
        ip = ipaddress.IPv6Address(address)
    except ValueError:
        return False
    # `0001:0002:...` and `1111:0:0:0:0:0:0:0111` are examples of the form.
    if (
        not ip.is_global
        or ip.is_multicast
        or ip.packed[:2] < b"\0\x10"
        or len(set(ip.packed)) < 4
        or any(ip in network for network in _DOCUMENTATION6)
    ):
        return False
    if "::" not in address:
        # Eight groups, of which times (12:34:56) and byte dumps (00:11:...) have two digits each.
        return any(len(group) > 2 for group in address.split(":"))
    # `abc::def` is a name in some languages; an allocated address begins with 2 or 3 (RFC 4291, 2.4) and has digits.
    groups = [group for group in address.split(":") if group]
    return len(groups) >= 3 and address[0] in "23" and len(groups[0]) == 4


# Bank accounts and cards --------------------------------------------------------------------------------------------

_IBAN = re.compile(r"(?<![\w])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}(?![\w])")
_CARD = re.compile(r"(?=\d)(?<![\w.+/-])\d(?:[ -]?\d){11,18}(?![\w]|[.-]\d)")
_CARD_WORDS = re.compile(
    r"card|credit|debit|visa|master|amex|american express|discover|diners|jcb|maestro|\bpan\b|payment|karte|carte|"
    r"tarjeta|carta\b|kredit|\bcc[ _-]?(?:no|num)"
)


def ibans(line: Line) -> Iterator[Span]:
    """IBANs whose length, structure and check digits are right, in one piece or in groups."""
    for match in _IBAN.finditer(line.text, line.start, line.end):
        for stop in shortened(match[0], 15):
            if iban.is_valid(match[0][:stop], check_country=False):
                yield match.start(), match.start() + stop
                break


def cards(line: Line) -> Iterator[Span]:
    """Payment card numbers: an issuer's prefix and length, Luhn's check digit; 15 and 16 digits in one piece or in
    groups stand by themselves, other lengths want a word such as `card` near them."""
    named = False
    for match in _CARD.finditer(line.text, line.start, line.end):
        digits = re.sub(r"\D", "", match[0])
        if not _issued(digits) or not luhn.is_valid(digits) or len(set(digits)) < 2:
            continue
        groups = re.split(r"\D", match[0])
        strong = len(digits) in (15, 16) and (len(groups) == 1 or (len(groups[0]) == 4 and len(groups) in (3, 4)))
        named = named or (not strong and line.says(_CARD_WORDS))
        if strong or (named and _CARD_WORDS.search(line.context(*match.span()))):
            yield match.span()


def _issued(digits: str) -> bool:
    """Whether a network issues cards of this prefix and length.

    Source: ISO/IEC 7812 ranges as the networks publish them (Visa 4; Mastercard 51-55 and 2221-2720; American Express
    34, 37; Discover 6011, 644-649, 65; Diners 300-305, 309, 36, 38-39; JCB 3528-3589, of 35, and 15-digit 2131, 1800;
    UnionPay 62, 81; Maestro 50, 56-58, 6304, 6390, 6759, 676, 0604)."""
    length, four = len(digits), int(digits[:4])
    if digits[0] == "4":
        return length in (13, 16, 19)
    if 5100 <= four <= 5599 or 2221 <= four <= 2720:
        return length == 16
    if digits[:2] in ("34", "37"):
        return length == 15
    if four == 6011 or 6440 <= four <= 6599:
        return length in (16, 19)
    if 3000 <= four <= 3059 or four // 10 == 309 or digits[:2] in ("36", "38", "39"):
        return length in (14, 16, 19)
    if digits[:2] == "35":
        return length == 16 or (3528 <= four <= 3589 and 16 <= length <= 19)
    if four in (2131, 1800):
        return length == 15
    if digits[:2] in ("62", "81"):
        return 16 <= length <= 19
    return (
        digits[:2] in ("50", "56", "57", "58") or four in (604, 6304, 6390, 6759) or digits[:3] == "676"
    ) and length <= 19


# Identity numbers ---------------------------------------------------------------------------------------------------


class _Id(NamedTuple):
    region: str
    check: str  # a module of stdnum; empty: none publishes check digits
    strong: str  # found by itself; empty: never
    weak: str  # found where `words` stand near it
    words: str


_TAX = r"\btax\b|steuer|fiscal|\btin\b"
# What names any country's number in code and records.
_ANY_ID = (
    r"national.?id|\btax.?(?:id|no|num)|\bssn\b|social.?sec|identity.?(?:no|num|card)|"
    r"personal.?(?:id\b|no\b|num)|\bid.?card"
)
_IDS = (
    _Id("US", "us.ssn", r"\d{3}-\d{2}-\d{4}", r"\d{3} ?\d{2} ?\d{4}", r"ssn|social.?sec"),
    _Id("US", "", "", r"\d{3}-\d{2}-\d{4}", r"ssn|social.?sec"),  # withdrawn and invented ones
    _Id("US", "us.itin", r"9\d\d-\d{2}-\d{4}", r"9\d\d ?\d{2} ?\d{4}", r"itin|taxpayer|ssn"),
    _Id("GB", "", r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?: ?\d\d){3} ?[A-D]",
        r"[A-Z]{2}(?:[ -]?\d\d){3}[ -]?[A-Z]?", r"nino\b|national.?ins|\bni.?(?:no|num)|\bssn\b"),
    _Id("GB", "gb.nhs", "", r"\d{3}[ -]?\d{3}[ -]?\d{4}", r"\bnhs"),
    _Id("GB", "gb.utr", "", r"\d{5} ?\d{5}", r"\butr\b|taxpayer"),
    _Id("DE", "de.idnr", "", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", r"steuer|\bid.?nr|identifikationsn|\btin\b|tax"),
    _Id("DE", "de.stnr", "", r"\d{2,3}[/ ]?\d{3,4}[/ ]?\d{4,5}", r"steuer|st\.?-? ?nr"),
    _Id("FR", "fr.nir", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d",
        r"[1-478] ?\d\d ?\d\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", r"s[eé]curit[eé]|\bnir\b|insee|s[eé]cu\b"),
    _Id("FR", "fr.nif", "", r"[0-3]\d ?\d\d ?\d{3} ?\d{3} ?\d{3}", rf"\bnif\b|num[eé]ro fiscal|{_TAX}"),
    _Id("ES", "es.dni", r"\d{8}-?[A-Z]", r"\d{2}\.?\d{3}\.?\d{3}[ -]?[A-Z]", r"\bdni\b|\bnif\b|identidad"),
    _Id("ES", "es.nie", r"[XYZ]-?\d{7}-?[A-Z]", "", ""),
    _Id("IT", "it.codicefiscale", r"[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]",
        r"[A-Z]{3} ?[A-Z]{3} ?\d{2}[A-Z]\d{2} ?[A-Z]\d{3}[A-Z]", r"fiscale|\bcf\b"),
    _Id("NL", "nl.bsn", "", r"\d{4}[. ]?\d{2}[. ]?\d{3}", r"\bbsn\b|burgerservice|sofi"),
    _Id("BE", "be.nn", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", r"\d{11}", r"rijksregister|registre national|\bniss\b|insz"),
    _Id("PL", "pl.pesel", "", r"\d{11}", r"pesel"),
    _Id("PT", "pt.nif", "", r"\d{3} ?\d{3} ?\d{3}", r"\bnif\b|contribuinte"),
    _Id("PT", "pt.cc", r"\d{8} \d [A-Z0-9]{2}\d", r"\d{8} ?\d ?[A-Z0-9]{2}\d", r"cart[aã]o|cidad[aã]o|\bcc\b"),
    _Id("SE", "se.personnummer", r"(?:19|20)\d{6}[-+]\d{4}", r"\d{6}[-+]?\d{4}", r"person.?n|samordning"),
    _Id("DK", "dk.cpr", "", r"\d{6}-?\d{4}", r"\bcpr|personn"),
    _Id("FI", "fi.hetu", r"\d{6}[-+A]\d{3}[0-9A-Z]", "", ""),
    _Id("NO", "no.fodselsnummer", "", r"\d{6} ?\d{5}", r"f[oø]dsels|personn"),
    _Id("CH", "ch.ssn", r"756\.\d{4}\.\d{4}\.\d\d", r"756\d{10}", r"ahv|avs|sozialv|versich"),
    _Id("AT", "at.vnr", "", r"\d{4} ?\d{6}", r"sozialv|svnr|versicherungsn"),
    _Id("IE", "ie.pps", "", r"\d{7}[A-W][A-IW]?", r"\bpps"),
    _Id("BR", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d", r"\d{11}", r"\bcpf\b"),
    _Id("IN", "in_.aadhaar", "", r"\d{4}[ -]?\d{4}[ -]?\d{4}", r"aadha+r|\buid"),
    _Id("IN", "in_.pan", "", r"[A-Z]{5}\d{4}[A-Z]", r"\bpan\b|permanent account"),
    _Id("CA", "ca.sin", "", r"\d{3}[ -]?\d{3}[ -]?\d{3}", r"\bsin\b|social ins|assurance soc"),
    _Id("AU", "au.tfn", "", r"\d{3} ?\d{3} ?\d{2,3}", r"\btfn\b|tax file"),
    _Id("ZA", "za.idnr", "", r"\d{6} ?\d{4} ?\d{3}", r"\bid\b|identity"),
    _Id("MX", "mx.curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z0-9]\d", "", ""),
    _Id("CN", "cn.ric", r"\d{17}[\dX]", "", ""),
    _Id("KR", "kr.rrn", r"\d{6}-[1-8]\d{6}", r"\d{13}", r"resident|\brrn\b"),
)  # fmt: skip


def national_ids(regions: tuple[str, ...]) -> Finder:
    """A finder of the identity, social security and tax numbers of these regions; check digits are verified where the
    number has them, and a number without, or of digits alone, wants a word that names it near it."""
    rows = [row for row in _IDS if row.region in regions]
    strong = [(_edged(row.strong), None, _checker(row.check)) for row in rows if row.strong]
    weak = [(_edged(row.weak), re.compile(f"{row.words}|{_ANY_ID}"), _checker(row.check)) for row in rows if row.weak]
    any_strong, any_weak = _any([row.strong for row in rows]), _any([row.weak for row in rows])
    any_words = re.compile("|".join((_ANY_ID, *(row.words for row in rows if row.weak))))

    def find(line: Line) -> Iterator[Span]:
        for place in any_strong.finditer(line.text, line.start, line.end):
            for pattern, _, check in strong:
                match = pattern.match(line.text, place.start(), line.end)
                if match and check(match[0]):
                    yield match.span()
        if not line.says(any_words):
            return
        for place in any_weak.finditer(line.text, line.start, line.end):
            near = line.context(place.start(), place.start())
            for pattern, words, check in weak:
                match = pattern.match(line.text, place.start(), line.end)
                if match and words.search(near) and check(match[0]):
                    yield match.span()

    return find


def _any(patterns: list[str]) -> re.Pattern[str]:
    """Where one of these may begin: one pass instead of one for each."""
    some = "|".join(filter(None, patterns)) or "(?!)"
    return re.compile(rf"(?=[0-9A-Z])(?<![\w.+/@-])(?={some})")


def _edged(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.+/@-])(?:{pattern})(?![\w@]|[-./]\w)")


def _checker(module: str) -> Callable[[str], bool]:
    if not module:
        return lambda value: True
    return importlib.import_module(f"stdnum.{module}").is_valid


def shortened(value: str, least: int) -> Iterator[int]:
    """The whole, then without its last group after a blank, and so on, while `least` characters are left; at most
    eight tries."""
    yield len(value)
    stop = len(value)
    for _ in range(7):
        stop = value.rfind(" ", 0, stop)
        if stop < least:
            return
        yield len(value[:stop].rstrip(" .-/("))
