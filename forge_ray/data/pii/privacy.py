"""Personal data and secrets in documents: found, counted, and kept, masked, replaced or dropped as configured.

Owns the order of the work, the overlaps and the actions. Does not own what an address or a key looks like
(identifiers.py, phones.py, secrets.py).

Most lines of a technical corpus hold nothing, so a batch of documents is first passed through RE2 (inside pyarrow,
which reads the lines where they lie) with one pattern that is necessary for any find; only the lines that match are
looked at by the finders. Before that, what only looks different is folded: digits of other scripts, full-width
characters, typographic dashes and blanks become ASCII, and characters without width are skipped, so that a number with
them inside is still found. Not folded, and so not seen: letters that look like others (Cyrillic `а`), words for marks
(`name at example dot com`), numbers cut over two lines.

Where two finds overlap, the earlier of KINDS wins (a password in a URL before the e-mail address it seems to begin),
and among equals the longer. What was changed is looked at again until nothing more is found, so scrubbing twice gives
what scrubbing once gave. A text that holds `<EMAIL>` already keeps it; it counts as nothing.

Cost: 18 to 30 MB/s per core on technical text (loaded 2-core machine, 2026-11), 1 to 4 MB/s on tables of numbers and
lists of addresses, some 3 ms a call (bench/privacy.py); names cost what the spaCy model costs, far more than the rest.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forge_ray.config.data import PrivacyConfig
from forge_ray.data.pii import identifiers, phones, secrets
from forge_ray.data.pii.context import Line
from forge_ray.errors import ConfigError, NotInstalledError

# In order of priority where finds overlap.
KINDS = ("secret", "email", "iban", "ip", "card", "national_id", "phone", "name")
MAX_ROUNDS = 16

Find = tuple[int, int, str]


@dataclass(frozen=True)
class Scrubbed:
    """A document after scrubbing."""

    text: str
    found: dict[str, int] = field(default_factory=dict)
    """How many of each kind were found, kept ones too."""
    drop: str | None = None
    """The kind that demands that the document is dropped; its text is then as it came."""


class Scrubber:
    """Scrubs batches of documents; picklable, and the same text gives the same result in any batch.

    Raises:
        ConfigError: A region is not an ISO 3166 code that has a telephone plan.
        NotInstalledError: `name_model` is set and spaCy or the model is missing (when the first batch arrives).
    """

    def __init__(self, config: PrivacyConfig) -> None:
        self.config = config
        _check_regions(config.regions)
        if config.name != "keep" and not config.name_model:
            raise ConfigError(
                "names of persons cannot be found without a model",
                got=f"curate.privacy.name={config.name} and no name_model",
                wanted="a spaCy model in curate.privacy.name_model",
                do="set name_model to a folder or an installed package, or name to keep",
            )
        self._families = _families(config.regions)
        self._any = "|".join(f"(?:{candidate})" for _, candidate, _ in self._families)
        self._actions: dict[str, str] = {kind: getattr(config, kind) for kind in KINDS}
        self._model: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Scrubber, (self.config,)

    def scrub(self, texts: list[str]) -> list[Scrubbed]:
        """Finds and acts, document by document.

        Args:
            texts: A batch; a few hundred documents amortise the cost of a call.
        """
        results = [Scrubbed(text) for text in texts]
        counts: dict[int, dict[str, int]] = {}
        pending = list(range(len(texts)))
        for round_ in range(MAX_ROUNDS):
            again = []
            for index, finds in zip(pending, self.find([results[index].text for index in pending])):
                changed = [find for find in finds if self._actions[find[2]] != "keep"]
                for _, _, kind in changed if round_ else finds:
                    found = counts.setdefault(index, {})
                    found[kind] = found.get(kind, 0) + 1
                if changed:
                    results[index] = Scrubbed(self._changed(results[index].text, changed))
                    again.append(index)
            pending = again
            if not pending:
                break
        for index, found in counts.items():
            drop = next((kind for kind in KINDS if kind in found and self._actions[kind] == "drop"), None)
            ordered = {kind: found[kind] for kind in KINDS if kind in found}
            results[index] = Scrubbed(texts[index] if drop else results[index].text, ordered, drop)
        return results

    def find(self, texts: list[str]) -> list[list[Find]]:
        """(start, end, kind) of what is found in each text, in order, without overlaps."""
        folded = [_fold(text) for text in texts]
        raw: list[list[Find]] = [[] for _ in texts]
        for index, line, families in self._lines([text for text, _ in folded]):
            for kind, finder in families:
                raw[index] += [(*span, kind) for span in finder(line)]
        for index, found in enumerate(raw):
            places = folded[index][1]
            if places is not None:
                raw[index] = [(places[start], places[end - 1] + 1, kind) for start, end, kind in found]
        if self.config.name_model:
            for index, names in enumerate(self._names(texts)):
                raw[index] += names
        return [_resolve(found) if found else [] for found in raw]

    def _lines(self, texts: list[str]) -> Iterator[tuple[int, Line, list[tuple[str, Any]]]]:
        """The lines that may hold something: document, line, and the finders whose candidate they match."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        starts = np.array([0, *accumulate(len(raw) + 1 for raw in encoded)], np.int64)
        buffer = b"\n".join(encoded)
        ends = np.flatnonzero(np.frombuffer(buffer, np.uint8) == 10) + 1
        offsets = np.concatenate([[0], ends, [len(buffer)]]).astype(np.int64)
        lines = _binary(buffer, offsets)
        chosen = np.flatnonzero(_matches(lines, self._any))
        if not len(chosen):
            return
        subset = lines.take(pa.array(chosen))
        flags = np.stack([_matches(subset, candidate) for _, candidate, _ in self._families])
        documents = np.searchsorted(starts, offsets[chosen], side="right") - 1
        place = _Places()
        for column, (line, index) in enumerate(zip(chosen.tolist(), documents.tolist())):
            base = int(starts[index])
            begin, end = int(offsets[line]) - base, int(offsets[line + 1]) - base
            if not texts[index].isascii():
                begin, end = place.char(index, encoded[index], begin), place.char(index, encoded[index], end)
            families = [(kind, find) for row, (kind, _, find) in enumerate(self._families) if flags[row, column]]
            yield index, Line(texts[index], begin, min(end, len(texts[index]))), families

    def _changed(self, text: str, finds: list[Find]) -> str:
        pieces, last = [], 0
        for start, end, kind in finds:
            old = text[start:end]
            new = f"<{kind.upper()}>" if self._actions[kind] == "replace" else _masked(old)
            pieces += [text[last:start], new]
            last = end
        return "".join([*pieces, text[last:]])

    def _names(self, texts: list[str]) -> Iterator[list[Find]]:
        """Persons that the model names; what it takes a placeholder for is not one."""
        if self._model is None:
            self._model = _load_model(self.config.name_model)
        limit = self._model.max_length
        for text in texts:
            finds: list[Find] = []
            for base in range(0, len(text), limit):
                for entity in self._model(text[base : base + limit]).ents:
                    if entity.label_ in ("PER", "PERSON") and _is_name(entity.text):
                        finds.append((base + entity.start_char, base + entity.end_char, "name"))
            yield finds


