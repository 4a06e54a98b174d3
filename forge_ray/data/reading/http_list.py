"""The files of a list of HTTP(S) addresses.

Owns asking servers: what an address is now (HEAD, or the first byte of a GET), and its content, whole, on this
machine's disk, before anything reads it. Sessions, proxies (`HTTPS_PROXY`) and certificates are aiohttp's, through
fsspec's filesystem.

An address that answers 4xx is skipped and counted. One that answers 5xx or not at all is tried again for
`ingest.retry_s` and then ends the run, for that says nothing about the document; listing finds it before any work is
done. Bodies are taken as they are sent: their compression is undone by `unpack.py`, within its limits.

Not covered: robots.txt and politeness beyond `_AT_ONCE` requests; whoever lists addresses has the right to fetch them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urldefrag, urlsplit

from forge_ray.config import HttpSource, IngestConfig
from forge_ray.data.reading.documents import LARGE
from forge_ray.data.reading.sources import File, persist, refused
from forge_ray.data.reading.unpack import CHUNK_BYTES, Unreadable, lines
from forge_ray.errors import DataError
from forge_ray.retry import TruncatedError
from forge_ray.storage import Storage

LIST_RETRY_S = 60.0
"""How long an address is tried again while listing."""
MAX_REDIRECTS = 5
CONNECT_S, SILENCE_S = 15, 60
_AT_ONCE = 16
_LINE_BYTES = 16 << 10
_SPOOL_BYTES = 8 << 20
_HEAD_REFUSED = (400, 403, 405, 501)
_AGAIN = (408, 429)
_CHARSET = re.compile(r"charset=\"?([\w-]{2,20})", re.IGNORECASE)


def listing(source: HttpSource) -> list[dict[str, Any]]:
    """A row for each address; its state is its ETag, or when it was modified, or else its size.

    Cost: a request for each address, 16 at a time.

    Raises:
        StorageError: The list cannot be read, or a server does not answer for `LIST_RETRY_S`.
        DataError: The list is empty, or holds what is no address.
    """
    urls = sorted(set(_urls(source)))
    if not urls:
        raise DataError(
            "the list of addresses is empty",
            got=source.uri,
            wanted="one http:// or https:// address per line",
            do="mend ingest.sources.uri",
        )
    rows: list[dict[str, Any]] = []
    fs = _filesystem()
    for start in range(0, len(urls), 16 * _AT_ONCE):
        some = urls[start : start + 16 * _AT_ONCE]
        for url, found in zip(some, _run(fs, _heads(fs, some))):
            while isinstance(found, Exception):
                found = persist(lambda url=url: _run(fs, _head(fs, url)), url, LIST_RETRY_S)
            size, state = found
            rows.append({"name": url, "key": url.partition("://")[2], "size": size, "state": state})
    return rows


def files(source: HttpSource, rows: list[tuple[str, str, int, str]], config: IngestConfig) -> Iterator[File]:
    """The files of some rows; each is on disk only until the next is asked for."""
    fs = _filesystem()
    for url, key, _, state in rows:
        if state.startswith("!"):
            yield File(key, url, 0, refused(state[1:]), state[1:])
            continue
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, prefix="forge-") as spool:
            try:
                headers = persist(
                    lambda url=url, spool=spool: _run(fs, _fetch(fs, url, spool, source.max_file_bytes)),
                    url,
                    config.retry_s,
                )
            except Unreadable as error:
                yield File(key, url, 0, refused(error.kind), error.kind, error.detail)
                continue
            size = spool.seek(0, os.SEEK_END)
            spool.seek(0)
            yield _file(key, url, size, spool, headers)


def _file(key: str, url: str, size: int, spool: Any, headers: dict[str, str]) -> File:
    kind = headers.get("content-type", "")
    found = _CHARSET.search(kind)
    encoding = headers.get("content-encoding", "identity").lower()
    codec = {"identity": "", "": "", "gzip": "gz", "x-gzip": "gz", "zstd": "zst"}.get(encoding)
    problem = "" if codec is not None else "unreadable: unknown compression"
    # The path decides; a query or a fragment is no part of a name.
    name = urlsplit(url).path or "/"
    if name.lower().endswith((".gz", ".tgz")):
        codec = ""  # servers state the file's own compression
    return File(
        *(key, url, size, lambda: contextlib.nullcontext(_Peekable(spool))),
        problem=problem,
        detail=encoding if problem else "",
        content_type=kind,
        charset=found.group(1) if found else "",
        codec=codec or "",
        name=name,
    )


def _urls(source: HttpSource) -> Iterator[str]:
    root, _, name = source.uri.rpartition("/")
    with Storage(root or "/").open_read(name) if root else open(name, "rb") as stream:
        number = 0
        for batch in lines(stream, _LINE_BYTES):
            for line in batch:
                number += 1
                text = "" if line is None else line.decode("utf-8-sig", "replace").strip()
                if line is not None and (not text or text.startswith("#")):
                    continue
                url = urldefrag(text).url
                try:
                    parts = urlsplit(url)
                    good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
                except ValueError:
                    good = False
                if not good or "\ufffd" in url or any(char.isspace() for char in url):
                    raise DataError(
                        "a line of a list of addresses is none",
                        got=f"{source.uri} line {number}: {text[:200]!r}",
                        wanted="http://host/path or https://host/path, without user and password",
                        do="mend the list",
                    )
                yield url


def _filesystem() -> Any:
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
    client = {"timeout": timeout, "auto_decompress": False, "trust_env": True}
    return fsspec.filesystem("http", client_kwargs=client, headers={"Accept-Encoding": "identity"})


def _run(fs: Any, work: Any) -> Any:
    from fsspec.asyn import sync

    async def awaited() -> Any:
        return await work

    return sync(fs.loop, awaited)


async def _heads(fs: Any, urls: list[str]) -> list[Any]:
    free = asyncio.Semaphore(_AT_ONCE)

    async def one(url: str) -> Any:
        async with free:
            return await _head(fs, url)

    return await asyncio.gather(*map(one, urls), return_exceptions=True)


async def _head(fs: Any, url: str) -> tuple[int, str]:
    session = await fs.set_session()
    words = {"headers": {"Accept-Encoding": "identity"}, "allow_redirects": True, "max_redirects": MAX_REDIRECTS}
    try:
        async with session.head(url, **words) as answer:
            status, headers = answer.status, answer.headers
        if status in _HEAD_REFUSED:
            words["headers"] = {**words["headers"], "Range": "bytes=0-0"}  # type: ignore[dict-item]
            async with session.get(url, **words) as answer:
                status, headers = answer.status, answer.headers
        _checked(url, status, answer)
    except Unreadable as error:
        return 0, f"!{error.kind}"
    except Exception as error:
        if (kind := _refusal(error)) is None:
            raise
        return 0, f"!{kind}"
    size = headers.get("Content-Length", "0")
    if status == 206:
        size = headers.get("Content-Range", "").rpartition("/")[2]
    size = size if size.isdigit() else "0"
    state = headers.get("ETag") or headers.get("Last-Modified") or size
    return int(size), state


async def _fetch(fs: Any, url: str, spool: Any, max_bytes: int) -> dict[str, str]:
    """The whole body into `spool`, from its start at every try; its headers."""
    spool.seek(0)
    spool.truncate()
    session = await fs.set_session()
    words = {"headers": {"Accept-Encoding": "identity"}, "allow_redirects": True, "max_redirects": MAX_REDIRECTS}
    try:
        async with session.get(url, **words) as answer:
            _checked(url, answer.status, answer)
            held = 0
            async for piece in answer.content.iter_chunked(CHUNK_BYTES):
                held += len(piece)
                if held > max_bytes:
                    raise Unreadable(LARGE, f"more than max_file_bytes, {max_bytes}")
                spool.write(piece)
            stated = answer.headers.get("Content-Length", "")
            if stated.isdigit() and held != int(stated):
                raise TruncatedError(f"{held} of {stated} bytes arrived")
            return {name.lower(): value for name, value in answer.headers.items()}
    except Unreadable:
        raise
    except Exception as error:
        if (kind := _refusal(error)) is not None:
            raise Unreadable(kind) from error
        if type(error).__name__ == "ClientPayloadError":
            # Its cause says status 400, though the server said nothing of the kind.
            raise TruncatedError(str(error)[:200]) from None
        raise


def _checked(url: str, status: int, answer: Any) -> None:
    if answer.history and _link_local(answer.url.host or ""):
        # Clouds keep credentials of the machine at 169.254.169.254.
        raise Unreadable("unreadable: redirected to a link-local address")
    if status >= 500 or status in _AGAIN:
        answer.raise_for_status()
    if status >= 400:
        raise Unreadable(f"unreadable: HTTP {status}")


def _link_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_link_local
    except ValueError:
        return host == "metadata.google.internal"


def _refusal(error: Exception) -> str | None:
    """The kind of skip that an error of the address itself is; None for one of the network or the server."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "TooManyRedirects" in names:
        return "unreadable: too many redirects"
    if names & {
        "InvalidURL",
        "NonHttpUrlClientError",
        "NonHttpUrlRedirectClientError",
        "InvalidUrlRedirectClientError",
    }:
        return "unreadable: no HTTP address"
    return None


class _Peekable:
    """A spooled file with the `peek` of a buffered reader."""

    def __init__(self, spool: Any) -> None:
        self._spool = spool
        self.read, self.seek, self.tell, self.seekable = spool.read, spool.seek, spool.tell, lambda: True

    def readinto(self, buffer: Any) -> int:
        data = self._spool.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def peek(self, size: int) -> bytes:
        at = self._spool.tell()
        data = self._spool.read(size)
        self._spool.seek(at)
        return bytes(data)
