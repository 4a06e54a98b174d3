"""The child process that runs parsers of hostile formats: HTML, PDF, DOCX, Parquet.

Owns what happens inside it; `sandbox.py` starts it, feeds it and survives it. It has no credentials, a bounded address
space and a bounded share of CPU time for each answer, opens no file of the corpus and imports nothing of Forge-Ray:
this file is run as a program of its own.

Both directions carry frames: 4 bytes of length, then a MessagePack array. Never pickle, for a parser that was taken
over must not take over its parent.

    parent  ["parse", kind, size_bytes, limit_bytes, fields, inline bytes or nil]    bytes, as the answer to "read"
    child   ["read", offset, size]  ["rows", [[values of a field], ...]]  ["text", text, created]  ["end"]
            ["fail", kind, detail]
"""

from __future__ import annotations

import io
import os
import re
import resource
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

_FRAME_BYTES = 1 << 20
_ROWS = 128
_NESTED_LISTS = 200
_LIST = re.compile(r"<(/?)(?:ul|ol|dir|menu)\b", re.IGNORECASE)
LARGE = "larger than max_document_bytes"
MISSING = "unreadable: needs the office extra"
CLOSED = "unreadable: encrypted"
MEMORY = "unreadable: needs too much memory"
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder()


class Refused(Exception):
    """Why this file gives nothing (more), as kind and detail."""


def send(stream: Any, message: Any) -> None:
    """One frame out."""
    data = _ENCODER.encode(message)
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def receive(stream: Any) -> Any:
    """One frame in; the program ends when its parent has."""
    head = stream.read(4)
    if len(head) < 4:
        sys.exit(0)
    return _DECODER.decode(stream.read(int.from_bytes(head, "big")))


class _Remote(io.RawIOBase):
    """The file, which the parent reads: it has the credentials, and the patience with stores."""

    def __init__(self, inp: Any, out: Any, size_bytes: int) -> None:
        self._inp, self._out, self._size, self._at = inp, out, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, self._size)[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at, 8 << 20))
        if not count:
            return 0
        send(self._out, ["read", self._at, count])
        data = receive(self._inp)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def html(data: bytes, limit_bytes: int) -> Iterator[list[Any]]:
    """The whole visible text of a page, blocks as lines, code as it stands; no guess at what is its main content.

    The guess of either library (trafilatura, or Resiliparse's own) loses side notes, footers and tables of plain
    technical pages, and trafilatura runs code together. On 60 pages of package documentation, 2026-11: Resiliparse
    74 MB/s, trafilatura 1.7 MB/s.
    """
    from resiliparse.extract.html2text import extract_plain_text

    text = data.decode()
    # Each level of a list is one more indentation of every line in it: 250 KB of "<ul><li>" become 1 GB of blanks.
    flat = _list_depth(text) > _NESTED_LISTS
    yield ["text", extract_plain_text(text, preserve_formatting=not flat, main_content=False, list_bullets=True), ""]


def _list_depth(text: str) -> int:
    """How deep lists are nested, as the tags say, closed or not."""
    depth = deepest = 0
    for tag in _LIST.finditer(text):
        depth = max(0, depth - 1) if tag.group(1) else depth + 1
        deepest = max(deepest, depth)
    return deepest


