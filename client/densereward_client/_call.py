"""Calls, as every client makes them: the request that is sent, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from ._checks import check_rewards, check_token_rewards
from ._errors import InvalidAnswer, beginning, status_error
from .wire import (
    Ensemble,
    Include,
    MethodRequest,
    ModelList,
    RewardsRequest,
    RewardsResponse,
    Sample,
    TokenRewardsRequest,
    TokenRewardsResponse,
)

Samples = Sequence[Sample | Mapping[str, Any]]
Methods = Sequence[str | MethodRequest | Mapping[str, Any]]
Model = str | Sequence[str]
EnsembleOptions = Ensemble | Mapping[str, Any]
OnError = Literal["request", "item"]
Truncate = Literal["prompt_left"]
EncodingFormat = Literal["float", "base64"]
Answer = TypeVar("Answer")
_Request = TypeVar("_Request", bound=BaseModel)
_ParsedAnswer = TypeVar("_ParsedAnswer", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """What is sent, and how a successful answer is read."""

    method: str
    path: str
    body: bytes | None
    read: Callable[[bytes], Answer]

    def sent(self) -> dict[str, Any]:
        """The arguments of httpx's `request` and `stream`."""
        return {"method": self.method, "url": self.path, "content": self.body}

    def answer(self, response: httpx.Response, body: bytes) -> Answer:
        """The checked answer; raises the error that an unsuccessful response stands for."""
        if not response.is_success:
            raise status_error(response.status_code, body, response.headers.get("Retry-After"))
        return self.read(body)


def token_rewards_call(
    samples: Samples,
    methods: Methods | None,
    include: Sequence[Include],
    model: Model | None,
    ensemble: EnsembleOptions | None,
    on_error: OnError,
    truncate: Truncate | None,
    encoding_format: EncodingFormat,
    priority: int,
) -> Call[TokenRewardsResponse]:
    """POST /token_rewards."""
    request = _request(
        TokenRewardsRequest,
        model=model,
        ensemble=ensemble,
        samples=samples,
        methods=methods,
        include=include,
        on_error=on_error,
        truncate=truncate,
        encoding_format=encoding_format,
        priority=priority or None,
    )
    return _post("/token_rewards", request, TokenRewardsResponse, check_token_rewards, encoding_format)


def rewards_call(
    samples: Samples,
    model: Model | None,
    ensemble: EnsembleOptions | None,
    on_error: OnError,
    truncate: Truncate | None,
    encoding_format: EncodingFormat,
    priority: int,
) -> Call[RewardsResponse]:
    """POST /rewards."""
    request = _request(
        RewardsRequest,
        model=model,
        ensemble=ensemble,
        samples=samples,
        on_error=on_error,
        truncate=truncate,
        priority=priority or None,
    )
    return _post("/rewards", request, RewardsResponse, check_rewards, encoding_format)


def models_call() -> Call[ModelList]:
    """GET /v1/models."""
    return Call("GET", "/v1/models", None, lambda body: _parse(ModelList, body))


def ready_call() -> Call[bool]:
    """GET /ready; any success means yes."""
    return Call("GET", "/ready", None, lambda _: True)


def _request(kind: type[_Request], **fields: Any) -> _Request:
    return kind.model_validate({name: value for name, value in fields.items() if value is not None})


def _post(
    path: str,
    request: _Request,
    kind: type[_ParsedAnswer],
    check: Callable[[_Request, _ParsedAnswer], None],
    encoding_format: EncodingFormat,
) -> Call[_ParsedAnswer]:
    def read(body: bytes) -> _ParsedAnswer:
        answer = _parse(kind, body)
        check(request, answer)
        return answer

    # exclude_unset, not exclude_none: a None that the caller put into a message or a method is sent.
    body = request.model_dump_json(exclude_unset=True, context=encoding_format).encode()
    return Call("POST", path, body, read)


def _parse(kind: type[_ParsedAnswer], body: bytes) -> _ParsedAnswer:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise InvalidAnswer(f"not a {kind.__name__}: {error}; the body begins {beginning(body)}") from error
