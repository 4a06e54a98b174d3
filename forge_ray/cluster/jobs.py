"""Jobs on a cluster: packed, submitted by Ray's job API, followed, stopped, resumed.

A job's driver runs on the head under `--supervise`. What it takes along is this package as it is here, its resolved
configuration and the lock, so that a node of another version trains with the code that was looked at. Nothing of a run
lives in its job: `resume` submits the same configuration again, and it goes on from its workspace.

Owns the pack, the record of what was submitted from here (`~/.forge-ray/jobs`), and bearing with lost connections.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import forge_ray
from forge_ray.cluster import identity, launcher
from forge_ray.errors import ConfigError, LostError
from forge_ray.telemetry import say

_RECORDS = "~/.forge-ray/jobs"
_JOB, _RECORD, _LOCK = "job.yaml", "record.json", "requirements.lock"
_AGAIN_S, _PATIENCE_S = 2.0, 600.0
_DONE = ("SUCCEEDED", "FAILED", "STOPPED")
_SUPERVISED = ("pretrain", "run")


@dataclass(frozen=True)
class Record:
    """A job that was submitted from here: its id, what it does, and where; `cluster` or `address` is empty."""

    job: str
    verb: str
    cluster: str
    address: str
    submitted: str

    @property
    def where(self) -> str:
        """For people."""
        return self.cluster or self.address


def submit(verb: str, config: str, *, cluster: str, address: str) -> Record:
    """Submits a job and keeps a record of it.

    Args:
        verb: Of `forge`.
        config: The resolved configuration, YAML.
        cluster: File or name of a cluster of the launcher, or nothing.
        address: URL of a dashboard, or nothing.

    Raises:
        LostError: The cluster does not answer.
    """
    name = launcher.find(cluster).name if cluster else ""
    stem = re.sub(r"[^a-z0-9]+", "-", f"{verb}-{time.strftime('%m%d-%H%M')}")
    record = Record(f"{stem}-{secrets.token_hex(3)}", verb, name, address, time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    place = Path(_RECORDS).expanduser() / record.job
    place.mkdir(parents=True, mode=0o700)
    (place / _JOB).write_text(config, encoding="utf-8")
    try:
        _send(record, config)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    identity.put(place / _RECORD, json.dumps(asdict(record)).encode())
    return record


def resume(job: str) -> Record:
    """Submits what an earlier job was; its run goes on where it stopped."""
    record = find(job)
    config = (Path(_RECORDS).expanduser() / record.job / _JOB).read_text(encoding="utf-8")
    return submit(record.verb, config, cluster=record.cluster, address=record.address)


def follow(record: Record) -> int:
    """Shows a job's log until it ends, over however many connections.

    Returns:
        The exit code of its driver.

    Raises:
        LostError: The cluster has not answered for ten minutes; the job may go on.
    """
    shown, heard_s, lost = 0, time.monotonic(), False

    def show(text: str) -> None:
        nonlocal shown, heard_s, lost
        heard_s, lost = time.monotonic(), False
        sys.stderr.write(text)
        sys.stderr.flush()
        shown += len(text)

    while True:
        try:
            with _client(record) as client:
                asyncio.run(_tail(client, record.job, shown, show))
                details = client.get_job_info(record.job)
                if str(details.status) in _DONE:
                    return _exit_code(details)
        except ConfigError:
            raise
        except Exception as error:  # Ray's client raises what its parts do: aiohttp, requests, RuntimeError
            if time.monotonic() - heard_s > _PATIENCE_S:
                raise LostError(
                    "the cluster does not answer any more; the job may go on without us",
                    got=f"{record.where}: {str(error)[:300]}",
                    do=f"once it does: forge logs {record.job}; if the job is gone: forge resume {record.job}",
                ) from None
            if not lost:
                say(f"  the connection to {record.where} is lost; it is tried again, the job goes on")
            lost = True
        time.sleep(_AGAIN_S)


def stop(record: Record) -> str:
    """Ends a job in order, with a last checkpoint; gives its last status."""
    with _client(record) as client:
        client.stop_job(record.job)
        while (status := str(client.get_job_status(record.job))) not in _DONE:
            time.sleep(0.5)
    return status


def states(records: list[Record]) -> dict[str, str]:
    """What became of jobs, asked of each cluster once; `unknown` where it does not answer."""
    found: dict[str, str] = {}
    for place in {record.where: record for record in records}.values():
        mine = [record.job for record in records if record.where == place.where]
        try:
            with _client(place) as client:
                there = {job.submission_id: str(job.status) for job in client.list_jobs()}
            found |= {job: there.get(job, "GONE") for job in mine}
        except Exception as error:  # as in `follow`
            say(f"  {place.where} does not answer: {str(error).splitlines()[0][:200]}")
            found |= dict.fromkeys(mine, "unknown")
    return found


def records() -> list[Record]:
    """What was submitted from here, oldest first."""
    paths = Path(_RECORDS).expanduser().glob(f"*/{_RECORD}")
    found = [Record(**json.loads(path.read_text())) for path in paths]
    return sorted(found, key=lambda record: record.submitted)


def find(job: str) -> Record:
    """A job that was submitted from here, by its id or the beginning of it.

    Raises:
        ConfigError: There is none, or several begin so.
    """
    found = [record for record in records() if record.job.startswith(job)]
    if len(found) != 1:
        raise ConfigError(
            "no such job was submitted from here" if not found else "several jobs begin so",
            got=job,
            wanted=", ".join(record.job for record in found or records()[-5:]) or "a job's id",
            do="`forge jobs` lists them",
        )
    return found[0]


# ------------------------------------------------------------------------------------------------------------ the pack


@contextmanager
def packed(config: str) -> Iterator[Path]:
    """A folder with what a job takes along, and nothing else."""
    package = Path(forge_ray.__file__).resolve().parent
    with tempfile.TemporaryDirectory(prefix="forge-job-") as temporary:
        folder = Path(temporary)
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        lock = package.parent / _LOCK
        if lock.is_file():
            shutil.copy(lock, folder / _LOCK)
        (folder / _JOB).write_text(config, encoding="utf-8")
        yield folder


def _send(record: Record, config: str) -> None:
    words = ["python", "-m", "forge_ray.cli", record.verb, _JOB, "--ray.address=auto"]
    words += ["--supervise"] if record.verb in _SUPERVISED else []
    with packed(config) as folder, _client(record) as client:
        client.submit_job(
            entrypoint=" ".join(words),
            submission_id=record.job,
            runtime_env={"working_dir": str(folder)},
            metadata={"forge": forge_ray.__version__, "job_submission_id": record.job},
        )


# ------------------------------------------------------------------------------------------------------ the connection


@contextmanager
def _client(record: Record) -> Iterator[Any]:
    """Ray's job client, at a dashboard's address or through SSH."""
    with _reached(record) as url, _as_client_of(record):
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of packages and sockets
        try:
            client = JobSubmissionClient(url)
        except ConnectionError as error:
            raise LostError(
                "the cluster does not answer",
                got=f"{record.where}: {str(error)[:300]}",
                do="see `forge cluster status`, or the address",
            ) from None
        yield client


def _reached(record: Record) -> AbstractContextManager[str]:
    if record.cluster:
        return launcher.tunnel(launcher.find(record.cluster))
    return _at(record.address)


@contextmanager
def _at(address: str) -> Iterator[str]:
    yield address


@contextmanager
def _as_client_of(record: Record) -> Iterator[None]:
    """The environment in which Ray's client shows the cluster's token; of an address, what the user has set."""
    if not record.cluster:
        yield
        return
    identity.token(record.cluster)  # says what to do if it is not here
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(identity.folder(record.cluster) / identity.NODE / identity.TOKEN),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def _tail(client: Any, job: str, shown: int, show: Callable[[str], None]) -> None:
    """Passes a log on that begins anew with each connection."""
    at = 0
    async for piece in client.tail_job_logs(job):
        fresh = piece[max(0, shown - at) :]
        at += len(piece)
        if fresh:
            show(fresh)


def _exit_code(details: Any) -> int:
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    return {"SUCCEEDED": 0, "STOPPED": 130}.get(str(details.status), LostError.exit_code)
