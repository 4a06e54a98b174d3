"""The requests of each kind of object store: S3, Google Cloud Storage, Azure Blob, and whatever else fsspec knows.

Owns what differs between them, and where each finds its endpoint and credentials: never in a URI or YAML. Signing,
sessions and credentials are the clients' (s3fs, gcsfs, adlfs); their caches and their own retries are off, `objects.py`
tries again instead.

| | create only | compare and swap | version | parts | checked by the store on arrival |
|---|---|---|---|---|---|
| S3 | If-None-Match: * | If-Match | ETag | multipart, in parallel | CRC of each request, by botocore |
| GCS | ifGenerationMatch=0 | ifGenerationMatch | generation | resumable, in order | MD5 of the whole, checked by us |
| Azure | If-None-Match: * | If-Match | ETag | blocks, in parallel | MD5 of each request |

Not covered: gcsfs itself reads a pickle of tokens that it once wrote in the home folder of whoever runs it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from forge_ray.errors import ConfigError, StorageError
from forge_ray.objects import Blob, Condition, Store, Upload
from forge_ray.retry import TruncatedError, translated, unwrapped

CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
"""The client of each scheme; also the package that has it."""
_CONNECT_S, _SILENCE_S = 10, 60
_PAGE = 1000
_MAX_COPY_BYTES = 5 << 30  # of S3, in one request: what is larger keeps its age


def split_uri(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket or container, and the prefix in it.

    Raises:
        ConfigError: The URI carries a password, a key or a signature.
    """
    scheme, _, rest = uri.partition("://")
    place, _, prefix = rest.partition("/")
    user, _, host = place.rpartition("@")
    if ":" in user or (user and scheme in ("s3", "gs")) or (scheme in CLIENTS and "?" in rest):
        kept = f"{host.partition('?')[0]}/{prefix.partition('?')[0]}".rstrip("/")
        raise ConfigError(
            "the URI of a store carries credentials or a query",
            got=f"{scheme}://[hidden]{kept}",
            wanted=f"{scheme}://{host.partition('?')[0]}/...",
            do="take them out of it; keys come from the environment, a role or a file (README, Stores)",
        )
    return scheme, user if scheme == "abfs" and user else host, prefix.strip("/")


def connect(uri: str) -> Store:
    """The store of a URI; nothing is asked of it yet.

    Raises:
        ConfigError: The URI carries credentials.
        StorageError: The scheme is unknown, its client is not installed, or it finds no account.
    """
    scheme, bucket, _ = split_uri(uri)
    kinds: dict[str, type[Store]] = {"s3": S3, "gs": GCS, "abfs": Azure}
    with translated(uri):
        if scheme in kinds and not bucket:
            raise ValueError("the URI names no bucket or container")
        return kinds.get(scheme, Other)(uri, bucket)


