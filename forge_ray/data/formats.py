"""Reading `.txt .md .jsonl .parquet .html` files from a folder or a URI.

Owns listing a source, cutting it into units of work, and turning a file into documents. A single bad file or record is
a `Skipped` with its reason, never the end of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import IO, Any

from forge_ray.config import FilesSource, IngestConfig
from forge_ray.errors import DataError, StorageError
from forge_ray.storage import open_filesystem

SUFFIXES = (".txt", ".md", ".html", ".htm", ".jsonl", ".parquet")
UNIT_BYTES = 16 << 20
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
    """One document: `source` is where exactly it came from, `group` what is held out as a whole."""

    source: str
    group: str
    licence: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A document or file left out, and why."""

    source: str
    reason: str


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
    return [
        {**common, "names": [row["name"] for row in group], "sizes": [row["size"] for row in group]} for group in groups
    ]


def read(unit: dict[str, Any], config: IngestConfig) -> Iterator[Document | Skipped]:
    """The documents of a unit, in the order of its files."""
    fs, _ = open_filesystem(unit["uri"])
    for name, size in zip(unit["names"], unit["sizes"], strict=True):
        source = fs.unstrip_protocol(name) if "://" in unit["uri"] else name
        whole = not name.lower().endswith((".jsonl", ".parquet"))
        if whole and size > config.max_document_bytes:
            yield Skipped(source, f"larger than {config.max_document_bytes} bytes")
            continue
        try:
            with fs.open(name, "rb") as stream:
                yield from _parse(stream, name, source, unit)
        except UnicodeDecodeError as error:
            yield Skipped(source, f"not UTF-8 at byte {error.start}")
        except (OSError, ValueError) as error:
            # pyarrow's ArrowInvalid is a ValueError: a torn Parquet file is one bad file.
            yield Skipped(source, f"unreadable: {str(error)[:200]}")


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


def _parse(stream: IO[bytes], name: str, source: str, unit: dict[str, Any]) -> Iterator[Document | Skipped]:
    suffix = name.lower().rpartition(".")[2]
    if suffix == "jsonl":
        yield from _parse_jsonl(stream, source, unit)
    elif suffix == "parquet":
        yield from _parse_parquet(stream, source, unit)
    else:
        text = stream.read().decode("utf-8-sig")
        yield Document(source, source, unit["licence"], html_text(text) if suffix in ("html", "htm") else text.strip())


def _parse_jsonl(stream: IO[bytes], source: str, unit: dict[str, Any]) -> Iterator[Document | Skipped]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{source}#{number}"
        try:
            text = json.loads(line)[unit["text_field"]]
        except UnicodeDecodeError as error:
            yield Skipped(where, f"not UTF-8 at byte {error.start}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            yield Skipped(where, f"no JSON object with the field {unit['text_field']!r}: {type(error).__name__}")
        else:
            yield _record(text, where, unit)


def _parse_parquet(stream: IO[bytes], source: str, unit: dict[str, Any]) -> Iterator[Document | Skipped]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream)
    if unit["text_field"] not in table.schema_arrow.names:
        yield Skipped(source, f"no column {unit['text_field']!r}, only {', '.join(table.schema_arrow.names)}")
        return
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[unit["text_field"]]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield _record(value, f"{source}#{number}", unit)


def _record(text: Any, where: str, unit: dict[str, Any]) -> Document | Skipped:
    if not isinstance(text, str):
        return Skipped(where, f"the text is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Skipped(where, f"half of a surrogate pair at character {error.start}")
    # Records of one file have nothing to tell them apart but themselves: each is its own group.
    return Document(where, where, unit["licence"], text.strip())


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
        raise ValueError(f"not HTML: {error}") from None
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
