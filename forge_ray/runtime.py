"""What we ask of Ray: a cluster to run on, and one way to run the same function over many pieces.

Owns starting a private cluster (own ports, own temporary folder, nothing reported to anyone) or joining one. Does not
own training (`train/`) or serving (`serve/`). Only clusters started here are stopped here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forge_ray.config import RayConfig
from forge_ray.errors import ConfigError, ForgeError, StorageError
from forge_ray.telemetry import Progress, say

# Set before ray is imported: no usage reports, no cloud metadata probes, and our runs on the dashboard's Train page.
# Ray posts one "disabled" report even when told not to, so its address is made unreachable (measured, Ray 2.60).
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}

_FOLDER_PREFIX = "forge-ray-"
_CONNECT_S = 10.0


@contextlib.contextmanager
def cluster(config: RayConfig) -> Iterator[str]:
    """Connects this process to Ray and yields the dashboard's URL ("" where there is none).

    Raises:
        ConfigError: The configured address does not answer.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _require_token()
    import ray

    if ray.is_initialized():
        yield _dashboard_url(ray)
        return
    address = _address(config)
    folder = None if address else _new_folder()
    try:
        context = _join(ray, address) if address else _start(ray, config, folder)
        say(
            f"ray: {'joined ' + address if address else 'private cluster'}, {_resources(ray)}"
            + (f", dashboard http://{context.dashboard_url}" if context.dashboard_url else "")
        )
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def map_rows(
    name: str, task: Callable[[dict[str, Any]], list[dict[str, Any]]], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Runs `task` on every row with Ray Data and returns all that it gives, in the rows' order.

    Each row is one block and one Ray task, so memory is bounded by what a row stands for, and a row whose worker dies
    is done again. What `task` returns should be small: names and counts of blobs that it has stored.

    Args:
        name: Shown in progress and on the dashboard.
        task: A picklable function from a row to a list of rows.
        rows: Each names a piece of the work.
    """
    import ray
    from ray.data import DataContext

    if not rows:
        return []
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    dataset.set_name(name)
    results: list[dict[str, Any]] = []
    with Progress(name, len(rows)) as progress:
        for done, row in enumerate(dataset.map(_Piece(task)).iter_rows(), start=1):
            found, error = row["out"]
            if error is not None:
                raise error
            results += found
            progress.update(done)
    return results


class _Piece:
    """Carries the task's list, or its `ForgeError`, through a Ray Data row as one value.

    An error travels as a value because Ray Data loses the cause of an exception on the way, and a `ForgeError` is not
    mended by the retries that it would get.
    """

    def __init__(self, task: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
        self.task = task
        self.__name__ = getattr(task, "__name__", type(task).__name__)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"out": (self.task(row), None)}
        except ForgeError as error:
            return {"out": ([], error)}


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Lets a `ForgeError` that Ray wrapped on its way from another process come out as itself."""
    try:
        yield
    except ForgeError:
        raise
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None:
            cause = getattr(inner, "cause", None) or inner.__cause__
            if isinstance(cause, ForgeError):
                raise cause from None
            inner = cause if isinstance(cause, BaseException) and cause is not inner else None
        raise


def _address(config: RayConfig) -> str | None:
    if config.address == "local":
        return None
    if config.address == "auto":
        return os.environ.get("RAY_ADDRESS") or None
    return config.address


def _join(ray: Any, address: str) -> Any:
    _check_reachable(address)
    try:
        return ray.init(address=address, log_to_driver=False, logging_level="warning", namespace="forge")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_answer(address, error) from None


def _check_reachable(address: str) -> None:
    """Ray itself tries for many minutes before it gives up on an address where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _no_answer(address, error) from None


def _no_answer(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        "the Ray cluster does not answer",
        got=f"{address}: {str(error)[:300]}",
        do="check `ray status` there, RAY_ADDRESS and --ray.address; --ray.address=local starts a private one",
    )


def _start(ray: Any, config: RayConfig, folder: Path) -> Any:
    try:
        return ray.init(
            address="local",
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_bytes,
            include_dashboard=config.dashboard,
            dashboard_host="127.0.0.1",
            dashboard_port=config.dashboard_port if config.dashboard else None,
            _temp_dir=str(folder),
            log_to_driver=False,
            logging_level="warning",
            namespace="forge",
        )
    except OSError as error:
        raise StorageError(
            f"a private Ray cluster cannot start: {error}", got=folder, do="free disk or set TMPDIR"
        ) from None


def _new_folder() -> Path:
    """A temporary folder for a private cluster, named for this process; those of killed processes are removed."""
    # Ray's sockets lie below it and a socket's path may have 107 bytes, so a long TMPDIR is avoided.
    parent = Path("/tmp" if len(tempfile.gettempdir()) > 30 and os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    for old in parent.glob(f"{_FOLDER_PREFIX}*-*"):
        owner = old.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=parent))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _require_token() -> None:
    """Makes Ray ask every client of a cluster for a token, kept with mode 0600 (Ray's own file is readable by all)."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink,
    ):
        sink.write(secrets.token_hex(32))


def _resources(ray: Any) -> str:
    total = ray.cluster_resources()
    gpus = f", {total['GPU']:.0f} GPUs" if total.get("GPU") else ""
    return f"{total.get('CPU', 0):.0f} CPUs{gpus}, {len(ray.nodes())} node(s)"


def _dashboard_url(ray: Any) -> str:
    url = ray._private.worker._global_node.webui_url if ray._private.worker._global_node else ""
    return f"http://{url}" if url else ""
