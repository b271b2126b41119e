"""What the scoring routes share: the key, the limits, the time limit, and the stop once the caller has left."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header, Request, Response
from pydantic import BaseModel

from densereward.errors import ClientGone, DeadlineExceeded, DenseRewardError, Unauthorized
from densereward.scoring.pipeline import Scorer
from densereward.server.routes.reading import body_of
from densereward.server.service import Service
from densereward.settings import ServerSettings
from densereward_client.wire import ErrorBody

__all__ = ["ERRORS", "PreparedRequest", "answer_request", "body_schema", "require_key"]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 413, 422, 429, 500, 503, 504)
}


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request on its way through the engine.

    Attributes:
        scorer: what scores it.
        work: the scorer's own.
        write: the scorer's answer, as the bytes that the route promises.
    """

    scorer: Scorer
    work: Any
    write: Callable[[dict[str, Any]], bytes]


Prepare = Callable[[Service, bytes, int], PreparedRequest]
"""Parses a body of at most so many samples, and does all that comes before the engine. Blocks; for a thread."""


async def require_key(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
    """Where a key is set, the request must bring it as a bearer token."""
    key = request.app.state.settings.api_key
    if key is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.get_secret_value().encode()):
        raise Unauthorized("this server asks for its key: send the header Authorization: Bearer KEY")


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The request body in the OpenAPI document; the route reads the bytes itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def answer_request(request: Request, prepare: Prepare, samples: str = "samples") -> Response:
    """Read, score and answer within the time limit; `samples` is what the request calls its samples."""
    service: Service = request.app.state.service
    settings: ServerSettings = request.app.state.settings
    service.pipeline  # noqa: B018  # refuse before reading the body
    try:
        async with asyncio.timeout(settings.request_timeout):
            body = await body_of(request, settings.max_body_bytes)
            content = await _unless_caller_leaves(request, _score(service, body, prepare, settings.max_samples))
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the request took longer than {settings.request_timeout:g} s; send fewer samples, or raise the limit"
        ) from error
    except DenseRewardError as error:
        error.message = re.sub(r"^samples\[", f"{samples}[", error.message)
        raise
    return Response(content, media_type="application/json")


async def _score(service: Service, body: bytes, prepare: Prepare, max_samples: int) -> bytes:
    """From bytes to bytes: a thread before the wait for the engine, and one after it."""
    prepared = await asyncio.to_thread(prepare, service, body, max_samples)
    scores = await prepared.scorer.score(prepared.work)
    return await asyncio.to_thread(_write_answer, prepared, scores)


def _write_answer(prepared: PreparedRequest, scores: Any) -> bytes:
    return prepared.write(prepared.scorer.answer(prepared.work, scores))


async def _unless_caller_leaves(request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
    """The work's result. The work is dropped once the caller has left or the time has run out."""
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
