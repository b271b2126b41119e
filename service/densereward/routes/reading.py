"""From a request's bytes to a request: limits first, then JSON, then each sample by itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from densereward.errors import ClientGone, DenseRewardError, InvalidRequest, MalformedJSON, TooLarge
from densereward.settings import ServerSettings
from densereward_client.wire import RewardsRequest, Sample

__all__ = ["read", "read_request"]

R = TypeVar("R", bound=RewardsRequest)
Samples = list[Sample | DenseRewardError]

_PLACEHOLDER = {"prompt": "", "response": ""}


async def read_request(request: Request, kind: type[R], settings: ServerSettings) -> tuple[R, Samples]:
    """Read the body of a scoring request.

    Raises:
        TooLarge: more bytes or samples than the server takes.
        MalformedJSON: not JSON.
        InvalidRequest: JSON that is not such a request.
        ClientGone: the caller left while sending.
    """
    body = await _body(request, settings.max_body_bytes)
    parsed, samples = await asyncio.to_thread(read, body, kind)
    if len(samples) > settings.max_samples:
        raise TooLarge(
            f"{len(samples)} samples in one request, and the server takes {settings.max_samples}; send them in parts",
            samples=len(samples),
            limit=settings.max_samples,
        )
    return parsed, samples


def read(body: bytes, kind: type[R]) -> tuple[R, Samples]:
    """Parse a body. Under on_error=item, samples that cannot be read become errors in their places.

    Raises:
        MalformedJSON: not JSON.
        InvalidRequest: JSON that is not such a request; names the first field that is wrong.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    else:
        return request, list(request.samples)
    if problems[0]["type"] == "json_invalid":
        raise MalformedJSON(f"the body is not JSON: {problems[0]['msg']}")
    raw = json.loads(body)
    if _serves_items(raw) and all(_sample_index(problem) is not None for problem in problems):
        return _with_errors(raw, kind, problems)
    raise _invalid(problems[0], raw)


def _serves_items(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("on_error") == "item"


def _with_errors(raw: dict[str, Any], kind: type[R], problems: list[Any]) -> tuple[R, Samples]:
    errors = {_sample_index(problem): _invalid(problem, raw) for problem in reversed(problems)}
    readable = [_PLACEHOLDER if i in errors else sample for i, sample in enumerate(raw["samples"])]
    request = kind.model_validate_json(json.dumps(raw | {"samples": readable}))
    return request, [errors.get(i, sample) for i, sample in enumerate(request.samples)]


def _sample_index(problem: Any) -> int | None:
    location = problem["loc"]
    return location[1] if len(location) > 1 and location[0] == "samples" else None


def _invalid(problem: Any, raw: Any) -> InvalidRequest:
    location = list(problem["loc"])
    index = _sample_index(problem)
    message = problem["msg"].removeprefix("Value error, ")
    if index is None:
        field = ".".join(map(str, location))
        return InvalidRequest(f"{field}: {message}" if field else message, field=field)
    field = ".".join(map(str, location[2:]))
    details: dict[str, Any] = {"index": index} | ({"field": field} if field else {})
    sample = raw["samples"][index]
    if isinstance(sample, dict) and isinstance(sample.get("id"), str):
        details["id"] = sample["id"]
    return InvalidRequest(f"{field}: {message}" if field else message, **details)


async def _body(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge(f"the body is larger than {limit} bytes; send the samples in parts", limit=limit)
            parts.append(part)
    except ClientDisconnect as error:
        raise ClientGone("the caller left while sending the request") from error
    return b"".join(parts)
