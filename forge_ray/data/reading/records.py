"""Documents out of records: lines of JSON, rows of CSV and Parquet.

Owns which fields become what of a document. A record is known by its number in its file, from 1: a line of JSON lines
(empty ones count), a row below the heading of CSV, a row of Parquet.
"""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from forge_ray.config import FilesSource, HttpSource
from forge_ray.data.reading import sandbox, unpack
from forge_ray.data.reading.documents import (
    LARGE,
    NO_TEXT,
    NOT_UTF8,
    TWO_COLUMNS,
    Document,
    Place,
    Skipped,
    canonical,
    language_code,
    moment,
)
from forge_ray.data.reading.unpack import Unreadable

NO_STRING, NOT_JSON, NOT_CSV = "unreadable: the text is no string", "unreadable: not JSON", "unreadable: not CSV"
# A record may be longer than its text: escapes make 2 bytes of Latin text 6, and other fields come to it.
_LINE_FACTOR = 4
_LINE_BYTES = 64 << 10
_SIDE_BYTES = 1 << 20  # a licence, date or further field that is larger is none
_SMALL_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,30}")


@dataclass(frozen=True)
class _Fields:
    """Which fields of a record are read: `names` each once, the text's first; the others' places among them."""

    names: tuple[str, ...]
    licence: int
    language: int
    created: int
    group: int
    metadata: tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=64)
def _fields_of(about: FilesSource | HttpSource) -> _Fields:
    sides = (about.licence_field, about.language_field, about.created_field, about.group_field)
    names = tuple(dict.fromkeys((about.text_field, *(name for name in sides if name), *about.metadata_fields)))
    at = {name: i for i, name in enumerate(names)}
    return _Fields(
        names,
        *(at.get(name, -1) if name != about.text_field else -1 for name in sides),
        metadata=tuple((name, at[name]) for name in sorted(set(about.metadata_fields))),
    )


class _Records:
    """Makes documents of the records of one file; for each, the values of `names` or None, in their order."""

    def __init__(self, place: Place) -> None:
        self.place, self.fields = place, _fields_of(place.about)
        self.names = self.fields.names
        self._key, self._source, self._licence = f"{place.key}#", f"{place.source}#", place.about.licence

    def skipped(self, number: int, kind: str, detail: str = "") -> Skipped:
        return Skipped(f"{self._source}{number}", kind, detail)

    def document(self, number: int, text: str, values: list[Any] | None = None) -> Document:
        """A record whose text is a string, and whatever its other fields hold."""
        key = f"{self._key}{number}"
        if values is None:
            return Document(key, f"{self._source}{number}", key, self._licence, text.strip())
        fields, kept = self.fields, {}
        licence = _side(values, fields.licence) or self._licence
        raw_language, raw_created = _side(values, fields.language), _side(values, fields.created)
        language, created = language_code(raw_language), moment(raw_created)
        for name, at in fields.metadata:
            if values[at] is not None:
                kept[name] = values[at]
        # What was stated and cannot be used is kept where it does no harm.
        if raw_language and not language:
            kept.setdefault(self.names[fields.language], raw_language)
        if raw_created and not created:
            kept.setdefault(self.names[fields.created], raw_created)
        group = _side(values, fields.group) or key
        source = f"{self._source}{number}"
        return Document(key, source, group, licence, text.strip(), language, created, canonical(kept))

    def checked(self, number: int, values: list[Any]) -> Document | Skipped:
        """A record whose text may be anything."""
        text = values[0]
        if text is None or not isinstance(text, str):
            return self.skipped(number, NO_STRING, type(text).__name__)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if "\udc80" <= text[error.start] <= "\udcff":  # a byte that was no UTF-8
                return self.skipped(number, NOT_UTF8, f"character {error.start}")
            return self.skipped(number, "unreadable: half of a surrogate pair", f"character {error.start}")
        return self.document(number, text, values if any(value is not None for value in values[1:]) else None)


def _side(values: list[Any], at: int) -> str:
    value = values[at] if at >= 0 else None
    if value is None or isinstance(value, (dict, list, float)):
        return ""
    return str(value).strip().encode("utf-8", "replace").decode()


@functools.lru_cache(maxsize=64)
def _decoder(names: tuple[str, ...]) -> Any:
    """A parser that makes objects of the wanted fields only: the rest of a line is checked, never built.

    1.8 µs for a document of 2 kB, where `json` takes 4.9 and orjson 2.4 (2026-11). The text must be a string here, and
    the others stay bytes until their size is known, so that a line of 60 MB of brackets makes no objects.
    """
    raw = (msgspec.Raw, msgspec.Raw(b""))
    fields = [("f0", str | msgspec.UnsetType, msgspec.UNSET), *((f"f{i}", *raw) for i in range(1, len(names)))]
    renamed = {f"f{i}": name for i, name in enumerate(names)}
    return msgspec.json.Decoder(msgspec.defstruct("Record", fields, rename=renamed, gc=False))