def model_state(name: str) -> str:
    """Tells one model of names from another under the same name: the digest of a folder's `meta.json`, or a package's
    version; empty for a model that this machine does not have."""
    about = Path(name) / "meta.json"
    if about.is_file():
        return hashlib.sha256(about.read_bytes()).hexdigest()
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def _families(regions: tuple[str, ...]) -> list[tuple[str, str, Any]]:
    """(kind, RE2 pattern that a line must match, finder). The patterns know bytes, so no other script's letters."""
    seven = r"[0-9](?:[ ().\-/]{0,3}[0-9]){6}"
    letters = (
        r"[A-Z]{2}[ -]?[0-9]{2}[ -]?[0-9]{2}[ -]?[0-9]{2}|[0-9]{7}[ -]?[A-Z]|[XYZ]-?[0-9]{7}|[0-9]{6}[-+A][0-9]{3}|"
        r"[A-Z]{3} ?[A-Z]{3} ?[0-9]{2}[A-Z][0-9]{2}|[A-Z]{5}[0-9]{4}[A-Z]|[A-Z]{4}[0-9]{6}[HM]|"
        r"[0-9]\.[0-9]{3}\.[0-9]{3}"
    )
    return [
        ("secret", secrets.CANDIDATE_TOKEN, secrets.tokens),
        ("secret", secrets.CANDIDATE_KEY, secrets.private_keys),
        ("secret", secrets.CANDIDATE_URL, secrets.url_passwords),
        ("secret", secrets.CANDIDATE_ASSIGNMENT, secrets.assignments),
        ("email", r"[^\s@]@[^\s@.]+\.[^\s@]{2}|[^\s@]@[^\s@.]+\.[^\s@.]+\.", identifiers.emails),
        ("iban", r"[A-Z]{2}[0-9]{2}[ -]?[A-Z0-9]{4}", identifiers.ibans),
        ("ip", r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[0-9A-Fa-f]:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]", identifiers.ips),
        ("card", r"[0-9](?:[ -]?[0-9]){11}", identifiers.cards),
        ("national_id", f"{seven}|{letters}", identifiers.national_ids(regions)),
        ("phone", seven, phones.phones(regions)),
    ]


