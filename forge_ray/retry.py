"""What an error of a store means, how long it is worth trying again, and what the user is told in the end.

Owns the one retry budget of the project (`BUDGET_S`), the telling apart of errors that pass (503, 429, resets,
timeouts, truncated bodies) from those that do not (denied, missing, taken), and their translation into `StorageError`
and its kin. Does not own requests (`stores.py`). The clients' own retries are off there: they count attempts instead of
seconds, last from 2 s (s3fs) over 31 s (gcsfs) to a minute (Azure), and gcsfs's try a refused key again for as long.

Errors are known by their status code and by the names of their classes, so that no client is imported to ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from enum import Enum
from typing import Any, TypeVar

from forge_ray.errors import DiskFullError, ForgeError, NotFoundError, StorageError

BUDGET_S = 60.0
"""How long one request is tried again. A transfer of many has it for each, so it lasts as long as it gets on."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _SAID_AFTER_S = 0.2, 8.0, 5.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_T = TypeVar("_T")
_log = logging.getLogger("forge_ray.storage")


class Meaning(Enum):
    """What an error says about a request."""

    MISSING = "nothing is stored there"
    NO_BUCKET = "the bucket or container does not exist"
    TAKEN = "the name is taken, or was changed by another writer"
    DENIED = "the store refused the credentials, or there are none"
    PASSING = "the store did not answer in time"
    LASTING = "the store did not do it"


class TakenError(Exception):
    """A conditional write lost: the name was not as the condition says."""


class TruncatedError(ConnectionError):
    """A body ended before its stated length."""


_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_PASSING_CODES = {
    *("SlowDown", "RequestTimeout", "InternalError", "ConditionalRequestConflict", "OperationAborted"),
    *("ServerBusy", "OperationTimedOut", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "Md5Mismatch"),
}
_DENIED_CODES = {
    *("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidAuthenticationInfo"),
}
# Names in a class's line of ancestors; the first two sets go before the third, whose members some of them are.
_LASTING_NAMES = {
    "SSLError",
    "SSLCertVerificationError",
    "ClientConnectorCertificateError",
    "InvalidProxiesConfigError",
}
_DENIED_NAMES = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("NoAuthTokenError", "TokenRetrievalError", "UnauthorizedSSOTokenError", "DefaultCredentialsError"),
    *("RefreshError", "ClientAuthenticationError", "AzureSigningError", "PermissionError"),
}
_PASSING_NAMES = {
    *("ConnectionError", "TimeoutError", "Timeout", "gaierror"),
    *("HTTPClientError", "ResponseStreamingError", "IncompleteReadError", "ResponseParserError", "IncompleteRead"),
    *("ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError", "BadHttpMessage"),
    *("ServiceRequestError", "ServiceResponseError", "TransportError", "ChunkedEncodingError", "ProxyError"),
}


