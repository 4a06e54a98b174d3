"""One bucket of an object store: whole operations put together from single requests.

Owns what is the same on every store: trying requests again, multipart uploads and downloads in parallel, and telling
who won a conditional write. Does not own requests (`stores.py`), nor names and local folders (`storage.py`).

A conditional write whose answer is lost is sent again, and then finds its own result in the way. So every object
carries its writer's random token as metadata (`forgewriter`), which tells whether it was ours; `forgesha256` beside it
is the SHA-256 of the content. Not covered: a swap whose answer is lost and whose result somebody else replaces within
the seconds until the next try counts as one that lost, though it was visible for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import uuid
from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from forge_ray.errors import NotFoundError, StorageError
from forge_ray.retry import TakenError, is_beyond_end, patiently

PART_BYTES = 16 << 20
"""Size of a part of an upload or download; `_PARALLEL` of them are in memory."""
_PARALLEL = 4
_MAX_PARTS = 9_000
_ABORT_S = 10.0
_UPLOADS = 3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Blob:
    """What a store says about one key."""

    key: str
    size_bytes: int
    modified_s: float
    version: str
    sha256: str = ""
    writer: str = ""

    @property
    def notes(self) -> dict[str, str]:
        """What its writer noted."""
        return {"forgesha256": self.sha256, "forgewriter": self.writer} if self.writer else {}


@dataclass(frozen=True)
class Condition:
    """When a write may happen: only where nothing is (`version` empty), or only over that version."""

    version: str = ""


@dataclass
class Upload:
    """An upload in parts that is under way; its fields are the store's own affair."""

    key: str
    condition: Condition | None
    notes: Mapping[str, str]
    size_bytes: int
    handle: Any
    receipts: dict[int, Any] = field(default_factory=dict)


