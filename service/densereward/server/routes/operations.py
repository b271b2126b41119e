"""The routes for operators: what is served, is it alive, is it ready, how busy is it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from densereward.methods import METHODS
from densereward.methods.describe import describe
from densereward.server.service import Service
from densereward_client.wire import EnsembleCard, ErrorBody, MethodList, ModelList

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/v1/models", responses={503: {"model": ErrorBody}})
async def models(request: Request) -> ModelList:
    """The models served, how each reads text, and which methods it can serve."""
    service: Service = request.app.state.service
    named = service.settings.ensembles.items()
    ensembles = [EnsembleCard(id=name, models=models, how=how) for name, (models, how) in named]
    return ModelList(data=service.cards, ensembles=ensembles)


@router.get("/v1/methods")
async def methods() -> MethodList:
    """Every method: where it is from, its equation, what it sums to, when to use it, its traps, cost, parameters."""
    return MethodList(data=[describe(name) for name in METHODS])


@router.get("/health")
async def health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "alive"}


@router.get("/ready", responses={503: {"model": ErrorBody}})
async def ready(request: Request) -> dict[str, Any]:
    """The models are loaded and passed their self-checks, and requests are taken; `model` answers by default."""
    service: Service = request.app.state.service
    names = [pipeline.name for pipeline in service.pipelines]
    return {"status": "ready", "model": names[0], "models": names}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
