"""What errors of stores mean, made by the clients' own classes; and how long requests are tried again."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Iterator

import pytest

from forge_ray import retry
from forge_ray.errors import DiskFullError, NotFoundError, StorageError
from forge_ray.retry import Meaning, TakenError, meaning, patiently


def _errors() -> Iterator[tuple[BaseException, Meaning]]:
    import aiohttp
    from azure.core import exceptions as azure
    from botocore import exceptions as boto
    from gcsfs.retry import HttpError
    from google.auth import exceptions as google
    from s3fs.errors import translate_boto_error

    def s3(status: int, code: str) -> BaseException:
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return translate_boto_error(boto.ClientError(answer, "PutObject"))

    yield s3(503, "SlowDown"), Meaning.PASSING
    yield s3(409, "ConditionalRequestConflict"), Meaning.PASSING
    yield s3(412, "PreconditionFailed"), Meaning.TAKEN
    yield s3(404, "NoSuchBucket"), Meaning.NO_BUCKET
    yield s3(404, "NoSuchKey"), Meaning.MISSING
    yield s3(404, "404"), Meaning.MISSING
    yield s3(403, "SignatureDoesNotMatch"), Meaning.DENIED
    yield s3(400, "ExpiredToken"), Meaning.DENIED
    yield s3(400, "InvalidArgument"), Meaning.LASTING
    yield boto.NoCredentialsError(), Meaning.DENIED
    yield boto.EndpointConnectionError(endpoint_url="http://127.0.0.1"), Meaning.PASSING
    yield boto.SSLError(endpoint_url="https://127.0.0.1", error="certificate"), Meaning.LASTING
    yield HttpError({"code": 429, "message": "slow"}), Meaning.PASSING
    yield HttpError({"code": 401, "message": "Invalid Credentials"}), Meaning.DENIED
    yield OSError("Forbidden: b/o"), Meaning.DENIED
    yield google.DefaultCredentialsError("none"), Meaning.DENIED
    yield google.TransportError("reset"), Meaning.PASSING
    yield azure.ServiceResponseError("reset"), Meaning.PASSING
    yield azure.ClientAuthenticationError("none"), Meaning.DENIED
    yield aiohttp.ClientPayloadError("cut"), Meaning.PASSING
    yield aiohttp.ServerDisconnectedError(), Meaning.PASSING
    yield ConnectionResetError(errno.ECONNRESET, "reset"), Meaning.PASSING
    yield TimeoutError(), Meaning.PASSING
    yield FileNotFoundError("x"), Meaning.MISSING
    yield FileExistsError("x"), Meaning.TAKEN
    yield PermissionError("x"), Meaning.DENIED
    yield ValueError("x"), Meaning.LASTING


def test_errors_mean_what_the_clients_mean_by_them() -> None:
    wrong = [(error, meaning(error), wanted) for error, wanted in _errors() if meaning(error) is not wanted]
    assert not wrong


def test_a_clients_own_stumble_over_an_answer_does_not_hide_the_answer() -> None:
    class AnswerError(Exception):
        status_code = 503

    def stumble() -> None:
        try:
            raise AnswerError
        except AnswerError:
            raise TypeError("None + str")  # noqa: B904  as Azure's client does where the answer has no message

    with pytest.raises(TypeError) as caught:
        stumble()
    assert meaning(caught.value) is Meaning.PASSING


def _run(failures: list[BaseException], monkeypatch: pytest.MonkeyPatch, budget_s: float = 60.0) -> tuple[object, int]:
    calls = 0

    async def request() -> str:
        nonlocal calls
        calls += 1
        if calls <= len(failures):
            raise failures[calls - 1]
        return "done"

    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "BUDGET_S", budget_s)
    return asyncio.run(patiently("s3://bucket/key", request)), calls


def test_what_passes_is_tried_again_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[BaseException] = [ConnectionResetError(), TimeoutError(), BrokenPipeError()]
    assert _run(failures, monkeypatch) == ("done", 4)


def test_the_budget_ends_it_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        _run([ConnectionResetError("gone")] * 1000, monkeypatch, budget_s=0.3)
    assert time.monotonic() - began < 3
    assert caught.value.got == "s3://bucket/key"
    assert "gone" in caught.value.what


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (FileNotFoundError(), NotFoundError),
        (FileExistsError(), TakenError),
        (PermissionError(), StorageError),
        (ValueError("no"), StorageError),
        (StorageError("ours"), StorageError),
    ],
)
def test_what_lasts_is_tried_once(
    error: BaseException, wanted: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(wanted):
        _run([error], monkeypatch)  # a second try would succeed


def test_a_full_disk_is_told_from_a_store_that_failed() -> None:
    with pytest.raises(DiskFullError), retry.translated("/here"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(StorageError), retry.translated("/here"):
        raise OSError(errno.EIO, "broken")
