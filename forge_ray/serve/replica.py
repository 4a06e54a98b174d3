"""What runs inside Ray's workers: builds the Serve application, and the vLLM engine that a replica holds.

Owns the ingress's routes and errors, the deployments' options, and the three differences from Ray Serve LLM's stock engine.
Imports vLLM at once (8 s, 700 MB), so the driver never imports this module; it sends `load` and `submit` to workers.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException, to_model_metadata
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

_ERROR_LINE = re.compile(r"\b(?:ERROR|CRITICAL)\b|\w(?:Error|Exception): |Killed|Segmentation fault")
_ROUTES = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
}
_QUIET_LOGS = {"log_level": "WARNING", "enable_access_log": False}
# Serve's own graceful stop waits 2 s and polls; 0.2 s is enough once the ingress is gone.
_QUICK_STOP = {"graceful_shutdown_wait_loop_s": 0.2, "graceful_shutdown_timeout_s": 5}


def submit(app_name: str, *, model_dir: str, model_name: str, num_replicas: int, cpus: float, engine: dict[str, Any], env: dict[str, str]) -> None:
    """Builds the application and hands it to the Serve that runs already; returns before replicas start."""
    config = LLMConfig(
        model_loading_config={"model_id": model_name, "model_source": model_dir},
        engine_kwargs=engine,
        accelerator_config={"kind": "cpu"},
        # Stock asks for 2 CPUs (replica and bundle) and 1 for the ingress: on a 2-CPU machine it waits for ever.
        placement_group_config={"bundles": [{"CPU": cpus}]},
        # One try: a second fails alike and costs another engine start before anyone hears of the first.
        deployment_config={"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 0}, "max_constructor_retry_count": 1, **_QUICK_STOP},
        runtime_env={"env_vars": env},
        log_engine_metrics=False,
    )
    # Our own FastAPI app: the stock one lets any web origin call with credentials.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, exception_handlers={OpenAIHTTPException: _refuse})
    ingress = serve.deployment(
        make_fastapi_ingress(OpenAiIngress, app=app, endpoint_map=_ROUTES),
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": env}}, **_QUICK_STOP,
    )
    bound = ingress.bind(llm_deployments={model_name: build_llm_deployment(config)}, model_cards={model_name: to_model_metadata(model_name, config)})
    target = serve.RunTarget(target=bound, name=app_name, route_prefix="/", logging_config=_QUIET_LOGS)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


async def _refuse(request: Request, error: OpenAIHTTPException) -> JSONResponse:
    # Without this, a prompt that is too long comes back as "500 Internal Server Error".
    body = {"message": error.message, "type": getattr(error, "type", "invalid_request_error"), "code": error.status_code}
    return JSONResponse({"error": body}, status_code=error.status_code)


class OneProcessEngine(VLLMEngine):
    """Stock engine, minus two processes that each import vLLM for 7 to 8 s (2 cores, 2026-11).

    - No "download" task: the folder is local, and the task would import everything only to find nothing to fetch.
    - The worker runs inside the engine's process. vLLM's CPU platform asks for a second process only to set OpenMP's
      variables before torch loads; ours come with the replica's environment, so they are set from the start.

    Tensor parallelism needs the second process, so with more than one rank the stock layout stays.
    """

    async def start(self) -> None:
        """Starts the engine; a failure carries what the engine's child process wrote before it died."""
        self.llm_config.get_or_create_callback().ctx.run_init_node = False
        with _with_output_of_children():
            await super().start()

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        engine_args, frontend_args, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return engine_args, frontend_args, config


@contextlib.contextmanager
def _with_output_of_children() -> Iterator[None]:
    """Adds the children's error lines to an exception: vLLM's own says only "see root cause above"."""
    starts = {path: os.path.getsize(path) for path in _log_paths()}
    try:
        yield
    except Exception as error:
        lines = [line for path, start in starts.items() for line in _error_lines(path, start)]
        raise RuntimeError("\n".join([f"{type(error).__name__}: {error}", *lines[-12:]])) from None


def _log_paths() -> list[str]:
    # Ray points a worker's stdout and stderr at files; children inherit them.
    targets = {os.path.realpath(f"/proc/self/fd/{number}") for number in (1, 2)}
    return sorted(path for path in targets if os.path.isfile(path))


def _error_lines(path: str, start: int) -> list[str]:
    with open(path, errors="replace") as file:
        file.seek(start)
        return [line.strip()[:400] for line in file if _ERROR_LINE.search(line)]
