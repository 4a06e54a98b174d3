"""One line of a document, and the words in it that name a value: key, heading of a column, words of its sentence.

Owns what counts as naming. Does not own which words are wanted (identifiers.py).
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

CONTEXT_CHARS = 48
HEADING_CHARS = 4096
CACHED_CHARS = 512
_NUMBERS = re.compile(r"[\s\d.,:;+()\[\]{}/\"'-]*\d[\s\d.,:;+()\[\]{}/\"'-]*")
_KEY = re.compile(r"([\w.-]{1,40})(?:[\"'] ?: ?|=|[\"']\] ?= ?| = )[\"'(]{0,2}$")
_SENTENCE_END = re.compile(r"(?<=\w{4})[.!?]\s+(?=\w)")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# What a value was replaced by says nothing of its neighbours; the window may have cut it.
_PLACEHOLDER = re.compile(r"(?:<|^)[A-Z_]{1,12}>|<[A-Z_]{1,12}$")


class Line:
    """A line of a text, from `start` to `end`; finders yield places in the text."""

    def __init__(self, text: str, start: int, end: int) -> None:
        self.text, self.start, self.end = text, start, end

    def says(self, words: re.Pattern[str]) -> bool:
        """Whether the context of any value of this line may hold these words; cheaper than asking for each value."""
        near = self._near
        return _says(words, near) if len(near) <= CACHED_CHARS else bool(words.search(near))

    @cached_property
    def _near(self) -> str:
        """All that `context` can say, and `|` for numbers and marks: rows of a table of numbers then say the same."""
        before = self.text[max(0, self.start - CONTEXT_CHARS) : self.end]
        return _words(_NUMBERS.sub(" | ", f"{before}\n{self._head}\n"))

    def context(self, start: int, end: int) -> str:
        """What names the value from `start` to `end`, in lower case, words apart (`userPhone_no` is `user phone no`).

        A value with a key of its own (`key=value`, `"key": value`) is named by the key; one in a row of a table by the
        heading of its column; any other by the words before it in its sentence (by the end of the line before, where
        it begins its line), and after ` | ` those that follow.

        Cost: a look at up to HEADING_CHARS characters.
        """
        text = self.text
        before = text[max(self.start, start - CONTEXT_CHARS) : start]
        if key := _KEY.search(before):
            return _words(key[1])
        if heading := self._heading(start):
            return _words(heading)
        if start - self.start < 8:
            before = text[max(0, self.start - CONTEXT_CHARS) : start]
        after = text[end : min(self.end, end + CONTEXT_CHARS // 2)]
        return _words(f"{_SENTENCE_END.split(before)[-1]} | {after}")

    @cached_property
    def _head(self) -> str:
        """The paragraph's first line; empty for that line itself, and where it is far away."""
        first = self.text.rfind("\n\n", max(0, self.start - HEADING_CHARS), self.start)
        first = first + 2 if first >= 0 else (0 if self.start <= HEADING_CHARS else self.start)
        if first >= self.start or self.end - self.start > HEADING_CHARS:
            return ""
        return self.text[first : self.text.find("\n", first)]

    @cached_property
    def _table(self) -> tuple[str, list[str]]:
        """The delimiter and the headings, where line and heading have as many cells, three or more."""
        for mark in "\t;|,":
            if self._head.count(mark) >= 2:
                names = _cells(self._head, mark)
                if len(names) == len(_cells(self.text[self.start : self.end], mark)) >= 3:
                    return mark, names
        return "", []

    def _heading(self, start: int) -> str:
        mark, names = self._table
        return names[len(_cells(self.text[self.start : start + 1], mark)) - 1] if mark else ""


@lru_cache(maxsize=1 << 12)
def _says(words: re.Pattern[str], near: str) -> bool:
    return bool(words.search(near))


def _words(text: str) -> str:
    return _CAMEL.sub(" ", _PLACEHOLDER.sub(" ", text)).replace("_", " ").lower()


def _cells(row: str, mark: str) -> list[str]:
    """Cells between delimiters, of which those inside double quotation marks are none; quotation marks are left out."""
    outside = row.strip("\r\n").split('"')
    outside[1::2] = [quoted.replace(mark, " ") for quoted in outside[1::2]]
    return "".join(outside).split(mark)
