"""The running server's state: what is loaded, whether it takes requests, how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from densereward.align import Aligner
from densereward.batcher import Batcher
from densereward.budget import measure_budget
from densereward.checks import ALLOWABLE, examine, refuse
from densereward.engines import ENGINES
from densereward.engines.base import Engine
from densereward.ensemble import EnsemblePipeline
from densereward.errors import InvalidRequest, ModelError, NotReady, UnknownModel
from densereward.methods import METHODS
from densereward.metrics import Metrics
from densereward.paired import PairedPipeline, card_beside
from densereward.pipeline import Pipeline
from densereward.settings import PAIR, ModelSettings
from densereward_client.wire import Ensemble, ModelCard, RewardsRequest, TokenRewardsRequest

__all__ = ["Service", "load", "load_pair", "load_unchecked"]

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
    engine, aligner = load_unchecked(settings, source)
    with _as_model_error(source):
        _examine(engine, aligner, settings, source)
    return engine, aligner


def load_unchecked(settings: ModelSettings, source: str | None = None) -> tuple[Engine, Aligner]:
    """The same before anything is looked at but what loading itself shows.

    Raises:
        ModelError: the model cannot be loaded.
    """
    source = source or next(iter(settings.sources.values()))
    if source == "default":
        from densereward.default_model import ensure_default_model

        source = str(ensure_default_model())
    _check_folder(source)
    with _as_model_error(source):
        return _load(settings, source)


def _examine(engine: Engine, aligner: Aligner, settings: ModelSettings, source: str) -> None:
    if unknown := sorted(set(settings.allow) - set(ALLOWABLE)):
        raise ModelError(f"--allow {', '.join(unknown)}: only {', '.join(ALLOWABLE)} can be allowed")
    for finding in refuse(examine(engine, aligner, settings.allow)):
        if finding.status != "ok":
            logger.warning("%s: %s: %s", source, finding.name, finding.text)


def _load(settings: ModelSettings, source: str) -> tuple[Engine, Aligner]:
    engine: Engine = ENGINES["torch"].load(
        source,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        longest=settings.max_length,
        batch_tokens=settings.max_batch_tokens,
        prompt_cache=settings.prompt_cache_bytes,
        separator=settings.step_separator,
    )
    from densereward.engines.torch.adapters import base_of

    try:
        tokenizer = _tokenizer(source, settings.revision)
    except ModelError:
        if (base := base_of(source, settings.revision)) == source:
            raise
        tokenizer = _tokenizer(base, None)
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
    return engine, _aligner(tokenizer, engine)


def load_pair(settings: ModelSettings) -> tuple[Engine, Aligner]:
    """Load a policy and its reference, or a policy alone, and check each. Blocks for as long as that takes.

    Raises:
        ModelError: a model cannot be loaded, or would answer wrong numbers, or the two do not read text alike.
    """
    with _as_model_error(str(settings.pair)):
        return _load_pair(settings)


@contextmanager
def _as_model_error(source: str) -> Iterator[None]:
    """A model's own code can fail in any way while it loads; the operator needs one message.

    Raises:
        ModelError: something failed.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        logger.debug("loading %s", source, exc_info=True)
        raise ModelError(f"{source} cannot be served: {type(error).__name__}: {error}") from error


def _load_pair(settings: ModelSettings) -> tuple[Engine, Aligner]:
    sources = settings.pair_sources
    engines: list[Any] = []
    for source in sources.values():
        _check_folder(source)
        engine: Engine = ENGINES["language_model"].load(
            source,
            device=settings.device,
            dtype=settings.dtype,
            longest=settings.max_length,
            batch_tokens=settings.max_batch_tokens,
            prompt_cache=settings.prompt_cache_bytes // len(sources),
        )
        _examine(engine, _aligner(_tokenizer(source, None), engine), settings, source)
        engines.append(engine)
    pair: Engine = ENGINES["pair"](*engines) if len(engines) > 1 else engines[0]
    aligners = [_aligner(_tokenizer(source, None), pair) for source in sources.values()]
    if len({aligner.vocabulary.fingerprint for aligner in aligners}) > 1:
        raise ModelError(f"the tokenizers of {' and '.join(sources.values())} differ; a pair has one")
    return pair, aligners[0]


