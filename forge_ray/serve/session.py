"""One serving session: an exported artifact, verified and materialised, behind an endpoint until it is told to stop.

Owns what `forge serve` and the end of `forge run` do. The deployment itself is `app.py`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from forge_ray.artifact import Artifact, Workspace, cache_folder
from forge_ray.config import ServeConfig
from forge_ray.errors import ServeError
from forge_ray.serve.app import Endpoint, Served, application, check_direct_streaming_is_off, check_port, deploy
from forge_ray.settings import resolve
from forge_ray.telemetry import format_s, say


@contextmanager
def session(config: ServeConfig, exported: Artifact) -> Iterator[Endpoint]:
    """An endpoint for an exported model while the block runs.

    Every file is checked against its SHA-256 before an engine may load it.

    Raises:
        CorruptError: A file of the model does not verify.
        ServeError: The address is not loopback, the port is busy, or the engine does not start.
    """
    check_address(config.host)
    began = time.monotonic()
    endpoint = deploy(
        _served(config, exported),
        host=config.host,
        port=config.port,
        ready_timeout_s=config.ready_timeout_s,
        on_state=lambda state: say(f"  {state}"),
    )
    took = format_s(time.monotonic() - began)
    say(f"serve: {exported.ref} answers at {endpoint.url}/v1 as {endpoint.model_name}, after {took}")
    try:
        yield endpoint
    finally:
        endpoint.stop()


def build(args: dict[str, str]) -> Any:
    """The application of `serving/*.yaml`, for `serve deploy`: Ray calls this on the cluster.

    Args:
        args: `workspace` (a URI, or a path that every node sees) and `ref` of an export; any field of the section
            `serve` may stand beside them. Address and port are Serve's own, in the same file.

    Raises:
        ForgeError: The reference, a file of the model or a field is wrong.
    """
    settings = dict(args)
    workspace, ref = settings.pop("workspace", ""), settings.pop("ref", "")
    if not workspace or not ref:
        raise ServeError(
            "the application lacks what to serve",
            got=f"args {args}",
            wanted="workspace and ref",
            do="see serving/serve.yaml",
        )
    config = resolve([], [f"--serve.{name}={value}" for name, value in settings.items()], {}).config.serve
    return application(_served(config, Workspace(workspace).resolve(ref)))


def wait_for_interrupt() -> None:
    """Returns when the user presses Ctrl-C or the process is asked to end."""
    import signal

    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        stop.wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def preflight(config: ServeConfig) -> None:
    """Refuses now what would be refused at the end of a run of hours: address, port, environment.

    Raises:
        ServeError: The address is not loopback, the port is busy, or a variable takes our ingress away.
    """
    check_address(config.host)
    check_direct_streaming_is_off()
    check_port(config.host, config.port)


def check_address(host: str) -> None:
    """Refuses to listen where others can reach an endpoint that asks for no key.

    Raises:
        ServeError: The address is not loopback.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ServeError(
            "this endpoint has no authentication yet, so it listens on loopback only",
            got=f"serve.host {host}",
            wanted="127.0.0.1, ::1 or localhost",
            do="keep it on loopback and reach it through an SSH tunnel",
        )


def _served(config: ServeConfig, exported: Artifact) -> Served:
    if exported.manifest.stage != "export":
        raise ServeError(
            "only an exported model can be served",
            got=exported.ref,
            wanted="export/...",
            do="give the ref of an export",
        )
    return Served(
        model_dir=exported.materialize(cache_folder("models") / _safe(exported)),
        model_name=exported.metrics["model_name"],
        num_replicas=config.num_replicas,
        max_model_len=config.max_model_len or exported.metrics["max_model_len"],
        kv_cache_bytes=config.kv_cache_bytes,
        cpus_per_replica=config.cpus_per_replica,
        dtype=config.dtype,
    )


def _safe(exported: Artifact) -> str:
    """A folder name for exactly these bytes, whatever workspace they come from."""
    digests = "".join(sorted(entry.name + entry.sha256 for entry in exported.manifest.files))
    return f"{exported.manifest.fingerprint}-{hashlib.sha256(digests.encode()).hexdigest()[:12]}"
