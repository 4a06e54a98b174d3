"""Runs the parsers of hostile formats in a child process that may crash, hang or swell without harm.

Owns the child: its limits, its life, and turning its death into an `Unreadable`. `parsers.py` is what runs in it. A
child is used again for the next file, and replaced when it died; idle ones are kept, one for each reader at a time.

Limits, for each file: 2 GiB of address space; 60 s of CPU time, and 600 s of waiting, for each piece of an answer. What
is needed beyond them is a parser caught by its input: 60 pages of documentation took 0.025 s together.

Cost, 2026-11: 0.05 s to start a child, 0.2 s more for its first Parquet; 25 to 60 µs for each file, where a page of
40 kB takes 1,100.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from forge_ray.data.reading import parsers
from forge_ray.data.reading.unpack import Unreadable

MEMORY_BYTES = 2 << 30
CPU_S = 60
SILENCE_S = 600.0
CRASHED, SLOW = "unreadable: the parser crashed", "unreadable: the parser took too long"
_HEAD = 4
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
_idle: list[_Child] = []


def parse(
    kind: str,
    limit_bytes: int,
    stream: Any = None,
    size_bytes: int = 0,
    fields: list[str] | None = None,
    data: Any = None,
) -> Iterator[list[Any]]:
    """The answers of a parser about one file, as `parsers.py` lists them, without "read", "end" and "fail".

    Args:
        kind: `html` (of `data`, UTF-8), `pdf`, `docx` or `parquet` (of `stream`, which can seek).
        limit_bytes: Largest text of one document; an answer that is much larger ends the child.
        stream: The file; read only here, with whatever its `read` raises passing through.
        size_bytes: Its size.
        fields: Columns of Parquet, the text's first.
        data: The content, instead of a stream.

    Raises:
        Unreadable: The parser refuses the file, crashed, or went beyond its limits.
    """
    given = 0
    for last in (False, False, True):
        child, used = _take()
        try:
            for number, answer in enumerate(_answers(child, kind, limit_bytes, stream, size_bytes, fields, data)):
                if number >= given:
                    given += 1
                    yield answer
        except Unreadable as error:
            outside = error.detail in _FROM_OUTSIDE
            if error.kind in (CRASHED, SLOW, parsers.MEMORY):  # what memory it holds on to, the next file would lack
                child.kill()
            else:
                _idle.append(child)
            # What an earlier file left behind, or whoever kills processes, must not decide what is read of this one.
            if last or not (outside or (used and error.kind in (CRASHED, SLOW, parsers.MEMORY))):
                raise
            if error.kind == parsers.MEMORY:
                close()
        except BaseException:  # the reader stopped half-way, or the store failed: the child waits for what never comes
            child.kill()
            raise
        else:
            _idle.append(child)
            return


def _answers(
    child: _Child, kind: str, limit_bytes: int, stream: Any, size_bytes: int, fields: list[str] | None, data: Any
) -> Iterator[list[Any]]:
    child.send(["parse", kind, size_bytes, limit_bytes, fields, data])
    while True:
        answer = child.receive(4 * limit_bytes + (16 << 20))
        if answer[0] == "read":
            stream.seek(int(answer[1]))
            child.send(stream.read(int(answer[2])))
        elif answer[0] == "end":
            return
        elif answer[0] == "fail":
            raise Unreadable(str(answer[1]), str(answer[2]))
        else:
            yield answer


def close() -> None:
    """Ends the idle children."""
    while _idle:
        _idle.pop().kill()


atexit.register(close)


def _take() -> tuple[_Child, bool]:
    """A child, and whether it has worked before."""
    while _idle:
        child = _idle.pop()
        if child.usable():
            return child, True
        child.kill()
    return _Child(), False


class _Child:
    """One process and its two pipes."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            # -P: this folder has modules named like others' packages.
            [sys.executable, "-P", parsers.__file__, str(MEMORY_BYTES), str(CPU_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._inp, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)

    def usable(self) -> bool:
        return self._owner == os.getpid() and self._process.poll() is None

    def send(self, message: Any) -> None:
        data = memoryview(msgspec.msgpack.encode(message))
        data = memoryview(len(data).to_bytes(_HEAD, "big") + bytes(data))
        try:
            while data:
                data = data[os.write(self._inp, data) :]
        except OSError:
            raise self._died() from None

    def receive(self, max_bytes: int) -> list[Any]:
        """One frame.

        Raises:
            Unreadable: None came, or one that no parser sends.
        """
        until_s = time.monotonic() + SILENCE_S
        size = int.from_bytes(self._read(_HEAD, until_s), "big")
        if size > max_bytes:
            raise Unreadable(CRASHED, f"an answer of {size} bytes")
        try:
            answer = msgspec.msgpack.decode(self._read(size, until_s))
            if not isinstance(answer, list) or not answer:
                raise ValueError("no array")
        except ValueError as error:
            raise Unreadable(CRASHED, f"its answer is none: {error}") from None
        return answer

    def _read(self, size: int, until_s: float) -> bytes:
        pieces: list[bytes] = []
        while size:
            if not self._selector.select(max(0.0, until_s - time.monotonic())):
                raise Unreadable(SLOW, f"no answer in {SILENCE_S:g} s")
            piece = os.read(self._out, min(size, 1 << 20))
            if not piece:
                raise self._died()
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _died(self) -> Unreadable:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        code = self._process.poll()
        if code == -signal.SIGXCPU:
            return Unreadable(SLOW, f"more than {CPU_S} s of CPU time")
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
        return Unreadable(CRASHED, name)

    def kill(self) -> None:
        """Ends it; a fork of the process that started it leaves it alone."""
        if self._owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def _environment() -> dict[str, str]:
    """What Python needs to start, and none of the credentials; one thread, for the limits count all of them."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL") if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # the others reserve address space ahead
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
