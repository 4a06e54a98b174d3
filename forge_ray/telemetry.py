"""What a run tells while it works: log lines and progress on stderr; results go to stdout.

Owns the look of the terminal: a live bar where stderr is one, plain lines elsewhere (one every `PLAIN_EVERY_S`
seconds). Does not own what is kept of it: that is `events.py`.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY_S = 10.0


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A bar for one piece of work: `update(done, note)` from 0 to `total`.

    The note is what the reader wants to know, such as loss and tokens/s. Time left is reckoned from the rate so far.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.start, self.done = label, total, start, start
        self.note = ""
        self._began = self._printed = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Live

            columns = [
                TextColumn("  {task.description:<12}"),
                BarColumn(28),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            ]
            columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True)]
            self._live = Live(*columns, console=Console(stderr=True))
            self._task = self._live.add_task(self.label, total=self.total, completed=self.start, note="")
            self._live.start()
        return self

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of the total is done."""
        self.done, self.note = done, note
        if self._live:
            self._live.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        rate = (self.done - self.start) / max(self._printed - self._began, 1e-9)
        left = f", {format_s((self.total - self.done) / rate)} left" if rate > 0 and self.done < self.total else ""
        say(f"  {self.label}: {self.done}/{self.total}{f', {self.note}' if self.note else ''}{left}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        elif self.done > self.start:
            self._print()


def format_s(seconds: float) -> str:
    """`9.4 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 59.95:  # what would round to 60.0 is a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(count: float) -> str:
    """`512 B`, `1.4 MB`: decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 0 if unit == "B" else 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