def meaning(error: BaseException) -> Meaning:
    """What an error of a store, or one that caused it, says."""
    chain = list(_chain(error))
    if any(isinstance(link, TakenError) for link in chain):
        return Meaning.TAKEN
    answers = [answer for answer in map(_answer, chain) if answer != (0, "")]
    for status, code in answers:
        if code in _NO_BUCKET:
            return Meaning.NO_BUCKET
        if status in (408, 429, 500, 502, 503, 504) or code in _PASSING_CODES:
            return Meaning.PASSING
        if status in (401, 403) or code in _DENIED_CODES:
            return Meaning.DENIED
        if status == 412 or (status, code) == (409, "BlobAlreadyExists"):
            return Meaning.TAKEN
        if status == 404:
            return Meaning.MISSING
    if answers:
        return Meaning.LASTING
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "FileNotFoundError" in names:
        return Meaning.MISSING
    if "FileExistsError" in names:
        return Meaning.TAKEN
    if names & _LASTING_NAMES:
        return Meaning.LASTING
    if names & _DENIED_NAMES or any(str(link).startswith("Forbidden") for link in chain):  # gcsfs's 403
        return Meaning.DENIED
    return Meaning.PASSING if names & _PASSING_NAMES else Meaning.LASTING


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # The context counts: Azure's client stumbles over a 503 without a message and raises a TypeError of its own.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _answer(error: BaseException) -> tuple[int, str]:
    """Status and code of the store's answer, if the error carries one: botocore's, Azure's, gcsfs's or aiohttp's."""
    if type(error).__module__ == "aiohttp.http_exceptions":
        return 0, ""  # "400" for what it could not parse: no answer of the store
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(response.get("Error", {}).get("Code", ""))
        return int(status or (code if code.isdigit() else 0)), code
    for name in ("status_code", "status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and not isinstance(status, bool):
            code = getattr(error, "error_code", "") or ""
            return status, str(getattr(code, "value", code))
    return 0, ""


def is_beyond_end(error: BaseException) -> bool:
    """Whether the store says that a range begins behind the content's end."""
    return any(_answer(link)[0] == 416 for link in _chain(error))


async def patiently(where: str, request: Callable[[], Awaitable[_T]]) -> _T:
    """Awaits a request until it succeeds, fails for good, or `BUDGET_S` is over; pauses grow from 0.2 to 8 s.

    Raises:
        TakenError: The condition of a write does not hold.
        NotFoundError, StorageError: See `translated`.
    """
    began, pause_s, said = time.monotonic(), _FIRST_PAUSE_S, False
    while True:
        try:
            return await request()
        except ForgeError:
            raise
        except Exception as error:
            found = meaning(error)
            waited_s = time.monotonic() - began
            if found is Meaning.TAKEN:
                raise TakenError(where) from error
            if found is not Meaning.PASSING or waited_s + pause_s > BUDGET_S:
                raise as_storage_error(error, where, waited_s) from error
            if waited_s > _SAID_AFTER_S and not said:
                said = True
                _log.warning("%s: %s; trying again for up to %g s", where, _short(error), BUDGET_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


def as_storage_error(error: BaseException, where: str, waited_s: float = 0.0) -> ForgeError:
    """The error that the user sees."""
    found = meaning(error)
    if found is Meaning.MISSING:
        return NotFoundError(found.value, got=where, do="check the workspace and the name")
    if found is Meaning.NO_BUCKET:
        return StorageError(found.value, got=where, do="make it, or mend the URI or the endpoint")
    if found is Meaning.DENIED:
        return StorageError(
            "permission denied",
            got=f"{where}: {_short(error)}",
            do="mend the owner, the mode or the credentials; `forge doctor` says which it finds",
        )
    if found is Meaning.PASSING:
        return StorageError(
            f"{found.value}, tried for {waited_s:.0f} s: {_short(error)}",
            got=where,
            do="check the network and the endpoint, then run the same command again: it goes on from what is stored",
        )
    return StorageError(
        f"{found.value}: {_short(error)}", got=where, do="check the URI, the network and the credentials"
    )


def _short(error: BaseException) -> str:
    """The first line of the message, which clients pad with headers and XML."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{text[:300] or type(error).__name__}"


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns the errors of a store or disk into `StorageError` and its kin, naming the place."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(where) from None
        raise as_storage_error(error, where) from error
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"the store cannot be used: {_short(error)}",
            got=where,
            do="`forge doctor` says which clients and credentials it finds",
        ) from error


def is_disk_full(error: OSError) -> bool:
    """Whether the error says that there is no space left."""
    return error.errno in _FULL


def disk_full(where: str) -> DiskFullError:
    """The error of a full disk."""
    return DiskFullError(
        "no space left; nothing half-written was published",
        got=where,
        do="free space (`forge gc` removes what nothing refers to), then run the same command again",
    )


def unwrapped(method: Any) -> Any:
    """A method without the decorator that tries it again."""
    return getattr(method, "__wrapped__", method)
