"""Reading `.txt .md .jsonl .parquet .html` files from a folder or a URI.

Owns listing a source, cutting it into units of work, and turning a file into documents. A single bad file or record is
a `Skipped` with its reason, never the end of the run; a file that cannot be read at all is a `StorageError`, because it
says nothing about the document.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

from forge_ray.config import FilesSource, IngestConfig
from forge_ray.errors import DataError, StorageError
from forge_ray.storage import open_filesystem

SUFFIXES = (".txt", ".md", ".html", ".htm", ".jsonl", ".parquet")
UNIT_BYTES = 16 << 20
SHORT, LARGE, NOT_UTF8 = "shorter than min_document_chars", "larger than max_document_bytes", "not UTF-8"
_BUFFER_BYTES = 1 << 20
_BLOCKS = frozenset(
    (
        "title",
        "p",
        "div",
        "section",
        "article",
        "blockquote",
        "li",
        "dt",
        "dd",
        "tr",
        "br",
        "pre",
        "note",
        "important",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
    )
)
_CELLS = frozenset(("td", "th"))
_HIDDEN = ("script", "style", "noscript", "template")


@dataclass(frozen=True)
class Document:
    """One document.

    `key` is its place below its source, the same wherever the source lies; `source` is where exactly it came from;
    `group` is what is held out as a whole.
    """

    key: str
    source: str
    group: str
    licence: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A document or file left out, and why: `kind` to count by, `detail` of this one."""

    source: str
    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """Both, as a person reads it."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    @property
    def unreadable(self) -> bool:
        """Whether it was of the wrong kind, not of the wrong size."""
        return self.kind not in (SHORT, LARGE)


def observe(source: FilesSource) -> dict[str, Any]:
    """Digest and size of the source's listing."""
    listing = _list(source)
    rows = json.dumps([[row["name"], row["size"], row["state"]] for row in listing])
    return {
        "uri": source.uri,
        "files": len(listing),
        "bytes": sum(row["size"] for row in listing),
        "listing": hashlib.sha256(rows.encode()).hexdigest(),
    }


def units(source: FilesSource) -> list[dict[str, Any]]:
    """Neighbouring files together until `UNIT_BYTES`; a larger file is a unit of its own."""
    groups: list[list[dict[str, Any]]] = []
    total = 0
    for row in _list(source):
        if not groups or total + row["size"] > UNIT_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(row)
        total += row["size"]
    common = {"kind": "files", "uri": source.uri, "text_field": source.text_field, "licence": source.licence}
    columns = (("names", "name"), ("keys", "key"), ("sizes", "size"))
    return [{**common, **{many: [row[one] for row in group] for many, one in columns}} for group in groups]


def read(unit: dict[str, Any], config: IngestConfig) -> Iterator[Document | Skipped]:
    """The documents of a unit, in the order of its files.

    Raises:
        StorageError: A file cannot be read, for whatever reason but its content.
    """
    fs, _ = open_filesystem(unit["uri"])
    for name, key, size in zip(unit["names"], unit["keys"], unit["sizes"], strict=True):
        source = fs.unstrip_protocol(name) if "://" in unit["uri"] else name
        place = _Place(key, source, unit["licence"], unit["text_field"])
        whole = not name.lower().endswith((".jsonl", ".parquet"))
        if whole and size > config.max_document_bytes:
            yield Skipped(source, LARGE, f"{size} bytes")
            continue
        with _reading(source):
            opened = fs.open(name, "rb")
        with opened, io.BufferedReader(_Guarded(opened, source), _BUFFER_BYTES) as stream:
            yield from _parse(stream, place)


@dataclass(frozen=True)
class _Place:
    """A file, or a record in it, and what its source says of all of its documents."""

    key: str
    source: str
    licence: str
    text_field: str

    def record(self, number: int) -> _Place:
        return _Place(f"{self.key}#{number}", f"{self.source}#{number}", self.licence, self.text_field)

    def document(self, text: str) -> Document:
        # Records of one file have nothing to tell them apart but themselves: each is its own group.
        return Document(self.key, self.source, self.key, self.licence, text)

    def skipped(self, kind: str, detail: str = "") -> Skipped:
        return Skipped(self.source, kind, detail)


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turns whatever a store raises into `StorageError`: clients of object stores have many kinds of their own."""
    try:
        yield
    except Exception as error:
        raise StorageError(
            f"a file of a source cannot be read: {type(error).__name__}: {str(error)[:300]}",
            got=source,
            do="check that it is still there, its mode, the credentials and the disk or network; then run again",
        ) from error


class _Guarded(io.RawIOBase):
    """A file whose errors of reading are `StorageError`, so that parsers' `OSError` can only mean torn content."""

    def __init__(self, stream: Any, source: str) -> None:
        self._stream, self._source = stream, source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _reading(self._source):
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        with _reading(self._source):
            return bytes(self._stream.read())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _reading(self._source):
            self._stream.seek(offset, whence)
            return int(self._stream.tell())

    def tell(self) -> int:
        return int(self._stream.tell())


