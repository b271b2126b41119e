"""From a source (a folder or hub id) to a loaded model with its tokenizer, both of them checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from densereward.checks.examine import examine, refuse
from densereward.engines import ENGINES, INTERNAL_ENGINES
from densereward.engines.base import Engine
from densereward.errors import CannotPack, ModelError
from densereward.settings import ModelSettings
from densereward.tokenization.align import Aligner

__all__ = ["load", "load_pair", "load_unchecked"]

logger = logging.getLogger("densereward")


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
    with _as_model_error(source), _closing_on_failure(engine):
        _examine(engine, aligner, settings, source)
    return engine, aligner


def load_unchecked(settings: ModelSettings, source: str | None = None) -> tuple[Engine, Aligner]:
    """Load a model and its tokenizer without the checks of `examine`.

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
    for finding in refuse(examine(engine, aligner, settings.allow)):
        if finding.status != "ok":
            logger.warning("%s: %s: %s", source, finding.name, finding.text)


def _load(settings: ModelSettings, source: str) -> tuple[Engine, Aligner]:
    engine = _engine(settings, source)
    with _closing_on_failure(engine):
        return engine, _aligner(_read_tokenizer(settings, source), engine)


@contextmanager
def _closing_on_failure(engine: Engine) -> Iterator[None]:
    """Close an engine that is not served; it may have processes of its own."""
    try:
        yield
    except Exception:  # whatever a check or a tokenizer raises, it is raised again
        engine.close()
        raise


def _read_tokenizer(settings: ModelSettings, source: str) -> Any:
    from densereward.engines.torch.adapters import base_of

    try:
        tokenizer = _tokenizer(source, settings.revision)
    except ModelError:
        if (base := base_of(source, settings.revision)) == source:
            raise
        tokenizer = _tokenizer(base, None)
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
    return tokenizer


def _engine(settings: ModelSettings, source: str) -> Engine:
    """The engine that the settings name; for a model that it cannot pack, the one that runs such models."""
    options: dict[str, Any] = {
        "revision": settings.revision,
        "device": settings.device,
        "dtype": settings.dtype,
        "longest": settings.max_length,
        "batch_tokens": settings.max_batch_tokens,
        "prompt_cache": settings.prompt_cache_bytes,
        "separator": settings.step_separator,
        "head": settings.head,
        "pickled": "pickle" in settings.allow,
        "arguments": settings.engine_arguments,
        "residual_dtype": settings.residual_dtype,
    }
    try:
        return _load_engine(ENGINES[settings.engine], options, source)
    except CannotPack as error:
        return _load_engine(INTERNAL_ENGINES["unpacked"], options, source, error.message)


def _load_engine(kind: Any, options: dict[str, Any], *arguments: str) -> Engine:
    """Load an engine with those of the options that it takes by keyword.

    Raises:
        TypeError: it takes a keyword that is no option.
    """
    parameters = signature(kind.load).parameters.values()
    taken = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    if unknown := sorted(set(taken) - options.keys()):
        raise TypeError(f"{kind.__name__}.load takes {', '.join(unknown)}; the options are {', '.join(options)}")
    engine: Engine = kind.load(*arguments, **{name: options[name] for name in taken})
    return engine


def load_pair(settings: ModelSettings) -> tuple[Engine, Aligner]:
    """Load a policy and its reference, or a policy alone, and check each. Blocks for as long as that takes.

    Raises:
        ModelError: a model cannot be loaded, or would answer wrong numbers, or the two do not read text alike.
    """
    with _as_model_error(str(settings.pair)):
        return _load_pair(settings)


@contextmanager
def _as_model_error(source: str) -> Iterator[None]:
    """Turn whatever a model's own code raises while it loads into one message for the operator.

    Raises:
        ModelError: something failed.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code does
        logger.debug("loading %s", source, exc_info=True)
        raise ModelError(f"{source} cannot be served: {type(error).__name__}: {error}") from error


def _load_pair(settings: ModelSettings) -> tuple[Engine, Aligner]:
    sources = settings.pair_sources
    for source in sources.values():
        _check_folder(source)
    tokenizers = [_tokenizer(source, None) for source in sources.values()]
    engines: list[Any] = []
    for source, tokenizer in zip(sources.values(), tokenizers, strict=True):
        engine: Engine = INTERNAL_ENGINES["language_model"].load(
            source,
            device=settings.device,
            dtype=settings.dtype,
            longest=settings.max_length,
            batch_tokens=settings.max_batch_tokens,
            prompt_cache=settings.prompt_cache_bytes // len(sources),
            pickled="pickle" in settings.allow,
            residual_dtype=settings.residual_dtype,
        )
        _examine(engine, _aligner(tokenizer, engine), settings, source)
        engines.append(engine)
    pair: Engine = INTERNAL_ENGINES["pair"](*engines) if len(engines) > 1 else engines[0]
    aligners = [_aligner(tokenizer, pair) for tokenizer in tokenizers]
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
        steps=facts.steps,
        gate=facts.gate,
        score_token=facts.score_token,
        tokens=facts.tokens,
        reads_pairs=facts.reads_pairs,
    )


def _tokenizer(source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {source}: {error}") from error
