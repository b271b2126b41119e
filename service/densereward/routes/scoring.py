"""The routes that score: POST /token_rewards and POST /rewards."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response

from densereward.errors import ClientGone, DeadlineExceeded, Unauthorized
from densereward.routes.reading import read_request
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


def require_key(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
    """Where a key is set, the request must bring it as a bearer token."""
    key = request.app.state.settings.api_key
    if key is None:
        return
    expected = f"Bearer {key.get_secret_value()}"
    if authorization is None or not hmac.compare_digest(authorization.encode(), expected.encode()):
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
    service: Service = request.app.state.service
    settings: ServerSettings = request.app.state.settings
    service.pipeline  # noqa: B018  # refuse before reading the body
    parsed, samples = await read_request(request, TokenRewardsRequest, settings)
    work = service.pipeline_for(parsed.model).token_rewards(parsed, samples)
    return await _answer(request, work, settings.request_timeout)


@router.post("/rewards", responses={200: {"model": RewardsResponse}}, openapi_extra=_body(RewardsRequest))
async def rewards(request: Request) -> Response:
    """Sequence rewards only."""
    service: Service = request.app.state.service
    settings: ServerSettings = request.app.state.settings
    service.pipeline  # noqa: B018  # refuse before reading the body
    parsed, samples = await read_request(request, RewardsRequest, settings)
    work = service.pipeline_for(parsed.model).rewards(parsed, samples)
    return await _answer(request, work, settings.request_timeout)


async def _answer(request: Request, work: Coroutine[Any, Any, dict[str, Any]], seconds: float) -> Response:
    """Do the work, unless the caller leaves or its time runs out first; then it is dropped."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_caller_left(request))
    try:
        await asyncio.wait({working, watching}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            content = await asyncio.to_thread(orjson.dumps, working.result(), option=orjson.OPT_SERIALIZE_NUMPY)
            return Response(content, media_type="application/json")
        if watching.done():
            raise ClientGone("the caller left before the answer was ready")
        raise DeadlineExceeded(f"the request took longer than {seconds:g} s; send fewer samples, or raise the limit")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _caller_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
