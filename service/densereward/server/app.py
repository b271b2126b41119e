"""The FastAPI application: lifespan, routes, one place where errors become answers."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from densereward import __version__
from densereward.errors import DenseRewardError, NotReady
from densereward.server.routes import openrlhf, operations, scoring, vllm
from densereward.server.service import Service
from densereward.settings import ServerSettings
from densereward_client.wire import RewardsRequest, TokenRewardsRequest

__all__ = ["create_app"]

logger = logging.getLogger("densereward")

_HOST_THREADS = 2
"""They share the interpreter with the event loop: with each more, the loop waits longer for its turn."""


def create_app(settings: ServerSettings, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The server's application. The model is loaded in the background; /ready tells when it is.

    Args:
        settings: the server's.
        on_failure: called when the model cannot be served, or no longer can; `app.state.service.failure` then says why.
    """
    service = Service(settings, on_death=on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_HOST_THREADS, thread_name_prefix="host"))
        starting = asyncio.create_task(_start(service, on_failure))
        yield
        await starting
        await service.stop()

    app = FastAPI(title="densereward", version=__version__, description=_DESCRIPTION, lifespan=lifespan)
    app.state.settings = settings
    app.state.service = service
    app.include_router(scoring.router)
    app.include_router(openrlhf.router)
    app.include_router(vllm.router)
    app.include_router(operations.router)
    app.add_exception_handler(DenseRewardError, _known_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unknown_error)
    app.add_middleware(_Observe, service=service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


_DESCRIPTION = "A reward-model server for RL on language models: one forward pass, one reward per token."


async def _start(service: Service, on_failure: Callable[[], None]) -> None:
    try:
        await service.start()
        await asyncio.to_thread(_freeze)
    except DenseRewardError as error:
        logger.error("cannot serve %s: %s", ", ".join(service.settings.model), error.message)
        on_failure()
    except Exception:  # whatever a model does while it loads, the process must end and say so
        logger.exception("cannot serve %s", ", ".join(service.settings.model))
        on_failure()


def _freeze() -> None:
    """Exclude what is loaded from garbage collection, which would stop every thread for a quarter second."""
    gc.collect()
    gc.freeze()


async def _known_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, DenseRewardError):
        raise error
    if error.status >= 499:
        error.details.setdefault("request_id", request.state.request_id)
        level = logging.INFO if isinstance(error, NotReady) else logging.WARNING  # a probe asks every few seconds
        logger.log(level, "%s %s: %s", request.state.request_id, error.error_code, error.message)
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.as_error()}, status_code=error.status, headers=headers)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    content = {"error": {"code": code, "message": f"{error.detail}; GET /docs lists the routes", "details": {}}}
    return JSONResponse(content, status_code=error.status_code, headers=error.headers)


async def _unknown_error(request: Request, error: Exception) -> JSONResponse:
    request_id = request.state.request_id
    logger.error("%s failed", request_id, exc_info=error)
    message = f"the server failed; its log says more under {request_id}"
    details = {"request_id": request_id}
    content = {"error": {"code": DenseRewardError.code, "message": message, "details": details}}
    return JSONResponse(content, status_code=500, headers={"X-Request-ID": request_id})


_BODIES = (
    TokenRewardsRequest,
    RewardsRequest,
    openrlhf.GetRewardRequest,
    vllm.ClassifyRequest,
    vllm.PoolingRequest,
)
"""Bodies that the scoring routes parse themselves."""


class _Observe:
    """Gives every request an id, and counts and times it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # never the raw path: labels must stay few
            self._metrics.request(route, status, time.perf_counter() - started)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bodies that the scoring routes parse themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        bodies = [(model, "validation") for model in _BODIES]
        _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        schema["components"]["schemas"] |= definitions["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