class Store:
    """One bucket. Keys are names in it; every coroutine runs on fsspec's loop, see `run`.

    Subclasses make single requests (`_get`, `_put`, ...); this class tries them again and puts them together.
    """

    parallel_parts = _PARALLEL

    def __init__(self, uri: str, bucket: str, fs: Any) -> None:
        self.uri, self.bucket, self.fs = uri, bucket, fs
        self.root = f"{uri.partition('://')[0]}://{uri.partition('://')[2].partition('/')[0]}"

    def run(self, work: Awaitable[_T]) -> _T:
        """Awaits on fsspec's loop, from any other thread."""
        from fsspec.asyn import get_loop, sync

        async def awaited() -> _T:
            return await work

        return sync(getattr(self.fs, "loop", None) or get_loop(), awaited)  # type: ignore[no-any-return]

    def where(self, key: str) -> str:
        """The URI of a key, for messages."""
        return f"{self.root}/{key}"

    async def head(self, key: str) -> Blob:
        """What is stored under this key."""
        return await patiently(self.where(key), lambda: self._head(key))

    async def get(self, key: str, start: int = 0, length: int | None = None) -> tuple[bytes, str]:
        """Bytes from `start` on, and their version; fewer where the content ends. Without a length: all the rest."""
        if length == 0:
            return b"", ""

        async def request() -> tuple[bytes, str]:
            try:
                return await self._get(key, start, length)
            except Exception as error:
                if is_beyond_end(error):
                    return b"", ""
                raise

        return await patiently(self.where(key), request)

    async def put(self, key: str, data: bytes, condition: Condition | None = None, sha256: str = "") -> bool:
        """Writes an object in one request; says whether the condition held."""
        notes = _notes(sha256 or hashlib.sha256(data).hexdigest())
        try:
            await patiently(self.where(key), lambda: self._put(key, data, condition, notes))
            return True
        except TakenError:
            pass
        except NotFoundError:
            if not (condition and condition.version):
                raise self._no_bucket(key) from None
        return await self._wrote(key, notes)

    async def put_file(self, key: str, path: Path, condition: Condition | None = None, sha256: str = "") -> bool:
        """Writes an object from a local file, in parts where it is large; says whether the condition held.

        It appears whole or not at all. Each part is checked by the store as it arrives, the whole's size at the end.
        """
        size = path.stat().st_size
        if size <= PART_BYTES:
            return await self.put(key, path.read_bytes(), condition, sha256)
        with path.open("rb") as source:
            notes = _notes(sha256 or hashlib.file_digest(source, "sha256").hexdigest())
            won = None
            for _ in range(_UPLOADS):
                try:
                    upload = await patiently(self.where(key), lambda: self._begin(key, condition, notes, size))
                except NotFoundError:
                    raise self._no_bucket(key) from None
                try:
                    won = await self._send(upload, source.fileno())
                except BaseException:
                    await self._abort_quietly(upload)
                    raise
                if won is not None:
                    break
            else:
                raise StorageError(
                    f"the store forgot {_UPLOADS} uploads", got=self.where(key), do="run the same command again"
                )
        stored = await self.head(key) if won else None
        if stored and stored.writer == notes["forgewriter"] and stored.size_bytes != size:
            raise StorageError(
                "an upload arrived with another size",
                got=f"{self.where(key)}: {stored.size_bytes} bytes",
                wanted=f"{size} bytes",
                do="delete it and run the same command again; then distrust that store",
            )
        return won

    async def touch(self, blob: Blob) -> None:
        """Makes an object young without sending its bytes; its notes stay, its version may change."""
        with contextlib.suppress(NotFoundError, TakenError):  # deleted or replaced in the meantime
            await patiently(self.where(blob.key), lambda: self._touch(blob))

    async def read(self, blob: Blob, start: int, length: int) -> bytes:
        """Bytes of that very object; `touch`, which changes the version of the same bytes, is borne with.

        Raises:
            StorageError: It was replaced by another in the meantime.
        """
        data, version = await self.get(blob.key, start, length)
        same = version == blob.version
        if not same and blob.sha256:
            now = await self.head(blob.key)
            same = (now.version, now.sha256, now.size_bytes) == (version, blob.sha256, blob.size_bytes)
        if not same or len(data) != length:
            raise StorageError(
                "an object was replaced while it was read", got=self.where(blob.key), do="run the same command again"
            )
        return data

    async def fetch(self, blob: Blob, target: int) -> None:
        """Writes an object's content to an open, empty local file, in parts and in parallel."""
        starts = iter(range(0, blob.size_bytes, PART_BYTES))

        async def copy() -> None:
            for start in starts:
                wanted = min(PART_BYTES, blob.size_bytes - start)
                os.pwrite(target, await self.read(blob, start, wanted), start)

        await _all(copy() for _ in range(_PARALLEL))

    async def list(self, prefix: str) -> list[Blob]:
        """Everything whose key starts so, page by page; folder markers are left out."""
        found: list[Blob] = []
        token: str | None = ""
        while token is not None:
            try:
                page, token = await patiently(self.where(prefix), lambda token=token: self._page(prefix, token))
            except NotFoundError:
                raise self._no_bucket(prefix) from None
            found += [blob for blob in page if not blob.key.endswith("/")]
        return found

    async def delete(self, key: str) -> None:
        """Removes a key; one that is not there is no error."""
        with contextlib.suppress(NotFoundError):
            await patiently(self.where(key), lambda: self._delete(key))

    async def _send(self, upload: Upload, source: int) -> bool | None:
        """Sends all parts and ends the upload; says whether the condition held, or nothing if the upload is gone."""
        part_bytes = max(PART_BYTES, -(-upload.size_bytes // _MAX_PARTS // (1 << 20)) << 20)
        starts, where = iter(enumerate(range(0, upload.size_bytes, part_bytes))), self.where(upload.key)

        async def send() -> None:
            for number, start in starts:
                data = os.pread(source, part_bytes, start)
                await patiently(where, lambda n=number, s=start, d=data: self._part(upload, n, s, d))

        try:
            await _all(send() for _ in range(self.parallel_parts))
            await patiently(where, lambda: self._finish(upload))
            return True
        except TakenError:
            lost: bool | None = False if upload.condition else None
        except NotFoundError:  # an earlier request has ended it and its answer was lost; or the store was restarted
            lost = None
        if await self._wrote(upload.key, upload.notes):
            return True
        await self._abort_quietly(upload)
        return lost

    async def _wrote(self, key: str, notes: Mapping[str, str]) -> bool:
        """Whether what is stored is this write's result."""
        try:
            return (await self.head(key)).writer == notes["forgewriter"]
        except NotFoundError:
            return False

    async def _abort_quietly(self, upload: Upload) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._abort(upload), _ABORT_S)

    def _no_bucket(self, key: str) -> StorageError:
        """Where nothing needs to be there, "missing" can only mean the bucket."""
        return StorageError(
            "the bucket or container does not exist",
            got=self.where(key),
            do="make it, or mend the URI or the endpoint",
        )

    # --------------------------------------------------------------------------------- one request each, in `stores.py`

    async def _head(self, key: str) -> Blob:
        raise NotImplementedError

    async def _get(self, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        raise NotImplementedError

    async def _put(self, key: str, data: bytes, condition: Condition | None, notes: Mapping[str, str]) -> None:
        raise NotImplementedError

    async def _touch(self, blob: Blob) -> None:
        raise NotImplementedError

    async def _page(self, prefix: str, token: str) -> tuple[list[Blob], str | None]:
        """A page of the listing, and where the next begins; the first begins at ''."""
        raise NotImplementedError

    async def _delete(self, key: str) -> None:
        raise NotImplementedError

    async def _begin(self, key: str, condition: Condition | None, notes: Mapping[str, str], size_bytes: int) -> Upload:
        raise NotImplementedError

    async def _part(self, upload: Upload, number: int, start: int, data: bytes) -> None:
        raise NotImplementedError

    async def _finish(self, upload: Upload) -> None:
        raise NotImplementedError

    async def _abort(self, upload: Upload) -> None:
        """Drops the parts of an upload that will not be ended."""


def _notes(sha256: str) -> dict[str, str]:
    return {"forgesha256": sha256, "forgewriter": uuid.uuid4().hex}


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Awaits all; when one fails the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
