"""POST /classify and POST /pooling in vLLM's shapes, for trainers that are pointed at such a server.

An input holds prompt and response in one, as the caller rendered them. It is scored as it stands, at its last token,
and scores are raw. Options of vLLM that would change a number are refused by name; those that change none are ignored.
"""

from __future__ import annotations

import base64
import uuid
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Request, Response
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from densereward.errors import InvalidRequest
from densereward.scoring.pipeline import Pipeline
from densereward.server.routes.answering import ERRORS, PreparedRequest, answer_request, body_schema, require_key
from densereward.server.routes.reading import Lists, check_number, read_lists
from densereward.server.service import Service
from densereward_client.wire import Message, RewardsRequest, TokenRewardsRequest

__all__ = ["ClassifyRequest", "PoolingRequest", "router"]

router = APIRouter(dependencies=[Depends(require_key)], responses=ERRORS, tags=["compatibility"])

_IGNORED = ("user", "cache_salt", "truncation_side")
"""Options that change no number; they are accepted and ignored."""

_RENDERED = "dialogues are rendered by the model's own template, closed; give `input`, rendered as you need it"

_REFUSED: dict[str, tuple[str, Any]] = {
    "use_activation": ("scores are raw here", False),
    "activation": ("scores are raw here", False),
    "softmax": ("scores are raw here", False),
    "normalize": ("scores are raw here", False),
    "truncate_prompt_tokens": ("nothing is truncated here", None),
    "padding": ("nothing is padded here", "do_not_pad"),
    "dimensions": ("a score has one", None),
    "embed_dtype": ("scores are float32", "float32"),
    "add_generation_prompt": (_RENDERED, False),
    "continue_final_message": (_RENDERED, False),
    "chat_template": (_RENDERED, None),
    "chat_template_kwargs": (_RENDERED, {}),
    "mm_processor_kwargs": ("only text is read here", None),
    "media_io_kwargs": ("only text is read here", None),
}
"""Options that would change a number: why each is refused, and the value that changes nothing, as null does."""

_FLOAT32 = {"native": "=f4", "little": "<f4", "big": ">f4"}

_Input = str | list[int]


def _inputs(value: Any) -> list[_Input]:
    """One text or list of ids, or several."""
    several = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(several, list) or not several:
        raise ValueError("give a text, a list of token ids, or a list of either that is not empty")
    for index, each in enumerate(several):
        if not (isinstance(each, str) or _is_ids(each)):
            raise ValueError(f"entry {index} is neither a text nor a list of token ids")
    return several


def _one_input(value: Any) -> _Input:
    if isinstance(value, str) or _is_ids(value):
        given: _Input = value
        return given
    raise ValueError("neither a text nor a list of token ids")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_ONE = {"anyOf": [{"type": "string"}, _IDS]}
_SCHEMA = {"anyOf": [*_ONE["anyOf"], {"type": "array", "items": _ONE, "minItems": 1}]}


_LISTS: Lists = {"input": ('[""]', TypeAdapter(Annotated[Any, BeforeValidator(_one_input)]).validate_json)}


class ClassifyRequest(BaseModel):
    """Body of POST /classify: `input` or `messages`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="One of GET /v1/models, the first of them by default.")
    input: Annotated[list[Any], BeforeValidator(_inputs), WithJsonSchema(_SCHEMA)] | None = Field(
        None, description="Prompt and response in one: a text, token ids, or several of either."
    )
    messages: list[Message] | None = Field(
        None, min_length=1, description="A dialogue with its answer, rendered with the model's chat template."
    )
    add_special_tokens: StrictBool | None = Field(
        None,
        description="Whether a text gets what the tokenizer writes round a text and is not there yet, such as a BOS: "
        "by default an `input` does, and `messages` do not. Ids never do.",
    )
    priority: int = Field(
        0, ge=-1000, le=1000, description="Lower numbers are served before all that waits with a higher one."
    )
    request_id: str | None = Field(None, description="Echoed, as part of the answer's id.")

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        return self


class PoolingRequest(ClassifyRequest):
    """Body of POST /pooling."""

    task: Literal["classify", "token_classify"] | None = Field(
        None, description="classify, the default: the score. token_classify: the score after each token."
    )
    encoding_format: Literal["float", "base64"] = "float"
    endianness: Literal["native", "little", "big"] = Field("native", description="Of base64; native is the server's.")


class ClassifyData(BaseModel):
    """One input's score."""

    index: int
    label: str | None = None
    probs: list[float] = Field(description="The raw score, and nothing else.")
    num_classes: int = 1


