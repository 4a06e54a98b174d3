"""What we ask of Ray: a cluster to run on, and one way to run the same function over many pieces.

Owns starting a private cluster (own ports, own temporary folder, nothing reported to anyone) or joining one. Does not
own training (`train/`) or serving (`serve/`). Only clusters started here are stopped here.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forge_ray.config import RayConfig
from forge_ray.errors import ConfigError, ForgeError, StorageError
from forge_ray.memo import Memo
from forge_ray.telemetry import Progress, say

# Set before ray is imported: no usage reports, no cloud metadata probes, Train's state kept for the dashboard's API.
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

_FOLDER_PREFIX, _LOCK = "forge-ray-", "forge.lock"
_CONNECT_S = 10.0
_PORTS_TRIED = 100


@contextlib.contextmanager
def cluster(config: RayConfig) -> Iterator[None]:
    """Connects this process to Ray; a private cluster ends with the block.

    Raises:
        ConfigError: The configured address does not answer, or no token can be kept for the cluster.
        StorageError: A private cluster finds no room for its files.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _require_token()
    import ray

    if ray.is_initialized():
        yield
        return
    address = _address(config)
    with contextlib.ExitStack() as stack:
        if address:
            stack.callback(ray.shutdown)
            context = _join(ray, address)
        else:
            folder = stack.enter_context(_own_folder())
            port = stack.enter_context(_claimed_port(config.dashboard_port)) if config.dashboard else None
            stack.callback(ray.shutdown)
            context = _start(ray, config, folder, port)
        say(
            f"ray: {'joined ' + address if address else 'private cluster'}, {_resources(ray)}"
            + (f", dashboard http://{context.dashboard_url}" if context.dashboard_url else "")
        )
        yield


