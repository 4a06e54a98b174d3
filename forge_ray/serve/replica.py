"""The two deployments as Serve holds them: `Model`, one engine per replica, and `Ingress`, the OpenAI routes in front.

Owns which routes exist and how an error looks to a client. Both are shells that import Ray Serve LLM and vLLM in the
replica's own process: so the driver builds the application in 0.1 s instead of importing 8 s of code it never runs,
and both replicas import at the same time. What the engine does is in `engine.py`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

FAILURE_MARK = "the engine did not start: "  # what follows it is worth showing; what comes before is Serve's traceback


class Model:
    """Holds one engine; its methods are those that Ray Serve LLM's ingress calls."""

    async def __init__(self, settings: dict[str, Any]) -> None:
        self._server = await _import("forge_ray.serve.engine").start_server(**settings)

    async def completions(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._server.completions(request, raw_request_info)

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._server.chat(request, raw_request_info)

    async def check_health(self) -> None:
        """Raises when the engine is dead, so that Serve replaces this replica."""
        await self._server.check_health()


class Ingress:
    """Answers the OpenAI routes over the model's replicas; wrap it in `serve.ingress()`."""

    def __init__(self, model_name: str, model: Any, settings: dict[str, Any]) -> None:
        engine = _import("forge_ray.serve.engine")
        from ray.serve.llm.ingress import OpenAiIngress

        card = engine.model_card(**settings)
        self._routes = OpenAiIngress(llm_deployments={model_name: model}, model_cards={model_name: card})

    async def __serve_build_asgi_app__(self) -> Any:
        """Our own FastAPI app: Ray's lets any web origin call with credentials, and has docs and more routes."""
        from fastapi import FastAPI
        from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

        handlers: dict[Any, Any] = {OpenAIHTTPException: _refuse}
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, exception_handlers=handlers)
        app.get("/v1/models")(self._routes.models)
        app.get("/v1/models/{model:path}")(self._routes.model_data)
        app.post("/v1/completions")(self._routes.completions)
        app.post("/v1/chat/completions")(self._routes.chat)
        return app

    async def check_health(self) -> None:
        await self._routes.check_health()


async def _refuse(request: Any, error: Any) -> Any:
    # Without this handler a prompt that is too long comes back as "500 Internal Server Error".
    from fastapi.responses import JSONResponse

    kind = getattr(error, "type", "invalid_request_error")
    body = {"message": error.message, "type": kind, "code": error.status_code}
    return JSONResponse({"error": body}, status_code=error.status_code)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ValueError as error:
        # Ray 2.60 registers its connectors in the cluster's store, not atomically: of two first imports one may fail
        # (seen 2026-11 on the first start with two replicas); the second try finds them registered.
        if "already registered" not in str(error):
            raise
        return importlib.import_module(name)
