"""The routes that score: POST /token_rewards and POST /rewards."""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from densereward.scoring.pipeline import Scorer
from densereward.server.routes.answering import ERRORS, PreparedRequest, answer_request, body_schema, require_key
from densereward.server.routes.reading import read
from densereward.server.service import Service
from densereward_client.wire import RewardsRequest, RewardsResponse, TokenRewardsRequest, TokenRewardsResponse

__all__ = ["router"]

router = APIRouter(dependencies=[Depends(require_key)], responses=ERRORS, tags=["scoring"])


@router.post(
    "/token_rewards", responses={200: {"model": TokenRewardsResponse}}, openapi_extra=body_schema(TokenRewardsRequest)
)
async def token_rewards(request: Request) -> Response:
    """Sequence rewards, and the same rewards given to the response's tokens."""
    return await answer_request(request, partial(_prepare, TokenRewardsRequest))


@router.post("/rewards", responses={200: {"model": RewardsResponse}}, openapi_extra=body_schema(RewardsRequest))
async def rewards(request: Request) -> Response:
    """Sequence rewards only."""
    return await answer_request(request, partial(_prepare, RewardsRequest))


def _prepare(kind: type[RewardsRequest], service: Service, body: bytes, max_samples: int) -> PreparedRequest:
    request, samples = read(body, kind, max_samples)
    scorer: Scorer = service.pipeline_for(request)
    return PreparedRequest(scorer, scorer.prepare(request, samples), _write)


def _write(answer: dict[str, Any]) -> bytes:
    """The answer's bytes, item by item: an encoder blocks the event loop until it is done, in any thread."""
    items = [orjson.Fragment(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY)) for item in answer["data"]]
    return orjson.dumps(answer | {"data": items})
