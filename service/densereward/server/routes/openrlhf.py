"""POST /get_reward: OpenRLHF's remote reward protocol, for trainers that are pointed at another server by its URL.

OpenRLHF sends its prompt as text, and as the query what its tokenizer makes of the prompt's and the response's ids,
special tokens kept. It reads `rewards`, `scores` and `extra_logs`, and makes a tensor of each value: so an array in
`extra_logs` has one axis beside that of the queries, and words stand outside of it. That trainer, as it is, logs the
mean of every entry and stops at a list of several numbers: one that does not look for token rewards itself turns them
off, in its URL, since what it sends is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from starlette.datastructures import QueryParams

from densereward.errors import InvalidRequest
from densereward.scoring.ensemble import EnsemblePipeline
from densereward.scoring.pipeline import Scorer
from densereward.server.pydantic_errors import errors_in, invalid_request
from densereward.server.routes.answering import ERRORS, PreparedRequest, answer_request, body_schema, require_key
from densereward.server.routes.reading import Lists, check_number, read_lists
from densereward.server.service import Service
from densereward_client.wire import MethodRequest, RewardsRequest, Sample, Spans, TokenRewardsRequest

__all__ = ["GetRewardRequest", "router"]

router = APIRouter(dependencies=[Depends(require_key)], responses=ERRORS, tags=["compatibility"])


class GetRewardRequest(BaseModel):
    """Body of POST /get_reward. OpenRLHF sends the first three fields; the others ask for more."""

    model_config = ConfigDict(extra="forbid")

    query: list[str] = Field(min_length=1, description="Prompt and response as one text each.")
    prompts: list[str] = Field(description="What each query begins with; the rest of it is the response.")
    labels: Any = Field(None, description="Not read.")
    model: str | None = Field(None, description="One of GET /v1/models. Also in the URL.")
    token_rewards: StrictBool = Field(
        True, description="False: sequence rewards only, for OpenRLHF as it is. Also in the URL."
    )
    method: str | MethodRequest | None = Field(
        None, description="Of token rewards; by default the server's. A name may also stand in the URL."
    )
    response_spans: list[Spans] | None = Field(
        None, description="For each query, [start, end) of the policy's tokens in the response, in UTF-8 bytes."
    )
    finished: list[StrictBool] | None = Field(
        None, description="For each query; false: cut by length, so no closing tokens are scored. By default all true."
    )
    eos: str | None = Field(
        None,
        min_length=1,
        description="Instead of `finished`: the policy's end of sequence, as text. A response that ends with it, once "
        "or more, is finished, and the reward model's own end is read in its place; one that ends otherwise was cut by "
        "length. Also in the URL.",
    )


class _InURL(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    token_rewards: bool = True
    method: str | None = None
    eos: str | None = Field(None, min_length=1)


_LISTS: Lists = {
    "query": ('[""]', TypeAdapter(str).validate_json),
    "prompts": ("[]", TypeAdapter(str).validate_json),
    "labels": ("null", TypeAdapter(Any).validate_json),
    "response_spans": ("[]", TypeAdapter(Spans).validate_json),
    "finished": ("[]", TypeAdapter(StrictBool).validate_json),
}


class ExtraLogs(BaseModel):
    """Empty where no token rewards were asked for."""

    token_rewards: list[list[float]] | None = Field(
        None, description="For each query, one number for each of `response_spans`, or of `token_spans`."
    )
    baseline: list[float] | None = Field(None, description="What the sum leaves out: with it, the sum is the reward.")
    token_spans: list[list[int]] | None = Field(
        None,
        description="Without `response_spans`: the reward model's tokens in the response, in UTF-8 bytes; for each "
        "query, start and end in turn.",
    )


class GetRewardResponse(BaseModel):
    """Answer of POST /get_reward: one number for each query, and `scores` are the same numbers."""

    rewards: list[float]
    scores: list[float]
    extra_logs: ExtraLogs
    warnings: list[list[str]] = Field(description="For each query, `code: message` each.")


_IN_URL = {
    "parameters": [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in _InURL.model_json_schema()["properties"].items()
    ]
}


@router.post(
    "/get_reward",
    responses={200: {"model": GetRewardResponse}},
    openapi_extra=body_schema(GetRewardRequest) | _IN_URL,
)
async def get_reward(request: Request) -> Response:
    """OpenRLHF's remote reward protocol: `--reward.remote_url http://HOST:PORT/get_reward?token_rewards=false`."""
    return await answer_request(request, partial(_prepare, request.query_params), samples="query")


def _prepare(in_url: QueryParams, service: Service, body: bytes, max_samples: int) -> PreparedRequest:
    received = _with_url(read_lists(body, GetRewardRequest, _LISTS, max_samples), in_url)
    check_number(len(received.query), max_samples)
    _check(received)
    request = _request(received)
    scorer: Scorer = service.pipeline_for(request)
    if isinstance(scorer, EnsemblePipeline) and received.token_rewards and received.response_spans is None:
        raise InvalidRequest(
            "an ensemble has no tokens of its own: give `response_spans`, or `token_rewards` = false",
            code="invalid_ensemble",
            field="response_spans",
        )
    samples = [_sample(received, index, scorer.closing_text or "") for index in range(len(received.query))]
    return PreparedRequest(scorer, scorer.prepare(request, samples), _write)