class PoolingData(BaseModel):
    """One input's score, or that after each of its tokens."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | list[list[float]] | str = Field(
        description="[score], or [[score], ..] one for each token of the input; in base64, their float32 values."
    )


class InputUsage(BaseModel):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class _Response(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    usage: InputUsage


class ClassifyResponse(_Response):
    """Answer of POST /classify."""

    data: list[ClassifyData]


class PoolingResponse(_Response):
    """Answer of POST /pooling."""

    data: list[PoolingData]


@router.post("/classify", responses={200: {"model": ClassifyResponse}}, openapi_extra=body_schema(ClassifyRequest))
async def classify(request: Request) -> Response:
    """Classification as vLLM has it: the raw score of whole texts, in `probs`."""
    return await answer_request(request, partial(_prepare, ClassifyRequest), samples="input")


@router.post("/pooling", responses={200: {"model": PoolingResponse}}, openapi_extra=body_schema(PoolingRequest))
async def pooling(request: Request) -> Response:
    """Pooling as vLLM has it: the raw score of whole texts, or with the task `token_classify` that after each token."""
    return await answer_request(request, partial(_prepare, PoolingRequest), samples="input")


def _prepare(kind: type[ClassifyRequest], service: Service, body: bytes, max_samples: int) -> PreparedRequest:
    received = read_lists(body, kind, _LISTS, max_samples)
    _check_options(received)
    given: list[Any] = [received.messages] if received.input is None else received.input
    check_number(len(given), max_samples)
    request = _request(received)
    model = service.pipeline_for(request)
    if not isinstance(model, Pipeline):
        raise InvalidRequest(
            "an ensemble's models each read a text in tokens of their own; ask one of them, or POST /rewards",
            code="invalid_ensemble",
            field="model",
        )
    special = received.messages is None if received.add_special_tokens is None else received.add_special_tokens
    samples = [model.preassembled(each, special_tokens=special) for each in given]
    return PreparedRequest(model, model.prepare(request, samples), partial(_write, received))


def _check_options(received: ClassifyRequest) -> None:
    """Refuse options that would change a number, and unknown ones."""
    for name, value in (received.model_extra or {}).items():
        if name in _IGNORED:
            continue
        if name not in _REFUSED:
            raise InvalidRequest(f"{name}: Extra inputs are not permitted", field=name)
        reason, neutral = _REFUSED[name]
        if value is not None and (type(value), value) != (type(neutral), neutral):
            raise InvalidRequest(f"{name} cannot be had: {reason}", code="unsupported_option", field=name)


def _request(received: ClassifyRequest) -> RewardsRequest:
    """The request without its samples, which travel beside it."""
    if _wants_prefixes(received):
        return TokenRewardsRequest.model_construct(
            model=received.model, samples=[], priority=received.priority, methods=["sparse"], include=["prefix_scores"]
        )
    return RewardsRequest.model_construct(model=received.model, samples=[], priority=received.priority)


def _wants_prefixes(received: ClassifyRequest) -> bool:
    return isinstance(received, PoolingRequest) and received.task == "token_classify"


def _write(received: ClassifyRequest, answer: dict[str, Any]) -> bytes:
    data: list[Any]
    if isinstance(received, PoolingRequest):
        kind, data = "pooling", [_pooled(received, item) for item in answer["data"]]
    else:
        kind, data = "classify", [_classified(item) for item in answer["data"]]
    tokens = answer["usage"]["prompt_tokens"] + answer["usage"]["response_tokens"]
    return orjson.dumps(
        {
            "id": f"{kind}-{received.request_id or uuid.uuid4().hex}",
            "object": "list",
            "created": answer["created"],
            "model": answer["model"],
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
    )


def _classified(item: dict[str, Any]) -> dict[str, Any]:
    return {"index": item["index"], "label": None, "probs": [item["reward"]], "num_classes": 1}


def _pooled(received: PoolingRequest, item: dict[str, Any]) -> orjson.Fragment:
    """An item's bytes, written one by one: an encoder blocks the event loop until it is done, in any thread."""
    scores = item["prefix_scores"][:, None] if _wants_prefixes(received) else np.array([item["reward"]], np.float32)
    if received.encoding_format == "base64":
        scores = base64.b64encode(scores.astype(_FLOAT32[received.endianness]).tobytes()).decode()
    content = {"index": item["index"], "object": "pooling", "data": scores}
    return orjson.Fragment(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))
