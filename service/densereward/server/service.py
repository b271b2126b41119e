"""The running server's state: what is loaded, whether it takes requests, how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from densereward.checks.loading import load, load_pair
from densereward.checks.precision import finding_of, measure_precision
from densereward.engines.base import Engine, StreamingEngine
from densereward.errors import EngineDied, InvalidRequest, ModelError, NotReady, UnknownModel
from densereward.methods import METHODS
from densereward.metrics import Metrics
from densereward.scheduling.batch_size import measure_batch_size
from densereward.scheduling.handover import batcher_for
from densereward.scoring.ensemble import EnsemblePipeline
from densereward.scoring.pair import PairedPipeline, card_beside
from densereward.scoring.pipeline import Pipeline
from densereward.settings import PAIR, ModelSettings
from densereward.tokenization.align import Aligner
from densereward_client.wire import Ensemble, ModelCard, RewardsRequest, TokenRewardsRequest

__all__ = ["Service"]

logger = logging.getLogger("densereward")

_LOADING = NotReady("the model is being loaded", retry_after=5.0)


class Service:
    """Owns the models from loading to draining.

    Args:
        settings: which models, and their limits.
        on_death: called when an engine has ended by itself; `failure` then says so.
        repeatable: the same samples in the same order get the same digits again. A number's last digits may depend on
            its batch, so no batch size is measured and no prompt is cached.
    """

    def __init__(
        self, settings: ModelSettings, *, on_death: Callable[[], None] = lambda: None, repeatable: bool = False
    ) -> None:
        self.settings = settings.model_copy(update={"prompt_cache_bytes": 0}) if repeatable else settings
        self._repeatable = repeatable
        self._on_death = on_death
        self.metrics = Metrics()
        self.draining = False
        self.failure: Exception | None = None
        self._pipelines: dict[str, Pipeline] = {}
        self._pair: Pipeline | None = None
        self._started = False

    async def start(self) -> None:
        """Load, check, and take requests.

        Raises:
            ModelError: the model cannot be loaded, or would answer wrong numbers.
        """
        try:
            for name, source in self.settings.sources.items():
                if not self.draining:
                    self._pipelines[name] = await self._load(name, partial(load, self.settings, source))
            self._check_separator()
            if self.settings.pair is not None and not self.draining:
                self._pair = await self._load(PAIR, partial(load_pair, self.settings))
        except Exception as error:  # kept for the log and /ready, and raised
            self.failure = error
            raise
        if not self.draining:
            self._started = True
            self.metrics.ready(True)

    def _check_separator(self) -> None:
        """Refuse a separator that no loaded model uses."""
        heads = {pipeline.card.head for pipeline in self._pipelines.values()}
        if self.settings.step_separator is not None and "token_classifier" not in heads and not self.draining:
            raise ModelError("--step-separator is for token classifiers, and none is served")

    async def _load(self, name: str, loading: Callable[[], tuple[Engine, Aligner]]) -> Pipeline:
        """Load one model."""
        engine, aligner = await asyncio.to_thread(loading)
        precision = None if self._repeatable else await asyncio.to_thread(measure_precision, engine, aligner)
        if (finding := finding_of(precision)).status != "ok":
            logger.warning("%s: %s", name, finding.text)
        batch_tokens = await asyncio.to_thread(self._batch_tokens, engine)
        batcher = batcher_for(
            engine,
            max_batch_tokens=batch_tokens,
            max_queue_tokens=self.settings.max_queue_tokens,
            metrics=self.metrics,
            on_death=self._died,
        )
        if isinstance(engine, StreamingEngine):
            self.metrics.engine(engine.metrics)
            if self._repeatable:
                logger.warning("%s: its engine decides what runs together: last digits may differ between runs", name)
        self.metrics.batch_size(name, batch_tokens)
        if not self.draining:
            facts = engine.facts
            where = f"{facts.family}, {facts.dtype} on {facts.device}"
            logger.info("ready: %s (%s; %d tokens a pass)", name, where, batch_tokens)
        return Pipeline(name, engine, aligner, batcher, self.metrics, precision)

    def _batch_tokens(self, engine: Engine) -> int:
        """What one forward pass may hold, in tokens' worth."""
        chosen = self.settings.max_batch_tokens is not None or isinstance(engine, StreamingEngine)
        if not chosen and not self._repeatable and not self.draining:
            return measure_batch_size(engine)
        return engine.facts.batch_tokens

    def _died(self, error: EngineDied) -> None:
        """Take no more requests, for none of the models."""
        logger.error(error.message)
        self.failure = error
        self.metrics.ready(False)
        self._on_death()

    def drain(self) -> None:
        """Take no new requests; those under way are finished. Takes no lock, so that a signal handler may call it."""
        self.draining = True

    async def stop(self) -> None:
        """Finish what waits and free the device."""
        self.drain()
        self.metrics.ready(False)
        loaded = [*self._pipelines.values(), *([self._pair] if self._pair else [])]
        await asyncio.gather(*(pipeline.close() for pipeline in loaded))

    @property
    def cards(self) -> list[ModelCard]:
        """What each loaded model is and can serve, the pair beside it included.

        Raises:
            NotReady: as `pipelines`.
        """
        if self._pair is None:
            return [pipeline.card for pipeline in self.pipelines]
        pair = self._pair.card
        return [each.card if each is self._pair else card_beside(each.card, pair) for each in self.pipelines]

    @property
    def pipelines(self) -> list[Pipeline]:
        """The loaded models, in the order they were given, and the pair where it is a reward model of its own.

        Raises:
            NotReady: they are still being loaded, or the server is shutting down.
            EngineDied: one of their engines has ended by itself.
        """
        if self.draining:
            raise NotReady("the server is shutting down; try another one", retry_after=1.0, code="draining")
        if isinstance(self.failure, EngineDied):
            raise EngineDied(self.failure.message, retry_after=self.failure.retry_after)
        if not self._started:
            raise NotReady(_LOADING.message, retry_after=_LOADING.retry_after)
        pair = [self._pair] if self._pair and "reference" in self.settings.pair_sources else []
        return [*self._pipelines.values(), *pair]

    @property
    def pipeline(self) -> Pipeline:
        """The first of them.

        Raises:
            NotReady: as `pipelines`.
        """
        return self.pipelines[0]

    def pipeline_for(self, request: RewardsRequest) -> Pipeline | EnsemblePipeline | PairedPipeline:
        """What answers a request: a model by name, the first one where it names none, or an ensemble.

        Where a method takes a pair of language models, the pair answers beside the model.

        Raises:
            NotReady: as `pipelines`.
            UnknownModel: no such model is served.
            InvalidRequest: one model twice in an ensemble, or `ensemble` for one model.
        """
        named = self.settings.ensembles
        if isinstance(request.model, str) and request.model in named:
            names, how = named[request.model]
            asked = (request.ensemble or Ensemble()).model_copy(update={"how": how})
            if (
                request.ensemble is not None
                and "how" in request.ensemble.model_fields_set
                and request.ensemble.how != how
            ):
                raise InvalidRequest(
                    f"the ensemble {request.model!r} is made by {how!r}; give a list of models to choose another way",
                    code="invalid_ensemble",
                    field="ensemble",
                )
            self._refuse_pair_methods(request)
            return EnsemblePipeline(request.model, [self._named(name) for name in names], asked)
        if isinstance(request.model, list):
            members = [self._named(name) for name in request.model]
            if len({member.name for member in members}) < len(members):
                raise InvalidRequest("an ensemble has a model twice", code="invalid_ensemble", field="model")
            self._refuse_pair_methods(request)
            name = "+".join(member.name for member in members)
            return EnsemblePipeline(name, members, request.ensemble or Ensemble())
        if request.ensemble is not None:
            raise InvalidRequest(
                "`ensemble` needs several models: give `model` as a list", code="invalid_ensemble", field="ensemble"
            )
        return self._with_pair(self._named(request.model), request)

    def _with_pair(self, model: Pipeline, request: RewardsRequest) -> Pipeline | PairedPipeline:
        if self._pair is None or model is self._pair or not _pair_methods(request):
            return model
        return PairedPipeline(model, self._pair)

    def _refuse_pair_methods(self, request: RewardsRequest) -> None:
        if self._pair is not None and (names := _pair_methods(request)):
            raise InvalidRequest(
                f"an ensemble has no pair beside it; ask one of its models for {', '.join(names)}",
                code="invalid_ensemble",
                field="methods",
            )

    def _named(self, name: str | None) -> Pipeline:
        """A model by its name; None is the first, and so is "default" where none is called so."""
        pipelines = {pipeline.name: pipeline for pipeline in self.pipelines}
        if name is None or (name == "default" and name not in pipelines):
            return self.pipeline
        if name not in pipelines:
            there = ", ".join(map(repr, [*pipelines, *self.settings.ensembles]))
            raise UnknownModel(f"no model named {name!r} is served here; there is {there}", field="model")
        return pipelines[name]


def _pair_methods(request: RewardsRequest) -> list[str]:
    """Methods of a request that a pair gives."""
    if not isinstance(request, TokenRewardsRequest):
        return []
    asked = [each.name for each in request.method_requests("red") if each.name in METHODS]
    return [name for name in asked if METHODS[name].by_pair]