def map_rows(
    name: str,
    task: Callable[[dict[str, Any]], list[dict[str, Any]]],
    rows: Sequence[dict[str, Any]],
    memo: Memo | None = None,
) -> list[dict[str, Any]]:
    """Runs `task` on every row with Ray Data and returns all that it gives, in the rows' order.

    Each row is one block and one Ray task, so memory is bounded by what a row stands for, and a row whose worker dies
    is done again. What `task` returns should be small: names and counts of blobs that it has stored.

    Args:
        name: Shown in progress and on the dashboard.
        task: A picklable function from a row to a list of rows.
        rows: Each names a piece of the work.
        memo: Where what a row gave is remembered; a row that is remembered is not computed again.
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
    first_error: ForgeError | None = None
    results: list[dict[str, Any]] = []
    stop, call = _stop_of_job(ray), uuid.uuid4().hex
    with Progress(name, len(rows)) as progress:
        for done, row in enumerate(dataset.map(_Piece(task, stop, call, memo)).iter_rows(), start=1):
            found, error = row["out"]
            if error is not None and first_error is None:
                first_error = error
                stop.set.remote(call)
            results += found
            progress.update(done)
    if first_error is not None:
        raise first_error
    return results


class _Stop:
    """The actor that lets pieces know of an error elsewhere; one for all calls of a job, since its start costs 0.7 s.

    The rest is not computed but its rows are still read: a Ray Data iterator left in the middle keeps threads that end
    the whole process, without a word, when Ray shuts down before them (Ray 2.60).
    """

    def __init__(self) -> None:
        self._stopped: set[str] = set()

    def set(self, call: str) -> None:
        """Nothing more is wanted of a call."""
        self._stopped.add(call)

    def is_set(self, call: str) -> bool:
        """Whether that was said."""
        return call in self._stopped


_STOPS: dict[tuple[str, str], Any] = {}  # of the job that this process is in, at most one


def _stop_of_job(ray: Any) -> Any:
    """The job's stop actor, kept for as long as the job lasts.

    A named actor ends with its last handle, some time later; who asks for the name in between gets one that dies.
    """
    about = ray.get_runtime_context()
    job = about.get_node_id(), about.get_job_id()  # job ids begin anew in each cluster
    if job not in _STOPS:
        _STOPS.clear()
        options = {"name": f"forge-stop-{job[1]}", "get_if_exists": True, "max_restarts": -1, "max_task_retries": -1}
        _STOPS[job] = ray.remote(num_cpus=0)(_Stop).options(**options).remote()
    return _STOPS[job]


class _Piece:
    """Carries the task's list, or its `ForgeError`, through a Ray Data row as one value.

    An error travels as a value because Ray Data loses the cause of an exception on the way, and a `ForgeError` is not
    mended by the retries that it would get.
    """

    def __init__(
        self,
        task: Callable[[dict[str, Any]], list[dict[str, Any]]],
        stop: Any,
        call: str,
        memo: Memo | None = None,
    ) -> None:
        self.task, self.stop, self.call, self.memo = task, stop, call, memo
        self.__name__ = getattr(task, "__name__", type(task).__name__)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        if ray.get(self.stop.is_set.remote(self.call)):
            return {"out": ([], None)}
        try:
            return {"out": (self._remembered(row), None)}
        except ForgeError as error:
            return {"out": ([], error)}

    def _remembered(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        found = self.memo.get(row) if self.memo else None
        if found is None:
            found = self.task(row)
            if self.memo:
                self.memo.put(row, found)
        return found


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Lets a `ForgeError` that Ray wrapped on its way from another process come out as itself.

    Each process on its way wraps it once more, in a class that is a `ForgeError` too: `RayTaskError(StorageError)`.
    """
    try:
        yield
    except Exception as error:
        from ray.exceptions import RayTaskError

        inner: BaseException | None = error
        while isinstance(inner, BaseException):
            if isinstance(inner, ForgeError) and not isinstance(inner, RayTaskError):
                if inner is error:
                    raise
                raise inner from None
            cause = getattr(inner, "cause", None) or inner.__cause__
            inner = cause if cause is not inner else None
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
        return ray.init(
            address=address,
            log_to_driver=False,
            logging_level="warning",
            namespace="forge",
            job_config=_job_config(ray),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_answer(address, error) from None


@contextlib.contextmanager
def _claimed_port(first: int) -> Iterator[int]:
    """The first port from `first` on that loopback has free and no other private cluster has claimed.

    Another cluster's dashboard may hold the usual port, or be about to: Ray binds it seconds later, and a cluster whose
    port was taken meanwhile does not start. So a claim is a lock on a file, held as long as the cluster lives.
    """
    for port in range(first, min(first + _PORTS_TRIED, 65536)):
        path = Path(tempfile.gettempdir()) / f"{_FOLDER_PREFIX}port-{port}"
        with contextlib.ExitStack() as claim:
            try:
                lock = claim.enter_context(path.open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            claim.callback(path.unlink, missing_ok=True)
            yield port
            return
    raise ConfigError(
        "no port is free for the dashboard",
        got=f"{first} to {first + _PORTS_TRIED - 1}",
        do="choose another --ray.dashboard_port, or switch it off with --ray.dashboard=false",
    )


def _job_config(ray: Any) -> Any:
    """The name under which the dashboard's Jobs page shows this process."""
    words = [word for word in sys.argv[1:3] if not word.startswith("-")]
    return ray.job_config.JobConfig(metadata={"job_name": " ".join(["forge", *words])})


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


def _start(ray: Any, config: RayConfig, folder: Path, port: int | None) -> Any:
    try:
        return ray.init(
            address="local",
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_bytes,
            include_dashboard=config.dashboard,
            dashboard_host="127.0.0.1",
            job_config=_job_config(ray),
            dashboard_port=port,
            _temp_dir=str(folder),
            log_to_driver=False,
            logging_level="warning",
            namespace="forge",
        )
    except OSError as error:
        raise _no_room(error, folder) from None


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder for a private cluster; those that killed processes left are removed.

    Its owner holds a lock on a file in it while it lives. A process id would not do: containers that share a /tmp do
    not see each other's processes.
    """
    # Ray's sockets lie below it and a socket's path may have 107 bytes, so a long TMPDIR is avoided.
    parent = Path("/tmp" if len(tempfile.gettempdir()) > 30 and os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    for old in parent.glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError), (old / _LOCK).open("r+b") as lock:  # no lock in it: not ours to judge
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        try:
            # It takes the name that others look for only once it is locked.
            new = Path(tempfile.mkdtemp(prefix="forge-new-", dir=parent))
            lock = stack.enter_context((new / _LOCK).open("wb"))
            with contextlib.suppress(OSError):  # a file system without locks: nobody else can take it either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = new.rename(parent / new.name.replace("forge-new-", _FOLDER_PREFIX))
        except OSError as error:
            raise _no_room(error, parent) from None
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _no_room(error: OSError, folder: Path) -> StorageError:
    return StorageError(f"a private Ray cluster cannot start: {error}", got=folder, do="free disk or set TMPDIR")


def _require_token() -> None:
    """Makes Ray ask every client of a cluster for a token, kept with mode 0600 (Ray's own file is readable by all).

    Raises:
        ConfigError: The token cannot be written, or others can read it and its mode cannot be mended.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "RAY_AUTH_TOKEN" not in os.environ:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        try:
            _keep_token(path)
        except OSError as error:
            raise ConfigError(
                "the token that guards the Ray cluster cannot be kept",
                got=f"{path}: {error}",
                do="set RAY_AUTH_TOKEN_PATH to a file in a folder that you can write",
            ) from None
    os.environ["RAY_AUTH_MODE"] = "token"


def _keep_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        tighten(path)
    else:
        with os.fdopen(fd, "w") as sink:
            sink.write(secrets.token_hex(32))


def tighten(path: Path) -> None:
    """Takes the token from group and others; only a group may keep it, where the mode is fixed (a mounted secret)."""
    mode = path.stat().st_mode
    try:
        if mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        if mode & 0o007:
            raise ConfigError(
                "every user of this machine can read what guards a Ray cluster",
                got=f"{path}, mode {mode & 0o777:o}: {error}",
                wanted="mode 600",
                do=f"chmod 600 {path} as its owner, or name a file of your own (RAY_AUTH_TOKEN_PATH)",
            ) from None


def _resources(ray: Any) -> str:
    total = ray.cluster_resources()
    gpus = f", {total['GPU']:.0f} GPUs" if total.get("GPU") else ""
    return f"{total.get('CPU', 0):.0f} CPUs{gpus}, {len(ray.nodes())} node(s)"
