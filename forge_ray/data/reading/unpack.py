"""Bytes out of files nobody vouches for: decompression, archives and lines, each in bounded memory.

Owns the limits: how far a file may expand, how long a line may be, which members of an archive are read. Nothing is
ever extracted to a path, so that a name in an archive is only a name. Does not know what the bytes mean
(`formats.py`).

Cost, one core of the development machine, 43 MB of JSON lines, 2026-11: gzip by ISA-L 860 MB/s where zlib gives
310 MB/s, Zstandard 1,200 MB/s, cutting into lines 2,700 MB/s.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forge_ray.errors import ForgeError

BOMB = "unreadable: decompression bomb"
TORN = "unreadable: torn archive or compression"
UNSAFE_NAME = "unreadable: unsafe name in an archive"
NO_FILE = "unreadable: not a regular file"
NESTED = "unreadable: archive in an archive"
TWICE = "unreadable: name twice in an archive"
CLOSED = "unreadable: encrypted"

CHUNK_BYTES = 1 << 20
# Text compresses 3 to 10 times, logs up to 100; deflate ends at 1,032 and Zstandard at far more.
MAX_RATIO = 250
FREE_BYTES = 64 << 20
"""What any file may expand to, whatever its ratio."""
_DIRECTORY_BYTES = 32 << 20  # a table of contents of a zip: about 400,000 members, 210 MB in Python
_HEADER_BYTES = 1 << 20  # one extended header of a tar
_SPOOL_BYTES = 8 << 20
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Unreadable(Exception):
    """What stops the reading of one file, as the kind and detail of its `Skipped`."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Budget:
    """What a file may still expand to: `FREE_BYTES`, and `MAX_RATIO` times what of it has been read."""

    def __init__(self, packed_bytes: int = 0) -> None:
        self.packed_bytes, self.bytes = packed_bytes, 0

    def spend(self, num_bytes: int) -> None:
        """Raises `Unreadable` once too much has come out."""
        self.bytes += num_bytes
        if self.bytes > FREE_BYTES and self.bytes > MAX_RATIO * self.packed_bytes:
            raise Unreadable(BOMB, f"{self.packed_bytes} bytes expand to more than {self.bytes}")


class _Counted(io.RawIOBase):
    """A file that tells a budget how much of it has been read."""

    def __init__(self, stream: Any, budget: Budget) -> None:
        self._stream, self._budget = stream, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._budget.packed_bytes += count
        return int(count)


class _Spent(io.RawIOBase):
    """What comes out of a decompressor, against a budget; its many errors become `Unreadable`."""

    def __init__(self, stream: Any, *budgets: Budget | None) -> None:
        self._stream, self._budgets = stream, [budget for budget in budgets if budget]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with torn():
            count = self._stream.readinto(buffer)
        for budget in self._budgets:
            budget.spend(count)
        return int(count)


@contextlib.contextmanager
def torn() -> Iterator[None]:
    """Turns what decompressors and archive readers raise on bad bytes into `Unreadable`.

    An error of the store below arrives as `StorageError` and passes, so that here `OSError` means bad bytes too.
    """
    try:
        yield
    except (ForgeError, Unreadable, GeneratorExit):
        raise
    except Exception as error:
        raise Unreadable(TORN, f"{type(error).__name__}: {str(error)[:200]}") from error


def decompressed(stream: Any, codec: str, budget: Budget, outer: Budget | None = None) -> io.BufferedReader:
    """The content of a `gz` or `zst` file of any number of members or frames; reading raises `Unreadable`.

    It is taken from `budget`, which this fills as it reads, and from that of the archive around it.
    """
    packed = io.BufferedReader(_Counted(stream, budget), CHUNK_BYTES)
    if codec == "gz":
        from isal import igzip

        inner: Any = igzip.IGzipFile(fileobj=packed, mode="rb")
    else:
        import pyarrow as pa

        # zstandard's own reader ends without an error where a frame is torn; Arrow's says so.
        inner = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd")
    return io.BufferedReader(_Spent(inner, budget, outer), CHUNK_BYTES)


def whole(stream: Any, max_bytes: int) -> bytes | None:
    """All that is left of a stream; None if it is more than `max_bytes`, of which no more than that is held."""
    pieces, held = [], 0
    while piece := stream.read(min(CHUNK_BYTES, max_bytes + 1 - held)):
        pieces.append(piece)
        held += len(piece)
        if held > max_bytes:
            return None
    return b"".join(pieces)


@contextlib.contextmanager
def seekable(stream: Any, max_bytes: int) -> Iterator[tuple[Any, int] | None]:
    """A stream as a file that can be read anywhere, and its size: in memory, then on disk; None if it is larger."""
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, prefix="forge-") as spool:
        while piece := stream.read(CHUNK_BYTES):
            spool.write(piece)
            if spool.tell() > max_bytes:
                yield None
                return
        size = spool.tell()
        spool.seek(0)
        yield spool, size


def lines(stream: Any, max_bytes: int) -> Iterator[list[bytes | None]]:
    """The lines of a stream without their ends, many at a time; None for one of more than `max_bytes`.

    A line that is too long is read past, never held.
    """
    pieces: list[bytes] = []
    held = 0
    while chunk := stream.read(CHUNK_BYTES):
        first, *rest = chunk.split(b"\n")
        held += len(first)
        if held <= max_bytes:
            pieces.append(first)
        else:
            pieces.clear()
        if not rest:
            continue
        last = rest.pop()
        found = [b"".join(pieces) if held <= max_bytes else None, *rest]
        if max_bytes < CHUNK_BYTES:
            found = [line if line is None or len(line) <= max_bytes else None for line in found]
        yield found
        pieces, held = [last], len(last)
    if held:
        yield [b"".join(pieces) if held <= max_bytes else None]