def _with_url(received: GetRewardRequest, in_url: QueryParams) -> GetRewardRequest:
    """What the URL says holds where the body does not say otherwise."""
    names = [name for name, _ in in_url.multi_items()]
    for name in (name for name in in_url if names.count(name) > 1):
        raise InvalidRequest(f"{name} stands in the URL {names.count(name)} times; give it once", field=name)
    try:
        said = _InURL.model_validate(dict(in_url)).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise invalid_request(errors_in(error)) from error
    return received.model_copy(update={name: said[name] for name in said.keys() - received.model_fields_set})


def _check(received: GetRewardRequest) -> None:
    """Refuse lists that are not one entry for each query, and what would be ignored."""
    for name in ("prompts", "response_spans", "finished"):
        values = getattr(received, name)
        if values is not None and len(values) != len(received.query):
            raise InvalidRequest(
                f"{name} has {len(values)} entries for {len(received.query)} in query",
                code="length_mismatch",
                field=name,
                given=len(values),
                expected=len(received.query),
            )
    for name in ("method", "response_spans"):
        if not received.token_rewards and getattr(received, name) is not None:
            raise InvalidRequest(f"{name} is about token rewards, and token_rewards is false", field=name)
    if received.eos is not None and received.finished is not None:
        raise InvalidRequest("give either eos or finished: both say which responses were cut by length", field="eos")


def _sample(received: GetRewardRequest, index: int, closing: str) -> Sample:
    """One query, for a model that reads its score behind `closing`."""
    query, prompt = received.query[index], received.prompts[index]
    if not query.startswith(prompt):
        raise InvalidRequest(
            f"query[{index}] does not begin with prompts[{index}], so there is no telling where the response begins; "
            "send the prompt as it stands in the query, not shortened and with its special tokens",
            code="prompt_mismatch",
            field="query",
            index=index,
        )
    response = query[len(prompt) :]
    spans = None if received.response_spans is None else received.response_spans[index]
    finished = True if received.finished is None else received.finished[index]
    if received.eos is not None:
        finished = response.endswith(received.eos)
        response, spans = _closed(response, spans, received.eos, closing)
    # All of it was checked as the request was read, and checking many spans again would hold the interpreter.
    return Sample.model_construct(prompt=prompt, response=response, response_spans=spans, finished=finished)


def _closed(response: str, spans: Spans | None, eos: str, closing: str) -> tuple[str, Spans | None]:
    """The response with the model's own end in the policy's place: what it adds is the first EOS's reward.

    An EOS that the model closes with itself stays. Without spans the EOS has no reward of its own, and any other is
    just left out, so that the spans of the answer are places in the text that was sent.
    """
    cut = len(response)
    while response.endswith(eos, 0, cut):
        cut -= len(eos)
    ending = eos if closing.startswith(eos) else closing
    if cut == len(response) or response[cut:] == ending:
        return response, spans
    content = response[:cut]
    if spans is None:
        return content + (eos if ending == eos else ""), None
    size, end = len(response.encode()), len(content.encode())
    if not _in_order(spans, size):
        return response, spans  # to be refused as it stands
    after = end + len(ending.encode())
    moved: list[tuple[int, int]] = []
    for start, stop in spans:
        if stop <= end:
            moved.append((start, stop))
        elif start < end:
            moved.append((start, end))
        else:
            moved.append((after if moved and moved[-1][1] == after else end, after))
    return content + ending, moved


def _in_order(spans: Sequence[tuple[int, int]], size: int) -> bool:
    offsets = [offset for span in spans for offset in span]
    return all(one <= other for one, other in pairwise([0, *offsets, size]))


def _request(received: GetRewardRequest) -> RewardsRequest:
    """The request without its samples, which travel beside it."""
    if not received.token_rewards:
        return RewardsRequest.model_construct(model=received.model, samples=[])
    return TokenRewardsRequest.model_construct(
        model=received.model,
        samples=[],
        methods=None if received.method is None else [received.method],
        include=["spans"] if received.response_spans is None else [],
    )


def _write(answer: dict[str, Any]) -> bytes:
    items = answer["data"]
    rewards = [item["reward"] for item in items]
    warnings = [item["warnings"] for item in items]
    extra_logs = {name: values for name, values in _extra_logs(items) if values}
    return orjson.dumps({"rewards": rewards, "scores": rewards, "extra_logs": extra_logs, "warnings": warnings})


def _extra_logs(items: list[dict[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    yield "token_rewards", [_in_bytes(*item["token_rewards"].values()) for item in items if "token_rewards" in item]
    yield "baseline", [baseline for item in items for baseline in item.get("baseline", {}).values()]
    yield "token_spans", [_in_bytes([at for span in item["spans"] for at in span]) for item in items if "spans" in item]


def _in_bytes(values: Any) -> orjson.Fragment:
    """List by list: an encoder holds the interpreter as long as a parser does."""
    return orjson.Fragment(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