def open_filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI or local path, and the path on it, for programs that want one.

    Its retries are the client's own, and its listings may be cached: `Storage` has neither.

    Raises:
        ConfigError: The URI carries credentials.
        StorageError: The scheme is unknown or its client is not installed.
    """
    import fsspec

    scheme = split_uri(uri)[0] if "://" in uri else ""
    if scheme == "gs":
        # Else gcsfs asks a service of Google's about each bucket, over gRPC: 45 s a call where nobody answers.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    options = {"s3": {"anon": True}, "gs": {"token": "anon"}, "abfs": {"anon": True}}
    try:
        return fsspec.core.url_to_fs(uri, **(options[scheme] if scheme in options and unsigned(scheme) else {}))
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"no store is known for this URI: {error}",
            got=uri,
            wanted="a path, s3://, gs:// or abfs://",
            do="mend the scheme, or install the client that the message names",
        ) from None


def unsigned(scheme: str) -> bool:
    """Whether requests go out without credentials, for public buckets: AWS_, GS_ or AZURE_NO_SIGN_REQUEST=YES."""
    name = {"s3": "AWS", "gs": "GS", "abfs": "AZURE"}[scheme]
    return os.environ.get(f"{name}_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true", "on")


class S3(Store):
    """S3 and what speaks its protocol: MinIO, SeaweedFS, Ceph; AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL says where."""

    def __init__(self, uri: str, bucket: str) -> None:
        from s3fs import S3FileSystem

        # retries: botocore's mode "legacy" counts tries beside the first, this key all of them.
        config = {"retries": {"total_max_attempts": 1}, "connect_timeout": _CONNECT_S, "read_timeout": _SILENCE_S}
        fs = S3FileSystem(anon=unsigned("s3"), config_kwargs=config, use_listings_cache=False)
        fs.retries = 1
        super().__init__(uri, bucket, fs)

    async def _call(self, method: str, **words: Any) -> Any:
        return await self.fs._call_s3(method, Bucket=self.bucket, **words)

    async def _head(self, key: str) -> Blob:
        answer = await self._call("head_object", Key=key)
        return _blob(key, answer["ContentLength"], answer["LastModified"], answer["ETag"], answer.get("Metadata"))

    async def _get(self, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        span = {"Range": _span(start, length)} if start or length is not None else {}
        answer = await self._call("get_object", Key=key, **span)
        async with answer["Body"] as body:
            data = await body.read()
        return _whole(data, answer["ContentLength"]), answer["ETag"]

    async def _put(self, key: str, data: bytes, condition: Condition | None, notes: Mapping[str, str]) -> None:
        await self._call("put_object", Key=key, Body=data, Metadata=dict(notes), **self._only(condition))

    async def _touch(self, blob: Blob) -> None:
        if blob.size_bytes > _MAX_COPY_BYTES:
            return
        source = {"Bucket": self.bucket, "Key": blob.key}
        words = {"CopySource": source, "CopySourceIfMatch": blob.version, "MetadataDirective": "REPLACE"}
        await self._call("copy_object", Key=blob.key, Metadata=blob.notes, **words)

    async def _page(self, prefix: str, token: str) -> tuple[list[Blob], str | None]:
        more = {"ContinuationToken": token} if token else {}
        answer = await self._call("list_objects_v2", Prefix=prefix, MaxKeys=_PAGE, **more)
        rows = [_blob(row["Key"], row["Size"], row["LastModified"], row["ETag"]) for row in answer.get("Contents", [])]
        return rows, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None

    async def _delete(self, key: str) -> None:
        await self._call("delete_object", Key=key)

    async def _begin(self, key: str, condition: Condition | None, notes: Mapping[str, str], size_bytes: int) -> Upload:
        answer = await self._call("create_multipart_upload", Key=key, Metadata=dict(notes))
        return Upload(key, condition, notes, size_bytes, answer["UploadId"])

    async def _part(self, upload: Upload, number: int, start: int, data: bytes) -> None:
        answer = await self._call(
            "upload_part", Key=upload.key, UploadId=upload.handle, PartNumber=number + 1, Body=data
        )
        sums = {name: value for name, value in answer.items() if name.startswith("Checksum")}
        upload.receipts[number] = {"PartNumber": number + 1, "ETag": answer["ETag"], **sums}

    async def _finish(self, upload: Upload) -> None:
        parts = {"Parts": [upload.receipts[number] for number in sorted(upload.receipts)]}
        words = {"Key": upload.key, "UploadId": upload.handle, "MultipartUpload": parts}
        await self._call("complete_multipart_upload", **words, **self._only(upload.condition))

    async def _abort(self, upload: Upload) -> None:
        await self._call("abort_multipart_upload", Key=upload.key, UploadId=upload.handle)

    @staticmethod
    def _only(condition: Condition | None) -> dict[str, str]:
        if condition is None:
            return {}
        return {"IfMatch": condition.version} if condition.version else {"IfNoneMatch": "*"}


class GCS(Store):
    """Google Cloud Storage through its JSON interface; STORAGE_EMULATOR_HOST says where else."""

    parallel_parts = 1

    def __init__(self, uri: str, bucket: str) -> None:
        import aiohttp
        from gcsfs.core import GCSFileSystem  # not gcsfs.GCSFileSystem, which asks a service of Google's on each call

        anonymous = unsigned("gs") or bool(os.environ.get("STORAGE_EMULATOR_HOST"))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        fs = GCSFileSystem(
            token="anon" if anonymous else "google_default", requests_timeout=timeout, use_listings_cache=False
        )
        once = unwrapped(GCSFileSystem._request)
        fs._request = lambda *args, **words: once(fs, *args, **words)
        super().__init__(uri, bucket, fs)
        self._objects = f"{fs._location}/storage/v1/b/{{}}/o"
        self._uploads = f"{fs._location}/upload/storage/v1/b/{{}}/o"

    async def _call(self, method: str, path: str, *args: str, **words: Any) -> Any:
        return await self.fs._call(method, path, self.bucket, *args, **words)

    async def _head(self, key: str) -> Blob:
        return self._row(await self._call("GET", self._objects + "/{}", key, json_out=True))

    @staticmethod
    def _row(row: Mapping[str, Any]) -> Blob:
        modified = datetime.fromisoformat(row["updated"])
        return _blob(row["name"], int(row.get("size", 0)), modified, str(row["generation"]), row.get("metadata"))

    async def _get(self, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        span = {"headers": {"Range": _span(start, length)}} if start or length is not None else {}
        headers, data = await self._call("GET", self._objects + "/{}", key, alt="media", **span)
        stated = None if "Content-Encoding" in headers else headers.get("Content-Length")
        return _whole(data, stated), str(headers.get("X-Goog-Generation", ""))

    async def _put(self, key: str, data: bytes, condition: Condition | None, notes: Mapping[str, str]) -> None:
        edge = uuid.uuid4().hex
        head = json.dumps({"name": key, "metadata": dict(notes)})
        kind = "application/octet-stream"
        body = (
            f"--{edge}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{head}\r\n"
            f"--{edge}\r\nContent-Type: {kind}\r\n\r\n".encode()
            + data
            + f"\r\n--{edge}--".encode()
        )
        answer = await self._call(
            *("POST", self._uploads),
            uploadType="multipart",
            headers={"Content-Type": f'multipart/related; boundary="{edge}"'},
            data=body,
            json_out=True,
            **self._only(condition),
        )
        _check_md5(answer, hashlib.md5(data, usedforsecurity=False))

    async def _touch(self, blob: Blob) -> None:
        path = self._objects + "/{}/rewriteTo/b/{}/o/{}"
        await self._call("POST", path, blob.key, self.bucket, blob.key, ifGenerationMatch=blob.version)

    async def _page(self, prefix: str, token: str) -> tuple[list[Blob], str | None]:
        more = {"pageToken": token} if token else {}
        answer = await self._call("GET", self._objects, prefix=prefix, maxResults=_PAGE, json_out=True, **more)
        return [self._row(row) for row in answer.get("items", [])], answer.get("nextPageToken")

    async def _delete(self, key: str) -> None:
        await self._call("DELETE", self._objects + "/{}", key)

    async def _begin(self, key: str, condition: Condition | None, notes: Mapping[str, str], size_bytes: int) -> Upload:
        headers, _ = await self._call(
            *("POST", self._uploads),
            uploadType="resumable",
            name=key,
            json={"name": key, "metadata": dict(notes)},
            **self._only(condition),
        )
        return Upload(
            key, condition, notes, size_bytes, {"at": headers["Location"], "sure": True, "sum": hashlib.md5()}
        )

    async def _part(self, upload: Upload, number: int, start: int, data: bytes) -> None:
        end, total, handle = start + len(data), upload.size_bytes, upload.handle
        if number not in upload.receipts:
            handle["sum"].update(data)
            upload.receipts[number] = True
        have = start
        if not handle["sure"]:
            headers, answer = await self._resume(upload, f"bytes */{total}", b"")
            if _finished(answer):
                return _check_md5(json.loads(answer), handle["sum"])
            have = int(headers["Range"].rpartition("-")[2]) + 1 if "Range" in headers else 0
            handle["sure"] = True
        while have < end:
            if have < start:
                raise StorageError("the store lost a part of an upload", got=self.where(upload.key), do="run it again")
            span = f"bytes {have}-{end - 1}/{total}"
            try:
                headers, answer = await self._resume(upload, span, data[have - start :])
            except BaseException:
                handle["sure"] = False
                raise
            if _finished(answer):
                return _check_md5(json.loads(answer), handle["sum"])
            have = int(headers["Range"].rpartition("-")[2]) + 1 if "Range" in headers else end
        return None

    async def _resume(self, upload: Upload, span: str, data: bytes) -> Any:
        return await self.fs._call("PUT", upload.handle["at"], headers={"Content-Range": span}, data=data)

    async def _finish(self, upload: Upload) -> None:
        """The last part has ended it."""

    async def _abort(self, upload: Upload) -> None:
        await self.fs._call("DELETE", upload.handle["at"])

    @staticmethod
    def _only(condition: Condition | None) -> dict[str, str]:
        return {} if condition is None else {"ifGenerationMatch": condition.version or "0"}


class Azure(Store):
    """Azure Blob; the account comes from the URI, AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_CONNECTION_STRING."""

    def __init__(self, uri: str, bucket: str) -> None:
        from adlfs import AzureBlobFileSystem

        place = uri.partition("://")[2].partition("/")[0].rpartition("@")
        account = {"account_name": place[2].partition(".")[0]} if place[0] else {}
        anonymous = {"anon": True} if unsigned("abfs") else {}
        fs = AzureBlobFileSystem(**account, **anonymous, use_listings_cache=False)
        fs.service_client._config.retry_policy.total_retries = 0
        super().__init__(uri, bucket, fs)
        self._container = fs.service_client.get_container_client(bucket)
        self._timeouts = {"connection_timeout": _CONNECT_S, "read_timeout": _SILENCE_S}

    async def _head(self, key: str) -> Blob:
        found = await self._container.get_blob_client(key).get_blob_properties(**self._timeouts)
        return _blob(key, found.size, found.last_modified, found.etag, found.metadata)

    async def _get(self, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        span = {"offset": start, "length": length} if start or length is not None else {}
        stream = await self._container.get_blob_client(key).download_blob(**span, **self._timeouts)
        return _whole(await stream.readall(), stream.size), stream.properties.etag

    async def _put(self, key: str, data: bytes, condition: Condition | None, notes: Mapping[str, str]) -> None:
        await self._container.get_blob_client(key).upload_blob(
            data, overwrite=True, metadata=dict(notes), validate_content=True, **self._only(condition), **self._timeouts
        )

    async def _touch(self, blob: Blob) -> None:
        client, words = self._container.get_blob_client(blob.key), self._only(Condition(blob.version))
        await client.set_blob_metadata(blob.notes, **words, **self._timeouts)

    async def _page(self, prefix: str, token: str) -> tuple[list[Blob], str | None]:
        listing = self._container.list_blobs(name_starts_with=prefix, include=["metadata"], results_per_page=_PAGE)
        pages = listing.by_page(continuation_token=token or None)
        rows = [row async for row in await anext(pages)]
        folders = {row.name for row in rows if (row.metadata or {}).get("hdi_isfolder") == "true"}
        # The listing leaves out the quotes that an ETag has everywhere else.
        blobs = [
            _blob(row.name, row.size, row.last_modified, f'"{row.etag.strip(chr(34))}"', row.metadata) for row in rows
        ]
        return [blob for blob in blobs if blob.key not in folders], pages.continuation_token or None

    async def _delete(self, key: str) -> None:
        await self._container.get_blob_client(key).delete_blob(**self._timeouts)

    async def _begin(self, key: str, condition: Condition | None, notes: Mapping[str, str], size_bytes: int) -> Upload:
        # Staged blocks of all writers of a name lie in one heap until one of them commits: hence a prefix of our own.
        return Upload(key, condition, notes, size_bytes, notes["forgewriter"])

    async def _part(self, upload: Upload, number: int, start: int, data: bytes) -> None:
        name = f"{upload.handle}{number:08d}"
        client = self._container.get_blob_client(upload.key)
        await client.stage_block(name, data, validate_content=True, **self._timeouts)
        upload.receipts[number] = name

    async def _finish(self, upload: Upload) -> None:
        from azure.core.exceptions import HttpResponseError
        from azure.storage.blob import BlobBlock

        blocks = [BlobBlock(block_id=upload.receipts[number]) for number in sorted(upload.receipts)]
        client, words = self._container.get_blob_client(upload.key), self._only(upload.condition)
        try:
            await client.commit_block_list(blocks, metadata=dict(upload.notes), **words, **self._timeouts)
        except HttpResponseError as error:
            # Another writer's commit has dropped our staged blocks, or an earlier try of ours has used them up.
            if getattr(error, "error_code", None) == "InvalidBlockList":
                raise FileNotFoundError(upload.key) from None
            raise

    @staticmethod
    def _only(condition: Condition | None) -> dict[str, Any]:
        from azure.core import MatchConditions

        if condition is None:
            return {}
        if condition.version:
            return {"etag": condition.version, "match_condition": MatchConditions.IfNotModified}
        return {"match_condition": MatchConditions.IfMissing}


_SWAPS = threading.Lock()


class Other(Store):
    """Any other filesystem that fsspec knows: `http://` to read from, `memory://` for tests.

    Its own retries stay on. Not covered: writes are as whole as the filesystem makes them, and conditions hold among
    the threads of one process only.
    """

    def __init__(self, uri: str, bucket: str) -> None:
        super().__init__(uri, bucket, open_filesystem(uri)[0])

    async def _head(self, key: str) -> Blob:
        found = await asyncio.to_thread(self.fs.info, self.where(key))
        if found["type"] != "file":
            raise FileNotFoundError(key)
        return self._row(key, found)

    def _row(self, key: str, found: Mapping[str, Any]) -> Blob:
        modified = found.get("LastModified") or found.get("mtime") or found.get("created")
        blob = _blob(key, found.get("size") or 0, modified, "")
        return replace(blob, version=str(found.get("ETag") or blob.modified_s))

    async def _get(self, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        end = None if length is None else start + length
        data = await asyncio.to_thread(self.fs.cat_file, self.where(key), start or None, end)
        return data, (await self._head(key)).version

    async def _put(self, key: str, data: bytes, condition: Condition | None, notes: Mapping[str, str]) -> None:
        def write() -> None:
            with _SWAPS:
                if condition and condition.version:
                    found = self.fs.info(self.where(key))
                    if self._row(key, found).version != condition.version:
                        raise FileExistsError(key)
                mode = "create" if condition and not condition.version else "overwrite"
                self.fs.pipe_file(self.where(key), data, mode=mode)

        await asyncio.to_thread(write)

    async def _touch(self, blob: Blob) -> None:
        data, _ = await self._get(blob.key, 0, None)
        await self._put(blob.key, data, Condition(blob.version), {})

    async def _page(self, prefix: str, token: str) -> tuple[list[Blob], str | None]:
        folder = prefix.rpartition("/")[0]
        root = self.fs._strip_protocol(self.root).rstrip("/") + "/"
        try:
            found = await asyncio.to_thread(self.fs.find, self.where(folder), detail=True)
        except FileNotFoundError:
            return [], None
        rows = [
            self._row(path.removeprefix(root), row) for path, row in found.items() if path.startswith(root + prefix)
        ]
        return rows, None

    async def _delete(self, key: str) -> None:
        await asyncio.to_thread(self.fs.rm_file, self.where(key))

    async def _begin(self, key: str, condition: Condition | None, notes: Mapping[str, str], size_bytes: int) -> Upload:
        return Upload(key, condition, notes, size_bytes, None)

    async def _part(self, upload: Upload, number: int, start: int, data: bytes) -> None:
        upload.receipts[number] = data

    async def _finish(self, upload: Upload) -> None:
        data = b"".join(upload.receipts[number] for number in sorted(upload.receipts))
        await self._put(upload.key, data, upload.condition, upload.notes)


def _blob(key: str, size_bytes: int, modified: Any, version: str, notes: Mapping[str, str] | None = None) -> Blob:
    # S3 gives the names of metadata in the case in which a proxy left them.
    ours = {name.lower(): value for name, value in (notes or {}).items()}
    modified_s = modified.timestamp() if isinstance(modified, datetime) else float(modified or 0)
    return Blob(key, int(size_bytes), modified_s, version, ours.get("forgesha256", ""), ours.get("forgewriter", ""))


def _span(start: int, length: int | None) -> str:
    return f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"


def _whole(data: bytes, stated: Any) -> bytes:
    if stated is not None and len(data) != int(stated):
        raise TruncatedError(f"{len(data)} of {stated} bytes arrived")
    return data


def _finished(answer: bytes) -> bool:
    return answer.lstrip().startswith(b"{")


def _check_md5(answer: Mapping[str, Any], sent: Any) -> None:
    stored = answer.get("md5Hash")
    if stored and stored != base64.b64encode(sent.digest()).decode():
        raise TruncatedError("the store received other bytes than were sent")
