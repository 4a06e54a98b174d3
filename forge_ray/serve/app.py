"""Puts an exported Hugging Face folder behind an OpenAI-compatible endpoint: Ray Serve LLM with vLLM on CPUs.

Owns the deployment (checks before it, its state while it starts, its failure's real text, its end) and the smallest
client. Does not own the Ray cluster (the caller has joined one), the export, authentication, limits or the audit line:
without those nothing but loopback should be given as `host`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.errors import ServeError
from forge_ray.serve.replica import FAILURE_MARK

APP_NAME = "forge"
QUIET_LOGS = {"log_level": "WARNING", "enable_access_log": False}
NEEDED_FILES = ("config.json", "model.safetensors|model.safetensors.index.json", "tokenizer.json")

# What the replicas' processes see: nothing leaves the machine, warnings only, loopback for vLLM's own sockets, and
# vLLM's leave to keep the worker in the engine's process.
REPLICA_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TQDM_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
# Eager with an explicit cache size makes vLLM skip compiling and its warm-up: a second in place of minutes.
ENGINE_DEFAULTS: dict[str, object] = {
    "load_format": "safetensors",
    "trust_remote_code": False,
    "enforce_eager": True,
    "max_num_seqs": 32,
}


@dataclass(frozen=True)
class Endpoint:
    """A model that answers at `url` (no trailing slash) under `model_name`."""

    url: str
    model_name: str

    def complete(self, prompt: str, *, max_tokens: int, temperature: float) -> str:
        """Returns the text that the model writes after `prompt`, asked over HTTP as any client would.

        Raises:
            ServeError: The server refused the request or did not answer.
        """
        body = {
            "model": self.model_name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": 0,
        }
        try:
            return str(_http(f"{self.url}/v1/completions", body)["choices"][0]["text"])
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            raise ServeError(
                "the model refused the request",
                got=f"HTTP {error.code}: {text}",
                do="shorten the prompt or lower max_tokens if the text says so",
            ) from error
        except OSError as error:
            raise ServeError("the endpoint does not answer", got=f"{self.url}: {error}", do="start it again") from error

    def stop(self) -> None:
        """Shuts Serve down on this cluster and frees the port; does nothing when it is down already."""
        import ray
        from ray import serve

        if ray.is_initialized():
            # Serve kills its controller while a task of it runs, and Ray prints that as an error: nothing to mend.
            with contextlib.redirect_stdout(io.StringIO()):
                serve.shutdown()


@dataclass(frozen=True)
class Served:
    """What is to be served, and with what.

    `model_dir` is a folder as `save_pretrained` writes it, at the same path on every node that may hold a replica;
    `max_model_len` counts prompt and answer together; `kv_cache_bytes` is each replica's, written once at start (1 GiB
    costs 3 s); ingress and proxy reserve no CPU, so `cpus_per_replica` x `num_replicas` free CPUs are enough;
    `dtype` is "auto", "bfloat16" or "float32" ("auto" computes fp32 weights in bf16).
    """

    model_dir: Path
    model_name: str
    num_replicas: int
    max_model_len: int
    kv_cache_bytes: int
    cpus_per_replica: float
    dtype: str


def deploy(
    served: Served, *, host: str, port: int, ready_timeout_s: float, on_state: Callable[[str], None]
) -> Endpoint:
    """Serves a folder on `host:port` and returns once it has listed the model to a real HTTP client.

    Args:
        host: Address the proxy binds; 127.0.0.1 keeps it on this machine.
        port: Refused when something listens there.
        ready_timeout_s: Longest wait, from the call on.
        on_state: Told in a few words what is happening, each time it changes.

    Raises:
        ServeError: Refused before anything started, the replica failed (with its own words), or the time is over.

    Cost:
        30 CPU seconds, nearly all imports of vLLM in three processes (ingress, replica, engine). On a shared machine of
        2 cores the first answer came after 36 s, with another actor holding one CPU, and 64 s at a load of 5 to 8
        (1.4 M parameters, 2026-11).
    """
    from ray import serve

    deadline = time.monotonic() + ready_timeout_s
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    check_folder(served.model_dir)
    check_direct_streaming_is_off()
    check_port(host, port)
    _check_no_other_serve()
    endpoint = Endpoint(url=f"http://{_for_url(host)}:{port}", model_name=served.model_name)
    try:
        on_state("starting Serve")
        _start_serve(host, port)
        target = serve.RunTarget(target=application(served), name=APP_NAME, route_prefix="/", logging_config=QUIET_LOGS)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_ready(endpoint, deadline, ready_timeout_s, on_state)
    except BaseException:
        with contextlib.suppress(Exception):
            endpoint.stop()
        raise
    return endpoint


def application(served: Served) -> Any:
    """The Serve application of a folder, not yet running: what `serve deploy` and `deploy` run."""
    from ray import serve

    from forge_ray.serve.replica import Ingress, Model

    engine = ENGINE_DEFAULTS | {
        "max_model_len": served.max_model_len,
        "kv_cache_memory_bytes": served.kv_cache_bytes,
        "dtype": served.dtype,
    }
    settings = {"model_name": served.model_name, "model_dir": str(served.model_dir), "engine_kwargs": engine}
    environment = REPLICA_ENVIRONMENT | {"OMP_NUM_THREADS": str(max(1, int(served.cpus_per_replica)))}
    # Ray Serve LLM's own builder asks for 2 CPUs a replica and 1 for the ingress: on 2 CPUs it waits for ever. Here
    # only the placement group reserves. Two constructor tries: a start failed once in some thirty.
    # Serve's graceful stop waits 2 s per round by default.
    common: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": environment}},
        "max_ongoing_requests": 1000,
        "max_constructor_retry_count": 2,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": 5,
    }
    bundles = [{"CPU": served.cpus_per_replica}]
    model = serve.deployment(Model, num_replicas=served.num_replicas, placement_group_bundles=bundles, **common)
    ingress = serve.deployment(serve.ingress()(Ingress), name="Ingress", num_replicas=1, **common)
    return ingress.bind(served.model_name, model.bind(settings), settings)


def _start_serve(host: str, port: int) -> None:
    from ray import serve

    try:
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"}, logging_config=QUIET_LOGS)
    except Exception as error:
        raise ServeError(
            "Ray Serve did not start",
            got=f"{type(error).__name__}: {error}",
            do="look at the controller's log in Ray's session folder",
        ) from error


def _wait_until_ready(endpoint: Endpoint, deadline: float, timeout_s: float, on_state: Callable[[str], None]) -> None:
    """Polls Serve's own status and then the model list over HTTP.

    Raises:
        ServeError: The deployment failed or the time is over.
    """
    from ray import serve

    shown = ""
    while True:
        app = serve.status().applications.get(APP_NAME)
        state = _describe(app)
        if state != shown:
            on_state(state)
            shown = state
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServeError(
                "the model could not be served",
                got=_failure(app),
                do="correct what the text above names and deploy again",
            )
        if app is not None and app.status == "RUNNING" and _lists_model(endpoint):
            on_state(f"ready at {endpoint.url}")
            return
        if time.monotonic() > deadline:
            last = _failure(app) if app else state
            raise ServeError(
                "the model was not ready in time",
                got=f"after {timeout_s:g} s: {last}",
                wanted="RUNNING",
                do="free CPUs for the replica, or raise ready_timeout_s",
            )
        time.sleep(0.1)


def _describe(app: Any) -> str:
    if app is None:
        return "deploying"
    parts = [f"{name} {dep.status.value.lower()}" for name, dep in sorted(app.deployments.items())]
    return f"{app.status.value.lower()}: " + ", ".join(parts) if parts else app.status.value.lower()


def _failure(app: Any) -> str:
    """The replicas' own words where there are some, else the last lines of what Serve says."""
    waiting = {name: dep.message for name, dep in app.deployments.items() if dep.status != "HEALTHY"}
    texts = [f"{name}: {message}" for name, message in waiting.items() if message] or [app.message or app.status.value]
    known = [text.rpartition(FAILURE_MARK)[2] for text in texts if FAILURE_MARK in text]
    return "\n".join(known or ["\n".join(text.strip().splitlines()[-6:]) for text in texts])