def _binary(buffer: bytes, offsets: np.ndarray) -> pa.Array:
    """The lines as an Arrow array over the same bytes. Binary, not text: RE2 is faster on bytes, and is not told that
    a text with a lone surrogate is UTF-8."""
    return pa.Array.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(buffer)]
    )


def _matches(lines: pa.Array, pattern: str) -> np.ndarray:
    return pc.match_substring_regex(lines, pattern).to_numpy(zero_copy_only=False)


class _Places:
    """Characters before a byte of a text that is not ASCII, counted onward from the last question."""

    def __init__(self) -> None:
        self.index, self.byte, self.chars = -1, 0, 0

    def char(self, index: int, raw: bytes, byte: int) -> int:
        if index != self.index or byte < self.byte:
            self.index, self.byte, self.chars = index, 0, 0
        self.chars += len(raw[self.byte : byte].decode("utf-8", "surrogatepass"))
        self.byte = byte
        return self.chars


# Folding ------------------------------------------------------------------------------------------------------------

_WIDTHLESS = "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\ufeff"
_BLANKS = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63"
_DOTS = "\u2024\ufe52\u3002\uff61"


def _fold_table() -> dict[int, str]:
    table = {ord(mark): " " for mark in _BLANKS} | {ord(mark): "-" for mark in _DASHES} | {ord(m): "." for m in _DOTS}
    table |= {ord("\ufe6b"): "@", ord("\u2215"): "/", ord("\u2044"): "/"}
    table |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    for code in (*range(0x600, 0x1A00), *range(0xA620, 0xABFF), *range(0x1D7CE, 0x1D800)):
        if unicodedata.category(chr(code)) == "Nd":
            table[code] = str(unicodedata.decimal(chr(code)))
    return table


_FOLDS = _fold_table()
_FOLDED = re.compile(f"[{re.escape(''.join(map(chr, sorted(_FOLDS))))}{_WIDTHLESS}]")
_NO_WIDTH = re.compile(f"[{_WIDTHLESS}]+")


def _fold(text: str) -> tuple[str, list[int] | None]:
    """The text as the finders see it, and the place of each of its characters in the original; None: the same."""
    if text.isascii() or not _FOLDED.search(text):
        return text, None
    folded = text.translate(_FOLDS)
    if not _NO_WIDTH.search(folded):
        return folded, None
    widthless = frozenset(_WIDTHLESS)
    places = [place for place, mark in enumerate(folded) if mark not in widthless]
    return _NO_WIDTH.sub("", folded), places


# Finds --------------------------------------------------------------------------------------------------------------

_RANK = {kind: rank for rank, kind in enumerate(KINDS)}


def _resolve(finds: list[Find]) -> list[Find]:
    """Without overlaps, in order of place: the kind that stands earlier in KINDS wins, then the longer find."""
    if len(finds) == 1:
        return finds
    taken: list[Find] = []
    for find in sorted(set(finds), key=lambda find: (_RANK[find[2]], find[0] - find[1], find[0])):
        place = bisect_left(taken, find)
        if place and taken[place - 1][1] > find[0]:
            continue
        if place < len(taken) and taken[place][0] < find[1]:
            continue
        taken.insert(place, find)
    return taken


def _masked(value: str) -> str:
    return "".join("*" if mark.isalnum() else mark for mark in value)


def _check_regions(regions: tuple[str, ...]) -> None:
    from phonenumbers import SUPPORTED_REGIONS

    unknown = sorted(set(regions) - set(SUPPORTED_REGIONS))
    if unknown:
        raise ConfigError(
            "curate.privacy.regions names what is no region",
            got=", ".join(unknown),
            wanted="ISO 3166 codes in capitals, such as US, GB, DE",
            do="mend curate.privacy.regions",
        )


# Names --------------------------------------------------------------------------------------------------------------


def _load_model(name: str) -> Any:
    try:
        import spacy
    except ModuleNotFoundError:
        raise NotInstalledError(
            "names of persons need spaCy",
            got=f"curate.privacy.name_model={name}, and no package spacy",
            do="pip install 'forge-ray[names]', or leave name_model empty",
        ) from None
    try:
        return spacy.load(name)
    except OSError as error:
        raise NotInstalledError(
            "spaCy cannot load the model that finds names",
            got=f"{name}: {str(error).splitlines()[0]}",
            wanted="the folder of a spaCy model, or the name of one that is installed as a package",
            do="install the model on every machine, or mend curate.privacy.name_model",
        ) from None


def _is_name(value: str) -> bool:
    return any(mark.isalpha() for mark in value) and not re.search(r"[<>*]", value) and "\n" not in value
