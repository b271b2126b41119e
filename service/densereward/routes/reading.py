"""From a request's bytes to a request: limits first, then JSON, then each sample by itself."""

from __future__ import annotations

import asyncio
import json
from itertools import groupby
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from densereward.errors import ClientGone, DenseRewardError, MalformedJSON, TooLarge
from densereward.problems import invalid, problems_of
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
    """Parse a body. A sample that cannot be read becomes its error, in its place.

    Raises:
        MalformedJSON: not JSON.
        InvalidRequest: JSON that is not such a request, whatever its samples.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        problems = problems_of(error)
    else:
        return request, list(request.samples)
    if problems[0]["type"] == "json_invalid":
        raise MalformedJSON(f"the body is not JSON: {problems[0]['msg']}")
    if of_the_request := [problem for problem in problems if _sample_index(problem) is None]:
        raise invalid(of_the_request)
    return _with_errors(json.loads(body), kind, problems)


def _sample_index(problem: ErrorDetails) -> int | None:
    location = problem["loc"]
    return int(location[1]) if len(location) > 1 and location[0] == "samples" else None


def _with_errors(raw: dict[str, Any], kind: type[R], problems: list[ErrorDetails]) -> tuple[R, Samples]:
    """The request with a placeholder for every bad sample, and the samples with the errors instead."""
    grouped = {index: list(group) for index, group in groupby(problems, _sample_index) if index is not None}
    readable = [_PLACEHOLDER if i in grouped else sample for i, sample in enumerate(raw["samples"])]
    request = kind.model_validate_json(json.dumps(raw | {"samples": readable}))
    samples: Samples = list(request.samples)
    for index, of_the_sample in grouped.items():
        samples[index] = invalid(of_the_sample, inside=2, sample=raw["samples"][index])
    return request, samples


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