def _check_folder(source: str) -> None:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ModelError(f"there is no folder {source}")


def _aligner(tokenizer: object, engine: Engine) -> Aligner:
    facts = engine.facts
    return Aligner(
        tokenizer,
        facts.max_length,
        facts.vocabulary_size,
        needs_prompt=facts.needs_prompt,
        unit=facts.unit,
        cut=facts.cut,
        separator=facts.separator,
    )


def _tokenizer(source: str, revision: str | None) -> Any:
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
                    self._pipelines[name] = await self._started_up(name, partial(load, self.settings, source))
            self._check_separator()
            if self.settings.pair is not None and not self.draining:
                self._pair = await self._started_up(PAIR, partial(load_pair, self.settings))
        except Exception as error:  # kept for whoever watches the start, and raised on
            self.failure = error
            raise
        if not self.draining:
            self._started = True
            self.metrics.ready(True)

    def _check_separator(self) -> None:
        """A setting that no model heeds would leave the operator in the belief that one does."""
        heads = {pipeline.card.head for pipeline in self._pipelines.values()}
        if self.settings.step_separator is not None and "token_classifier" not in heads and not self.draining:
            raise ModelError("--step-separator is for token classifiers, and none is served")

    async def _started_up(self, name: str, loading: Callable[[], tuple[Engine, Aligner]]) -> Pipeline:
        """Load one model."""
        engine, aligner = await asyncio.to_thread(loading)
        budget = await asyncio.to_thread(self._budget, engine)
        batcher = Batcher(
            engine,
            max_batch_tokens=budget,
            max_queue_tokens=self.settings.max_queue_tokens,
            metrics=self.metrics,
        )
        self.metrics.budget(name, budget)
        if not self.draining:
            facts = engine.facts
            where = f"{facts.family}, {facts.dtype} on {facts.device}"
            logger.info("ready: %s (%s; %d tokens a pass)", name, where, budget)
        return Pipeline(name, engine, aligner, batcher, self.metrics)

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
        """
        if self.draining:
            raise NotReady("the server is shutting down; try another one", retry_after=1.0, code="draining")
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
        """What answers a request: a model by name, the first one where it names none, or several together.

        Where a method is one of a pair's, the pair is there beside the model.

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
            self._refuse_pairs_methods(request)
            return EnsemblePipeline(request.model, [self._named(name) for name in names], asked)
        if isinstance(request.model, list):
            members = [self._named(name) for name in request.model]
            if len({member.name for member in members}) < len(members):
                raise InvalidRequest("an ensemble has a model twice", code="invalid_ensemble", field="model")
            self._refuse_pairs_methods(request)
            name = "+".join(member.name for member in members)
            return EnsemblePipeline(name, members, request.ensemble or Ensemble())
        if request.ensemble is not None:
            raise InvalidRequest(
                "`ensemble` needs several models: give `model` as a list", code="invalid_ensemble", field="ensemble"
            )
        return self._beside_pair(self._named(request.model), request)

    def _beside_pair(self, model: Pipeline, request: RewardsRequest) -> Pipeline | PairedPipeline:
        if self._pair is None or model is self._pair or not _pairs_methods(request):
            return model
        return PairedPipeline(model, self._pair)

    def _refuse_pairs_methods(self, request: RewardsRequest) -> None:
        if self._pair is not None and (names := _pairs_methods(request)):
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


def _pairs_methods(request: RewardsRequest) -> list[str]:
    """Methods of a request that a pair gives."""
    if not isinstance(request, TokenRewardsRequest):
        return []
    asked = [each.name for each in request.method_requests("red") if each.name in METHODS]
    return [name for name in asked if METHODS[name].by_pair]
