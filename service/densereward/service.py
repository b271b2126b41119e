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
from densereward.errors import ModelError, NotReady, UnknownModel
from densereward.metrics import Metrics
from densereward.pipeline import Pipeline
from densereward.selfcheck import self_check
from densereward.settings import ModelSettings

__all__ = ["Service", "load"]

logger = logging.getLogger("densereward")

_LOADING = NotReady("the model is being loaded", retry_after=5.0)


def load(settings: ModelSettings) -> tuple[Engine, Aligner]:
    """Load a model and its tokenizer, and check both. Blocks for as long as that takes.

    Raises:
        ModelError: the model cannot be loaded, or would answer wrong numbers.
    """
    source = settings.model
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
    """Owns the model from loading to draining.

    Args:
        settings: which model, and its limits.
        repeatable: the same samples in the same order get the same digits again. A number's last digits may depend on
            its batch, so no budget is measured and no prompt is kept.
    """

    def __init__(self, settings: ModelSettings, *, repeatable: bool = False) -> None:
        self.settings = settings.model_copy(update={"prompt_cache_bytes": 0}) if repeatable else settings
        self._repeatable = repeatable
        self.metrics = Metrics()
        self.draining = False
        self.failure: Exception | None = None
        self._pipeline: Pipeline | None = None

    async def start(self) -> None:
        """Load, check, and take requests.

        Raises:
            ModelError: the model cannot be loaded, or would answer wrong numbers.
        """
        try:
            engine, aligner = await asyncio.to_thread(load, self.settings)
            budget = await asyncio.to_thread(self._budget, engine)
        except Exception as error:  # kept for whoever watches the start, and raised on
            self.failure = error
            raise
        if self.draining:
            engine.close()
            return
        batcher = Batcher(
            engine,
            max_batch_tokens=budget,
            max_queue_tokens=self.settings.max_queue_tokens,
            metrics=self.metrics,
        )
        name = self.settings.model_name or self.settings.model
        self._pipeline = Pipeline(name, engine, aligner, batcher, self.metrics)
        self.metrics.budget(budget)
        self.metrics.ready(True)
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
        if self._pipeline is not None:
            await self._pipeline.close()

    @property
    def pipeline(self) -> Pipeline:
        """The loaded model.

        Raises:
            NotReady: it is still being loaded, or the server is shutting down.
        """
        if self.draining:
            raise NotReady("the server is shutting down; try another one", retry_after=1.0, code="draining")
        if self._pipeline is None:
            raise NotReady(_LOADING.message, retry_after=_LOADING.retry_after)
        return self._pipeline

    def pipeline_for(self, model: str | None) -> Pipeline:
        """The pipeline of a model by name; None and "default" are the server's own.

        Raises:
            NotReady: it is still being loaded, or the server is shutting down.
            UnknownModel: no such model is served.
        """
        pipeline = self.pipeline
        if model not in (None, "default", pipeline.name):
            raise UnknownModel(f"no model named {model!r} is served here; there is {pipeline.name!r}", field="model")
        return pipeline
