"""What reading a file gives: documents, and what was skipped and why.

Owns both records, what a file's name says of its format, the kinds of skips that more than one format has, and the
form of languages, times and metadata.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from forge_ray.config import FilesSource, HttpSource

SHORT, LARGE, NOT_UTF8 = "shorter than min_document_chars", "larger than max_document_bytes", "not UTF-8"
NO_TEXT, TWO_COLUMNS = "unreadable: no text field", "unreadable: two columns of one name"


class Document(NamedTuple):
    """One document; a tuple, because a frozen dataclass of eight fields takes four times as long to make.

    `key` is its place below its source, the same wherever the source lies; `source` is where exactly it came from;
    `group` is what is held out as a whole; `language` is an ISO 639 code, `created` ISO 8601, `metadata` a JSON object;
    each of these is empty where it is not known.
    """

    key: str
    source: str
    group: str
    licence: str
    text: str
    language: str = ""
    created: str = ""
    metadata: str = ""


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


class Format(NamedTuple):
    """What a file holds (`text html jsonl csv parquet pdf docx zip tar`) and its compression (`gz zst`, or none)."""

    kind: str
    codec: str = ""

    @property
    def whole(self) -> bool:
        """Whether the file is one document, so that its size says whether it is too large."""
        return self.kind in ("text", "html") and not self.codec


_KINDS = {
    **dict.fromkeys(("txt", "md"), "text"),
    **dict.fromkeys(("html", "htm"), "html"),
    **dict.fromkeys(("jsonl", "ndjson"), "jsonl"),
    **{kind: kind for kind in ("csv", "parquet", "pdf", "docx", "zip", "tar")},
}
_CODECS = {"gz": "gz", "zst": "zst"}
_SHORTHAND = {"tgz": Format("tar", "gz"), "tzst": Format("tar", "zst")}
SUFFIXES = tuple(f".{name}" for name in (*_KINDS, *_SHORTHAND, *_CODECS))
_TYPES = {
    "text/plain": "text",
    "text/markdown": "text",
    "text/html": "html",
    "application/xhtml+xml": "html",
    "text/csv": "csv",
    **dict.fromkeys(("application/jsonl", "application/x-ndjson", "application/jsonlines"), "jsonl"),
    "application/vnd.apache.parquet": "parquet",
    "application/pdf": "pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/zip": "zip",
    "application/x-tar": "tar",
}


def format_of(name: str) -> Format | None:
    """The format that a file's name says; None for one that is not read."""
    stem, _, suffix = name.lower().rpartition(".")
    if codec := _CODECS.get(suffix, ""):
        suffix = stem.rpartition(".")[2]
    elif suffix in _SHORTHAND:
        return _SHORTHAND[suffix]
    kind = _KINDS.get(suffix)
    if kind is None or (codec and kind in ("parquet", "pdf", "docx", "zip")) or "." not in name:
        return None
    return Format(kind, codec)


def format_of_type(content_type: str) -> Format | None:
    """The format that a media type says."""
    kind = _TYPES.get(content_type.partition(";")[0].strip().lower())
    return Format(kind) if kind else None


@dataclass(frozen=True)
class Place:
    """A file, or a member of it, and what its source says of all of its documents."""

    key: str
    source: str
    about: FilesSource | HttpSource
    limit_bytes: int
    charset: str = ""

    def below(self, name: str) -> Place:
        return replace(self, key=f"{self.key}/{name}", source=f"{self.source}/{name}")

    def skipped(self, kind: str, detail: str = "") -> Skipped:
        return Skipped(self.source, kind, detail)

    def document(self, text: str, created: str = "") -> Document:
        when = moment(created)
        return Document(self.key, self.source, self.key, self.about.licence, text.strip(), created=when or "")


_LANGUAGE = re.compile(r"[a-z]{2,3}$")


@functools.lru_cache(maxsize=4096)
def language_code(stated: str) -> str:
    """The language of a tag such as `en-US`, in lower case; empty for what is no tag."""
    code = stated.replace("_", "-").partition("-")[0].lower()
    return code if _LANGUAGE.match(code) else ""


def moment(stated: str) -> str:
    """An ISO 8601 date as it is, a time in UTC to the second (without a zone: as it is); empty for anything else."""
    from datetime import UTC, date, datetime

    if not 8 <= len(stated) <= 40:
        return ""
    try:
        if len(stated) <= 10:
            return date.fromisoformat(stated).isoformat()
        when = datetime.fromisoformat(stated)
        if when.tzinfo:
            return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return when.isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        return ""


def canonical(values: dict[str, Any]) -> str:
    """A JSON object, equal for equal values: keys sorted, no blanks; empty for none."""
    if not values:
        return ""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "replace").decode()
