"""The documents of one file, by its format: text, HTML, JSON lines, CSV, Parquet, PDF, DOCX, compressed, in archives.

Owns what a name says of a file's format, and turning bytes into `Document`s. A single bad file or record is a `Skipped`
with its reason, never the end of the run. Does not own where bytes come from (`sources.py`), how they are unpacked in
bounded memory (`unpack.py`), or the parsers that must be kept in a process of their own (`sandbox.py`).

| names | documents |
|---|---|
| `.txt .md .html .htm .pdf .docx` | one; PDF and DOCX need `forge-ray[office]` |
| `.jsonl .ndjson .csv .parquet` | one for each line, row |
| any but `.pdf .docx .parquet`, with `.gz` or `.zst` added | the same |
| `.zip .tar .tar.gz .tgz .tar.zst` | those of the files in it, but for archives in it |

Text is UTF-8, or has a byte order mark of UTF-16 or 32; HTML may state its encoding. Memory: about ten times
`max_document_bytes`, whatever the file's size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from forge_ray.config import IngestConfig
from forge_ray.data.reading import records, sandbox, sources, unpack
from forge_ray.data.reading.documents import (
    LARGE,
    NOT_UTF8,
    SHORT,
    Document,
    Format,
    Place,
    Skipped,
    format_of,
    format_of_type,
)
from forge_ray.data.reading.sources import listing, unit
from forge_ray.data.reading.unpack import Unreadable

__all__ = ["LARGE", "NOT_UTF8", "SHORT", "Document", "Skipped", "documents", "html_text", "listing", "read", "unit"]

BINARY, UNKNOWN = "unreadable: binary, not text", "unreadable: unknown format"
_OFFICE_FACTOR = 8  # pictures and fonts
_RECORDS_IN_ARCHIVE_BYTES = 4 << 30  # a Parquet file in an archive goes to the disk first
_ENCODINGS = re.compile(
    r"(iso-8859-\d+|latin-?1|us-ascii|windows-125\d|cp125\d|koi8-[ru]|macintosh|shift_jis|euc-(jp|kr)"
    r"|gbk|gb2312|gb18030|big5)$"
)
_DECLARED = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([\w-]{2,20})", re.IGNORECASE)


def read(unit: dict[str, Any], config: IngestConfig) -> Iterator[Document | Skipped]:
    """The documents of a unit of files, in its order.

    Raises:
        StorageError: A file cannot be read, for whatever reason but its content.
    """
    source = sources.described(unit)
    for file in sources.files(source, unit, config):
        place = Place(file.key, file.shown, source, config.max_document_bytes, file.charset)
        what = format_of(file.name or file.key) or format_of_type(file.content_type)
        if file.problem:
            yield place.skipped(file.problem, file.detail)
        elif what and what.whole and file.size_bytes > config.max_document_bytes:
            yield place.skipped(LARGE, f"{file.size_bytes} bytes")
        else:
            if file.codec and what and not what.codec:
                what = what._replace(codec=file.codec)
            try:
                with file.open() as stream:
                    yield from documents(stream, file.size_bytes, what, place)
            except Unreadable as error:
                yield place.skipped(error.kind, error.detail)


def documents(stream: Any, size_bytes: int, what: Format | None, place: Place) -> Iterator[Document | Skipped]:
    """The documents of one file, in its own order.

    Args:
        stream: Its bytes; a buffered reader that can seek.
        size_bytes: How many they are.
        what: Its format.
        place: Where it lies.
    """
    try:
        if what is None:
            raise Unreadable(UNKNOWN)
        yield from _documents(stream, size_bytes, what, place, None)
    except Unreadable as error:
        yield place.skipped(error.kind, error.detail)


def _documents(
    stream: Any, size_bytes: int, what: Format, place: Place, outer: unpack.Budget | None
) -> Iterator[Document | Skipped]:
    """As `documents`; `outer` is the budget of the archive that the file is in, whose stream cannot seek."""
    if what.codec:
        budget = unpack.Budget()
        stream = unpack.decompressed(stream, what.codec, budget, outer)
        outer = outer or budget
    if what.kind in ("text", "html"):
        yield _whole(stream, what.kind, place)
    elif what.kind == "jsonl":
        yield from records.jsonl(unpack.as_utf8(stream), place)
    elif what.kind == "csv":
        yield from records.csv_rows(unpack.as_utf8(stream), place)
    elif what.kind == "tar":
        yield from _archive(stream, what.kind, outer or unpack.Budget(size_bytes), place)
    elif outer is None:
        yield from _random_access(stream, size_bytes, what.kind, place)
    else:
        limit = _RECORDS_IN_ARCHIVE_BYTES if what.kind == "parquet" else _OFFICE_FACTOR * place.limit_bytes
        with unpack.seekable(stream, limit) as spooled:
            if spooled is None:
                raise Unreadable(LARGE, f"more than {limit} bytes in an archive")
            yield from _random_access(*spooled, what.kind, place)


def _random_access(stream: Any, size_bytes: int, kind: str, place: Place) -> Iterator[Document | Skipped]:
    if kind == "zip":
        yield from _archive(stream, kind, unpack.Budget(size_bytes), place)
    elif kind == "parquet":
        yield from records.parquet(stream, size_bytes, place)
    else:
        if size_bytes > _OFFICE_FACTOR * place.limit_bytes:
            raise Unreadable(LARGE, f"{size_bytes} bytes")
        for _, text, created in sandbox.parse(kind, place.limit_bytes, stream, size_bytes):
            yield place.document(text, created)


def _archive(stream: Any, kind: str, budget: unpack.Budget, place: Place) -> Iterator[Document | Skipped]:
    for member in unpack.members(stream, kind, budget):
        what, where = format_of(member.name), place.below(member.name)
        if what is None:
            continue
        if member.stream is None:
            yield where.skipped(member.problem)
        elif what.kind in ("zip", "tar"):
            yield where.skipped(unpack.NESTED)
        else:
            try:
                yield from _documents(member.stream, member.size_bytes, what, where, budget)
            except Unreadable as error:
                yield where.skipped(error.kind, error.detail)


def _whole(stream: Any, kind: str, place: Place) -> Document | Skipped:
    data = unpack.whole(stream, place.limit_bytes)
    if data is None:
        return place.skipped(LARGE, f"more than {place.limit_bytes} bytes")
    try:
        text = _html_decoded(data, place.charset) if kind == "html" else unpack.decoded(data)
    except UnicodeDecodeError as error:
        return place.skipped(NOT_UTF8, f"byte {error.start}")
    if "\0" in text:
        return place.skipped(BINARY, f"NUL at character {text.index(chr(0))}; UTF-16 without a byte order mark?")
    return place.document(html_text(text, place.limit_bytes) if kind == "html" else text)


def _html_decoded(data: bytes, charset: str) -> str:
    try:
        return unpack.decoded(data)
    except UnicodeDecodeError:
        found = _DECLARED.search(data[:4096])
        for name in (charset.lower(), found.group(1).decode().lower() if found else ""):
            if _ENCODINGS.match(name):
                return data.decode(name)
        raise


def html_text(html: str, limit_bytes: int = 16 << 20) -> str:
    """The visible text of an HTML page or fragment: a line for each block, code as it stands.

    Raises:
        Unreadable: The page makes more of the parser than its size warrants.
    """
    [answer] = sandbox.parse("html", limit_bytes, data=html.encode())
    return "\n".join(line.rstrip() for line in str(answer[1]).split("\n") if line.strip())