def pdf(file: _Remote, limit_bytes: int) -> Iterator[list[Any]]:
    """The text of all pages, each followed by an empty line."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file.read())
    except pypdfium2.PdfiumError as error:
        raise Refused(CLOSED if "password" in str(error).lower() else "unreadable: not PDF", str(error)) from None
    pages, held = [], 0
    for index in range(len(document)):
        page = document[index]
        text_page = page.get_textpage()
        text = text_page.get_text_bounded().replace("\r\n", "\n").replace("\ufffe", "").strip()
        text_page.close()
        page.close()
        held += len(text)
        if held > limit_bytes:
            raise Refused(LARGE, f"more than {limit_bytes} characters in {index + 1} pages")
        pages.append(text)
    if not any(pages):
        raise Refused("unreadable: PDF without text", f"{len(pages)} pages; a scan?")
    yield ["text", "\n\n".join(page for page in pages if page), _pdf_time(document)]


def _pdf_time(document: Any) -> str:
    """`D:20240131120000+01'00'` as ISO 8601; what does not look like it is checked, and refused, by the parent."""
    raw = document.get_metadata_dict().get("CreationDate", "").removeprefix("D:").replace("'", "")
    if len(raw) < 14:
        return f"{raw[:4]}-{raw[4:6]}-{raw[6:8]}" if len(raw) >= 8 else ""
    zone = f"{raw[14:17]}:{raw[17:19]}" if len(raw) >= 19 else "Z" if raw[14:15] == "Z" else ""
    return f"{raw[:4]}-{raw[4:6]}-{raw[6:8]}T{raw[8:10]}:{raw[10:12]}:{raw[12:14]}{zone}"


def docx(file: _Remote, limit_bytes: int) -> Iterator[list[Any]]:
    """Paragraphs and tables in the order of the page, the cells of a row joined by tabs; no headers and footers."""
    import zipfile

    import docx as python_docx

    data = io.BytesIO(file.read())
    try:
        if sum(info.file_size for info in zipfile.ZipFile(data).infolist()) > 8 * limit_bytes:
            raise Refused("unreadable: decompression bomb", f"its parts are more than {8 * limit_bytes} bytes")
        document = python_docx.Document(data)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise Refused("unreadable: not DOCX", f"{type(error).__name__}: {error}") from None
    lines: list[str] = []
    held = 0
    for line in _docx_lines(document.iter_inner_content()):
        held += len(line)
        if held > limit_bytes:
            raise Refused(LARGE, f"more than {limit_bytes} characters")
        lines.append(line)
    created = document.core_properties.created
    yield ["text", "\n".join(lines), created.isoformat() if created else ""]


def _docx_lines(blocks: Any) -> Iterator[str]:
    for block in blocks:
        if not hasattr(block, "rows"):
            yield block.text
            continue
        for row in block.rows:
            yield "\t".join(" ".join(cell.text.split()) for cell in row.cells)


def parquet(file: _Remote, limit_bytes: int, fields: list[str]) -> Iterator[list[Any]]:
    """The values of the wanted fields, column by column, a piece at a time; None where the file has no such column."""
    import pyarrow.parquet as pq

    reader = pq.ParquetFile(io.BufferedReader(file, _FRAME_BYTES), pre_buffer=False, buffer_size=_FRAME_BYTES)
    names = reader.schema_arrow.names
    if fields[0] not in names:
        raise Refused("unreadable: no text field", f"{fields[0]!r}, only {', '.join(names)[:200]}")
    if len(set(names)) < len(names) and any(names.count(name) > 1 for name in fields):
        raise Refused("unreadable: two columns of one name", ", ".join(f for f in fields if names.count(f) > 1))
    wanted = [name for name in fields if name in names]
    for batch in reader.iter_batches(batch_size=_ROWS, columns=wanted, use_threads=False):
        columns = [
            _values(batch.column(wanted.index(name)), limit_bytes) if name in wanted else [None] * batch.num_rows
            for name in fields
        ]
        yield from (["rows", part] for part in _framed(columns))


def _values(column: Any, limit_bytes: int) -> list[Any]:
    """A column as what MessagePack has: text as bytes, for its UTF-8 is the parent's to judge, or its size where it is
    too large; anything else as [value, name of its type]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_binary())
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return [None if value is None else [_plain(value), type(value).__name__] for value in column.to_pylist()]
    sizes = pc.binary_length(column)
    if (pc.max(sizes).as_py() or 0) <= limit_bytes:
        return list(column.to_pylist())
    return [
        None if size is None else size if size > limit_bytes else column[i].as_py()
        for i, size in enumerate(sizes.to_pylist())
    ]


def _plain(value: Any) -> Any:
    """A number as it is, a time as ISO 8601, and what JSON has no word for as its text."""
    if isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    if hasattr(value, "isoformat"):
        return value.isoformat()
    try:
        return msgspec.json.decode(msgspec.json.encode(value))
    except Exception:
        return str(value)


def _framed(columns: list[list[Any]]) -> Iterator[list[list[Any]]]:
    """The columns cut so that a piece has about `_FRAME_BYTES` of text."""
    start = held = 0
    for row, text in enumerate(columns[0], start=1):
        held += len(text) if isinstance(text, bytes) else 0
        if held > _FRAME_BYTES or row == len(columns[0]):
            yield [column[start:row] for column in columns]
            start, held = row, 0


def answers(message: list[Any], inp: Any, out: Any) -> Iterator[list[Any]]:
    """What a "parse" is answered with; the last is an "end" or a "fail"."""
    _, kind, size_bytes, limit_bytes, fields, inline = message
    file = _Remote(inp, out, size_bytes)
    try:
        if kind == "html":
            yield from html(inline, limit_bytes)
        elif kind == "parquet":
            yield from parquet(file, limit_bytes, fields)
        else:
            yield from {"pdf": pdf, "docx": docx}[kind](file, limit_bytes)
        yield ["end"]
    except Refused as error:
        yield ["fail", *error.args]
    except MemoryError:
        yield ["fail", MEMORY, kind]
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("pypdfium2", "docx"):
            yield ["fail", MISSING, f"{error.name}: install forge-ray[office]"]
        else:  # what is always there and cannot be mapped
            yield ["fail", MEMORY, f"{kind}: {error}"[:200]]
    except Exception as error:
        name = {"pdf": "PDF", "docx": "DOCX", "html": "HTML", "parquet": "Parquet"}[kind]
        memory = "memory" in str(error).lower() and type(error).__name__ == "ArrowMemoryError"
        what = MEMORY if memory else f"unreadable: torn {name}"
        yield ["fail", what, f"{type(error).__name__}: {error}"[:200]]


def main(memory_bytes: int, cpu_s: int) -> None:
    """Answers until the parent is gone."""
    inp = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # what a parser prints must not be taken for an answer
        os.dup2(null, fd)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        message = receive(inp)
        _more_cpu(cpu_s)
        for answer in answers(message, inp, out):
            send(out, answer)
            _more_cpu(cpu_s)


def _more_cpu(cpu_s: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + cpu_s + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