def as_utf8(stream: io.BufferedReader) -> io.BufferedReader:
    """A text file as UTF-8 without a byte order mark; one that begins with a mark of UTF-16 or 32 is converted."""
    start = stream.peek(4)[:4]
    for mark, encoding in _BOMS:
        if start.startswith(mark):
            stream.read(len(mark))
            return stream if encoding == "utf-8" else io.BufferedReader(_Recoded(stream, encoding), CHUNK_BYTES)
    return stream


class _Recoded(io.RawIOBase):
    """A file of another encoding as UTF-8; what is none in it becomes U+FFFD."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)("replace")
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._stream.read(CHUNK_BYTES)
            self._ready = memoryview(self._decoder.decode(data, final=not data).encode("utf-8", "replace"))
            if not data:
                break
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def decoded(data: bytes) -> str:
    """A whole text by its byte order mark, or as UTF-8.

    Raises:
        UnicodeDecodeError: It is not that.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    return data.decode()


@dataclass(frozen=True)
class Member:
    """One file of an archive; `stream` can be read until the next member is asked for.

    `problem` says instead why it must not be read.
    """

    name: str
    size_bytes: int
    stream: io.BufferedReader | None = None
    problem: str = ""


def members(stream: Any, kind: str, budget: Budget) -> Iterator[Member]:
    """The files of a `zip` (which can seek) or `tar` in its own order; what a zip's expand to is taken from `budget`.

    Raises:
        Unreadable: The archive is torn, or a bomb; the members before have been given by then.
    """
    seen: set[int] = set()
    for member in _zip_members(stream, budget) if kind == "zip" else _tar_members(stream):
        problem = member.problem or _name_problem(member.name)
        shown = member.name.encode("utf-8", "backslashreplace").decode()
        if not problem and hash(member.name) in seen:
            problem = TWICE
        seen.add(hash(member.name))
        yield Member(shown, member.size_bytes, None if problem else member.stream, problem)


def _name_problem(name: str) -> str:
    """Names that point out of the archive are refused, though nothing is written: keys are made of them."""
    parts = name.split("/")
    unsafe = name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or name[1:2] == ":"
    try:
        name.encode()
    except UnicodeEncodeError:
        unsafe = True
    return UNSAFE_NAME if unsafe else ""


class _Capped:
    """A file of which no single read is large: `zipfile` reads a table of contents of any size at once."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_BYTES:
            raise Unreadable(BOMB, f"a table of contents of {size} bytes")
        return bytes(self._stream.read(_DIRECTORY_BYTES if size < 0 else size))


def _zip_members(stream: Any, budget: Budget) -> Iterator[Member]:
    with torn():
        archive = zipfile.ZipFile(_Capped(stream))  # type: ignore[arg-type]
    entries = archive.infolist()
    overlapping = _overlapping(entries)
    for info in entries:
        if info.is_dir():
            continue
        mode = info.external_attr >> 16
        problem = ""
        if info.header_offset in overlapping:
            problem = BOMB
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            problem = NO_FILE
        elif info.flag_bits & 0x1:
            problem = CLOSED
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = "unreadable: unknown compression"  # that of lzma allocates whatever a file names
        if problem:
            yield Member(info.filename, info.file_size, problem=problem)
            continue
        try:
            with torn():
                opened = archive.open(info)
        except Unreadable:
            yield Member(info.filename, info.file_size, problem=TORN)
            continue
        with opened, io.BufferedReader(_Spent(opened, budget), CHUNK_BYTES) as member:
            yield Member(info.filename, info.file_size, member)


def _overlapping(entries: list[zipfile.ZipInfo]) -> set[int]:
    """Where members begin that share bytes with another: how 46 MB become 4.5 PB (Fifield, WOOT 2019)."""
    order = sorted(entries, key=lambda info: info.header_offset)
    bad = set()
    for one, after in itertools.pairwise(order):
        if one.header_offset + 30 + one.compress_size > after.header_offset:
            bad |= {one.header_offset, after.header_offset}
    return bad


class _Header(tarfile.TarInfo):
    """A header whose extensions are small, and whose errors end the archive loudly.

    `tarfile` reads extended headers of any size into memory, and takes a bad or missing header after the first for
    the end of the archive.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise Unreadable(TORN, f"{type(error).__name__}: {error}") from error

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        plain = (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, *_DEVICES)
        if self.type == tarfile.GNUTYPE_SPARSE or (self.type not in plain and self.size > _HEADER_BYTES):
            raise Unreadable(TORN, f"a header of {self.size} bytes, type {self.type!r}")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _sparse(self, *_: Any) -> Any:
        raise Unreadable(TORN, "a sparse file")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse


_DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


def _tar_members(stream: Any) -> Iterator[Member]:
    with torn():
        archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, bufsize=CHUNK_BYTES)  # noqa: SIM115
    while True:
        with torn():
            info = archive.next()
        if info is None:
            return
        archive.members.clear()  # it would keep every header
        if info.isdir():
            continue
        if not info.isreg():
            yield Member(info.name, info.size, problem=NO_FILE)
            continue
        with io.BufferedReader(_Torn(archive.extractfile(info)), CHUNK_BYTES) as member:
            yield Member(info.name, info.size, member)


class _Torn(io.RawIOBase):
    """A member of a tar whose errors of reading are `Unreadable`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with torn():
            return int(self._stream.readinto(buffer))
