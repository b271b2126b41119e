"""The routes that score: POST /token_rewards and POST /rewards."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response

from densereward.errors import ClientGone, DeadlineExceeded, Unauthorized
from densereward.pipeline import Scorer
from densereward.routes.reading import body_of, read
from densereward.service import Service
from densereward.settings import ServerSettings
from densereward_client.wire import (
    ErrorBody,
    RewardsRequest,
    RewardsResponse,
    TokenRewardsRequest,
    TokenRewardsResponse,
)

__all__ = ["router"]


async def require_key(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
    """Where a key is set, the request must bring it as a bearer token. Not blocking, so it needs no thread."""
    key = request.app.state.settings.api_key
    if key is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.get_secret_value().encode()):
        raise Unauthorized("this server asks for its key: send the header Authorization: Bearer KEY")


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 413, 422, 429, 500, 503, 504)
}

router = APIRouter(dependencies=[Depends(require_key)], responses=_ERRORS, tags=["scoring"])


def _body(model: type[RewardsRequest]) -> dict[str, Any]:
    """The request body in the OpenAPI document; the route reads the bytes itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post(
    "/token_rewards", responses={200: {"model": TokenRewardsResponse}}, openapi_extra=_body(TokenRewardsRequest)
)
async def token_rewards(request: Request) -> Response:
    """Sequence rewards, and the same rewards given to the response's tokens."""
    return await _answer(request, TokenRewardsRequest)


@router.post("/rewards", responses={200: {"model": RewardsResponse}}, openapi_extra=_body(RewardsRequest))
async def rewards(request: Request) -> Response:
    """Sequence rewards only."""
    return await _answer(request, RewardsRequest)


async def _answer(request: Request, kind: type[RewardsRequest]) -> Response:
    """Read and score within the time that a request has."""
    service: Service = request.app.state.service
    settings: ServerSettings = request.app.state.settings
    service.pipeline  # noqa: B018  # refuse before reading the body
    try:
        async with asyncio.timeout(settings.request_timeout):
            body = await body_of(request, settings.max_body_bytes)
            content = await _unless_caller_leaves(request, _score(service, body, kind, settings.max_samples))
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the request took longer than {settings.request_timeout:g} s; send fewer samples, or raise the limit"
        ) from error
    return Response(content, media_type="application/json")


async def _score(service: Service, body: bytes, kind: type[RewardsRequest], max_samples: int) -> bytes:
    """From bytes to bytes: one thread before the wait for the engine, one after it."""
    pipeline, work = await asyncio.to_thread(_prepare, service, body, kind, max_samples)
    scored = await pipeline.score(work)
    return await asyncio.to_thread(_encode, pipeline, work, scored)


def _prepare(service: Service, body: bytes, kind: type[RewardsRequest], max_samples: int) -> tuple[Scorer, Any]:
    request, samples = read(body, kind, max_samples)
    pipeline: Scorer = service.pipeline_for(request)
    return pipeline, pipeline.prepare(request, samples)


def _encode(pipeline: Scorer, work: Any, scored: Any) -> bytes:
    """The answer's bytes, item by item: an encoder holds the interpreter as long as a parser does."""
    answer = pipeline.answer(work, scored)
    items = [orjson.Fragment(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY)) for item in answer["data"]]
    return orjson.dumps(answer | {"data": items})


async def _unless_caller_leaves(request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
    """The work's result; once the caller has left or the time has run out, the work is dropped."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_caller_left(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the caller left before the answer was ready")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _caller_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