def _list(source: FilesSource) -> list[dict[str, Any]]:
    fs, path = open_filesystem(source.uri)
    try:
        if not fs.exists(path):
            raise StorageError(
                "a source does not exist", got=source.uri, wanted="a file or folder", do="mend ingest.sources"
            )
        found = fs.find(path, detail=True)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"a source cannot be listed: {error}", got=source.uri, do="check the URI, the network and the credentials"
        ) from error
    rows = [
        {
            "name": name,
            "key": name.removeprefix(path.rstrip("/") + "/") if name != path else name.rpartition("/")[2],
            "size": int(info["size"]),
            "state": str(info.get("ETag") or info.get("etag") or info.get("mtime") or ""),
        }
        for name, info in sorted(found.items())
        if name.lower().endswith(SUFFIXES)
    ]
    if not rows:
        raise DataError(
            "the corpus is empty: the source holds no file that can be read",
            got=f"{source.uri} ({len(found)} other files)",
            wanted=" ".join(SUFFIXES),
            do="point ingest.sources at the folder of the documents",
        )
    return rows


def _parse(stream: io.BufferedReader, place: _Place) -> Iterator[Document | Skipped]:
    suffix = place.key.lower().rpartition(".")[2]
    if suffix == "jsonl":
        yield from _parse_jsonl(stream, place)
    elif suffix == "parquet":
        yield from _parse_parquet(stream, place)
    else:
        data = stream.read()
        try:
            text = data.decode("utf-8-sig")
            yield place.document(html_text(text) if suffix in ("html", "htm") else text.strip())
        except UnicodeDecodeError as error:
            yield place.skipped(NOT_UTF8, f"byte {error.start}")
        except ValueError as error:
            yield place.skipped("unreadable: not HTML", str(error)[:200])


def _parse_jsonl(stream: io.BufferedReader, file: _Place) -> Iterator[Document | Skipped]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = file.record(number)
        try:
            text = json.loads(line)[place.text_field]
        except UnicodeDecodeError as error:
            yield place.skipped(NOT_UTF8, f"byte {error.start}")
        except (KeyError, TypeError) as error:
            yield place.skipped("unreadable: no text field", f"{place.text_field!r}, {type(error).__name__}")
        except (ValueError, RecursionError) as error:
            yield place.skipped("unreadable: not JSON", type(error).__name__)
        else:
            yield _record(text, place)


def _parse_parquet(stream: io.BufferedReader, file: _Place) -> Iterator[Document | Skipped]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(stream)
        names = table.schema_arrow.names
        if file.text_field not in names:
            yield file.skipped("unreadable: no text field", f"{file.text_field!r}, only {', '.join(names)}")
            return
        for batch in table.iter_batches(batch_size=256, columns=[file.text_field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _record(value, file.record(number))
    except (pa.ArrowException, OSError, ValueError) as error:
        # pyarrow tells of torn pages by OSError too; an error of reading comes as StorageError, from `_Guarded`.
        yield file.skipped("unreadable: torn Parquet", str(error)[:200])


def _record(text: Any, place: _Place) -> Document | Skipped:
    if not isinstance(text, str):
        return place.skipped("unreadable: the text is no string", type(text).__name__)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return place.skipped("unreadable: half of a surrogate pair", f"character {error.start}")
    return place.document(text.strip())


def html_text(html: str) -> str:
    """The readable text of an HTML page or fragment: a line for each block, a dash for each item, code as it stands.

    Raises:
        ValueError: A declaration that no HTML has.
    """
    parser = _HtmlText()
    try:
        parser.feed(html.replace("\0", ""))
        parser.close()
    except AssertionError as error:  # how the standard library says so
        raise ValueError(str(error)) from None
    lines = (" ".join(line.split()).replace("\0", " ").rstrip() for line in "".join(parser.out).split("\n"))
    return "\n".join(line for line in lines if line)


class _HtmlText(HTMLParser):
    """Text with a line end around each block; blanks of code are NULs, so that they outlast the others' collapsing."""

    def __init__(self) -> None:
        super().__init__()
        self.out: list[str] = []
        self._open = dict.fromkeys(("pre", *_HIDDEN), 0)
        self._item = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag(tag, 1)
        self._item = self._item or tag == "li"

    def handle_endtag(self, tag: str) -> None:
        self._tag(tag, -1)
        self._item = self._item and tag != "li"

    def _tag(self, tag: str, change: int) -> None:
        if tag in self._open:
            self._open[tag] = max(0, self._open[tag] + change)
        self.out.append("\n" if tag in _BLOCKS else " " if tag in _CELLS else "")

    def handle_data(self, data: str) -> None:
        if any(self._open[tag] for tag in _HIDDEN):
            return
        if self._item and data.strip():
            self.out.append("- ")
            self._item = False
        self.out.append(data.expandtabs(4).replace(" ", "\0") if self._open["pre"] else data.replace("\n", " "))
