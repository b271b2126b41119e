"""The running server's state: what is loaded, whether it takes requests, how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from densereward.align import Aligner
from densereward.batcher import Batcher
from densereward.budget import measure_budget
from densereward.engines import ENGINES
from densereward.engines.base import Engine
from densereward.ensemble import EnsemblePipeline
from densereward.errors import InvalidRequest, ModelError, NotReady, UnknownModel
from densereward.metrics import Metrics
from densereward.pipeline import Pipeline
from densereward.selfcheck import self_check
from densereward.settings import ModelSettings
from densereward_client.wire import Ensemble, RewardsRequest

__all__ = ["Service", "load"]

logger = logging.getLogger("densereward")

_LOADING = NotReady("the model is being loaded", retry_after=5.0)


def load(settings: ModelSettings, source: str | None = None) -> tuple[Engine, Aligner]:
    """Load a model and its tokenizer, and check both. Blocks for as long as that takes.

    Args:
        settings: how it is to run.
        source: folder or hub id; by default the settings' first.

    Raises:
        ModelError: the model cannot be loaded, or would answer wrong numbers.
    """
    source = source or next(iter(settings.sources.values()))
    if source == "default":
        from densereward.default_model import ensure_default_model

        source = str(ensure_default_model())
    elif source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ModelError(f"there is no folder {source}")
    engine: Engine = ENGINES["torch"].load(
        source,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        longest=settings.max_length,
        batch_tokens=settings.max_batch_tokens,
        prompt_cache=settings.prompt_cache_bytes,
    )
    tokenizer = _tokenizer(source, settings.revision)
    aligner = Aligner(tokenizer, engine.facts.max_length, engine.facts.vocabulary_size)
    self_check(engine)
    return engine, aligner


def _tokenizer(source: str, revision: str | None) -> object:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {source}: {error}") from error


class Service:
    """Owns the models from loading to draining.

    Args:
        settings: which models, and their limits.
        repeatable: the same samples in the same order get the same digits again. A number's last digits may depend on
            its batch, so no budget is measured and no prompt is kept.
    """

    def __init__(self, settings: ModelSettings, *, repeatable: bool = False) -> None:
        self.settings = settings.model_copy(update={"prompt_cache_bytes": 0}) if repeatable else settings
        self._repeatable = repeatable
        self.metrics = Metrics()
        self.draining = False
        self.failure: Exception | None = None
        self._pipelines: dict[str, Pipeline] = {}
        self._started = False

    async def start(self) -> None:
        """Load, check, and take requests.

        Raises:
            ModelError: the model cannot be loaded, or would answer wrong numbers.
        """
        try:
            for name, source in self.settings.sources.items():
                if not self.draining:
                    await self._add(name, source)
        except Exception as error:  # kept for whoever watches the start, and raised on
            self.failure = error
            raise
        if not self.draining:
            self._started = True
            self.metrics.ready(True)

    async def _add(self, name: str, source: str) -> None:
        """Load one model."""
        engine, aligner = await asyncio.to_thread(load, self.settings, source)
        budget = await asyncio.to_thread(self._budget, engine)
        if self.draining:
            engine.close()
            return
        batcher = Batcher(
            engine,
            max_batch_tokens=budget,
            max_queue_tokens=self.settings.max_queue_tokens,
            metrics=self.metrics,
        )
        self._pipelines[name] = Pipeline(name, engine, aligner, batcher, self.metrics)
        self.metrics.budget(name, budget)
        facts = engine.facts
        logger.info("ready: %s (%s, %s on %s; %d tokens a pass)", name, facts.family, facts.dtype, facts.device, budget)

    def _budget(self, engine: Engine) -> int:
        """What one forward pass may hold, in tokens' worth."""
        if self.settings.max_batch_tokens is None and not self._repeatable and not self.draining:
            return measure_budget(engine)
        return engine.facts.batch_tokens

    def drain(self) -> None:
        """Take no new requests; those under way are finished. Takes no lock, so that a signal handler may call it."""
        self.draining = True

    async def stop(self) -> None:
        """Finish what waits and free the device."""
        self.drain()
        self.metrics.ready(False)
        await asyncio.gather(*(pipeline.close() for pipeline in self._pipelines.values()))

    @property
    def pipelines(self) -> list[Pipeline]:
        """The loaded models, in the order they were given.

        Raises:
            NotReady: they are still being loaded, or the server is shutting down.
        """
        if self.draining:
            raise NotReady("the server is shutting down; try another one", retry_after=1.0, code="draining")
        if not self._started:
            raise NotReady(_LOADING.message, retry_after=_LOADING.retry_after)
        return list(self._pipelines.values())

    @property
    def pipeline(self) -> Pipeline:
        """The first of them.

        Raises:
            NotReady: as `pipelines`.
        """
        return self.pipelines[0]

    def pipeline_for(self, request: RewardsRequest) -> Pipeline | EnsemblePipeline:
        """What answers a request: a model by name, the first one where it names none, or several together.

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
            return EnsemblePipeline(request.model, [self._named(name) for name in names], asked)
        if isinstance(request.model, list):
            members = [self._named(name) for name in request.model]
            if len({member.name for member in members}) < len(members):
                raise InvalidRequest("an ensemble has a model twice", code="invalid_ensemble", field="model")
            name = "+".join(member.name for member in members)
            return EnsemblePipeline(name, members, request.ensemble or Ensemble())
        if request.ensemble is not None:
            raise InvalidRequest(
                "`ensemble` needs several models: give `model` as a list", code="invalid_ensemble", field="ensemble"
            )
        return self._named(request.model)

    def _named(self, name: str | None) -> Pipeline:
        """A model by its name; None is the first, and so is "default" where none is called so."""
        pipelines = {pipeline.name: pipeline for pipeline in self.pipelines}
        if name is None or (name == "default" and name not in pipelines):
            return self.pipeline
        if name not in pipelines:
            there = ", ".join(map(repr, [*pipelines, *self.settings.ensembles]))
            raise UnknownModel(f"no model named {name!r} is served here; there is {there}", field="model")
        return pipelines[name]