def jsonl(stream: Any, place: Place) -> Iterator[Document | Skipped]:
    records = _Records(place)
    decode, document = _decoder(records.names).decode, records.document
    sides = [f"f{i}" for i in range(1, len(records.names))]
    number = 0
    for batch in unpack.lines(stream, _LINE_FACTOR * place.limit_bytes + _LINE_BYTES):
        for line in batch:
            number += 1
            try:
                record = decode(line)
                text = record.f0
            except (ValueError, RecursionError, TypeError) as error:
                if line is None:
                    yield records.skipped(number, LARGE, "a longer line than any document makes")
                elif line and not line.isspace():
                    yield _odd_line(number, line, error, records)
                continue
            if text is msgspec.UNSET:
                yield records.skipped(number, NO_TEXT, repr(records.names[0]))
                continue
            values = None
            for name in sides:
                if getattr(record, name):
                    values = [text, *(_opened(getattr(record, name)) for name in sides)]
                    break
            yield document(number, text, values)


def _opened(raw: msgspec.Raw) -> Any:
    """A field's value; None if it is missing, too large, or nothing that JSON can say again."""
    if not raw or len(bytes(raw)) > _SIDE_BYTES:
        return None
    try:
        return msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        return None


def _odd_line(number: int, line: bytes, error: Exception, records: _Records) -> Document | Skipped:
    """A line that the fast parser refused: `json` takes NaN and the like, and says better what is wrong."""
    if len(line) > _SMALL_BYTES:
        return records.skipped(number, NOT_JSON, str(error)[:200])
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as caught:
        return records.skipped(number, NOT_UTF8, f"byte {caught.start}")
    except (ValueError, RecursionError) as caught:
        return records.skipped(number, NOT_JSON, type(caught).__name__)
    if not isinstance(record, dict):
        return records.skipped(number, NO_TEXT, f"{records.names[0]!r}, the line is of type {type(record).__name__}")
    if records.names[0] not in record:
        return records.skipped(number, NO_TEXT, repr(records.names[0]))
    return records.checked(number, [record.get(name) for name in records.names])


class _CsvLines:
    """The lines of one CSV for `csv.reader`, which goes on with the next record after an error."""

    def __init__(self, stream: Any, limit_bytes: int) -> None:
        self._lines = (line for batch in unpack.lines(stream, limit_bytes) for line in batch)
        self._limit = limit_bytes
        self.held = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.held += self._limit + 1 if line is None else len(line) + 1
        if line is None or self.held > self._limit:
            self.held = 0
            raise csv.Error(f"a record of more than {self._limit} bytes; a quotation mark that is not closed?")
        return line.decode("utf-8", "surrogateescape") + "\n"


def csv_rows(stream: Any, place: Place) -> Iterator[Document | Skipped]:
    records = _Records(place)
    limit = place.limit_bytes + _LINE_BYTES
    csv.field_size_limit(limit)  # the module's own is 128 KiB, for all readers of the process
    source = _CsvLines(stream, limit)
    reader = csv.reader(source)
    columns: list[int] | None = None
    number = 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield records.skipped(number, NOT_CSV, str(error)[:200])
            source.held = 0
            continue
        source.held = 0
        if columns is None:
            columns = _csv_columns(row, records.names)
        elif row:
            number += 1
            if len(row) <= columns[0]:
                yield records.skipped(number, NO_TEXT, f"a row of {len(row)} fields")
            else:
                yield records.checked(number, [(row[at] or None) if 0 <= at < len(row) else None for at in columns])


def _csv_columns(header: list[str], names: tuple[str, ...]) -> list[int]:
    if names[0] not in header:
        # Without a heading its place is taken by a record, which is nobody's business.
        shown = ", ".join(name if _NAME.fullmatch(name) else "…" for name in header[:20])
        raise Unreadable(NO_TEXT, f"{names[0]!r}, only {shown[:200]!r}")
    if twice := [name for name in names if header.count(name) > 1]:
        raise Unreadable(TWO_COLUMNS, ", ".join(twice))
    return [header.index(name) if name in header else -1 for name in names]


def parquet(stream: Any, size_bytes: int, place: Place) -> Iterator[Document | Skipped]:
    records = _Records(place)
    number = 0
    # A dictionary page and a run of its index make any number of copies of one text.
    budget = unpack.Budget(size_bytes)
    for _, columns in sandbox.parse("parquet", place.limit_bytes, stream, size_bytes, list(records.names)):
        budget.spend(sum(len(text) for text in columns[0] if isinstance(text, bytes)))
        for values in zip(*columns):
            number += 1
            yield _parquet_record(number, values, records)


def _parquet_record(number: int, values: tuple[Any, ...], records: _Records) -> Document | Skipped:
    """Bytes are text to be decoded, a number is the size of one that is too large, the rest comes as [value, type]."""
    text = values[0]
    if isinstance(text, int):
        return records.skipped(number, LARGE, f"{text} bytes")
    if not isinstance(text, bytes):
        return records.skipped(number, NO_STRING, text[1] if text else "NoneType")
    try:
        text = text.decode()
    except UnicodeDecodeError as error:
        return records.skipped(number, NOT_UTF8, f"byte {error.start}")
    if len(values) == 1:
        return records.document(number, text)
    sides = [
        value.decode("utf-8", "replace") if isinstance(value, bytes) else value[0] if isinstance(value, list) else None
        for value in values[1:]
    ]
    return records.document(number, text, [text, *sides])
