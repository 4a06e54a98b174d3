"""The vLLM engine as a replica on CPUs runs it: fewer processes than stock, and failures that say what failed.

Owns the settings given to Ray Serve LLM and our differences from its engine. Imports vLLM at once (8 s, 700 MB), so
only replicas import this module, never the driver.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard, to_model_metadata
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig

from forge_ray.serve.replica import FAILURE_MARK

_LOG_PREFIX = re.compile(r"^\(.*?\) [A-Z]+ \S+ \S+ \[\S+\] ?")
_LAST_LINE_OF_TRACEBACK = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)(?::|$)|Killed|Segmentation fault")


async def start_server(model_name: str, model_dir: str, engine_kwargs: dict[str, Any]) -> LLMServer:
    """Returns a started server; a failure carries what the engine's child process wrote before it died."""
    server = LLMServer.sync_init(_config(model_name, model_dir, engine_kwargs), engine_cls=OneProcessEngine)
    with _with_output_of_children():
        await server.start()
    return server


def model_card(model_name: str, model_dir: str, engine_kwargs: dict[str, Any]) -> ModelCard:
    """What `/v1/models` says of the model."""
    return to_model_metadata(model_name, _config(model_name, model_dir, engine_kwargs))


def _config(model_name: str, model_dir: str, engine_kwargs: dict[str, Any]) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": model_name, "model_source": model_dir},
        engine_kwargs=engine_kwargs,
        accelerator_config={"kind": "cpu"},
        log_engine_metrics=False,
    )


class OneProcessEngine(VLLMEngine):
    """Stock engine, minus two processes that each import vLLM for 7 to 8 s (2 cores, 2026-11).

    - No "download" task: the folder is local, and the task would import everything only to find nothing to fetch.
    - The worker runs inside the engine's process. vLLM's CPU platform asks for a second process only to set OpenMP's
      variables before torch loads; ours come with the replica's environment, so they are set from the start.

    Tensor parallelism needs the second process, so with more than one rank the stock layout stays.
    """

    async def start(self) -> None:
        self.llm_config.get_or_create_callback().ctx.run_init_node = False
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
        lines = [f"{type(error).__name__}: {error}"]
        lines += [line for path, start in starts.items() for line in _error_lines(path, start)]
        raise RuntimeError(FAILURE_MARK + "\n".join(dict.fromkeys(lines[:6]))) from None


def _log_paths() -> list[str]:
    # Ray points a worker's stdout and stderr at files; children inherit them.
    targets = {os.path.realpath(f"/proc/self/fd/{number}") for number in (1, 2)}
    return sorted(path for path in targets if os.path.isfile(path))


def _error_lines(path: str, start: int) -> list[str]:
    with open(path, errors="replace") as file:
        file.seek(start)
        plain = [_LOG_PREFIX.sub("", line).rstrip() for line in file]
    return [line[:400] for line in plain if _LAST_LINE_OF_TRACEBACK.search(line)]