def _lists_model(endpoint: Endpoint) -> bool:
    try:
        return endpoint.model_name in [card["id"] for card in _http(f"{endpoint.url}/v1/models", timeout_s=5)["data"]]
    except (OSError, ValueError, KeyError):
        return False


def _http(url: str, body: dict[str, object] | None = None, timeout_s: float = 600) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    # No proxy: a company's proxy must not see (and cannot reach) loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as response:
        return json.load(response)


def check_folder(model_dir: Path) -> None:
    """Refuses a folder that is no exported model.

    Raises:
        ServeError: Naming what is missing.
    """
    missing = [names for names in NEEDED_FILES if not any((model_dir / name).is_file() for name in names.split("|"))]
    if missing:
        raise ServeError(
            "this is no exported model folder",
            got=f"{model_dir} without {', '.join(missing)}",
            wanted="a Hugging Face folder in safetensors",
            do="run the export stage and give its folder",
        )


def check_direct_streaming_is_off() -> None:
    """Refuses the variable that makes Serve answer without our routes.

    Raises:
        ServeError: It is set.
    """
    if os.environ.get("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING") == "1":
        raise ServeError(
            "direct streaming takes our ingress out of the way of requests",
            got="RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1",
            do="unset that variable on every node",
        )


def _check_no_other_serve() -> None:
    import ray

    with contextlib.suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        raise ServeError(
            "Serve runs on this cluster already, and its host and port cannot be changed",
            wanted="a cluster without Serve",
            do="stop that endpoint first, or use another cluster",
        )


def _for_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def check_port(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on now.

    Raises:
        ServeError: Naming the process that holds the port, where that can be seen.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port}",
                got=_holder(port) or str(error),
                wanted="a free port",
                do="stop that process, or choose another port",
            ) from error


def _holder(port: int) -> str | None:
    """Names the process that listens on `port`, where the operating system lets us see it."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return f"held by process {one.pid} ({' '.join(psutil.Process(one.pid).cmdline())[:120]})"
    return None
