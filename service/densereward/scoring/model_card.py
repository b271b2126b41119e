"""A model's card, and the fingerprint by which a client sees that another model answers."""

from __future__ import annotations

import hashlib

from densereward import __version__
from densereward.capture import PREFIX_MODES, PrefixScores
from densereward.engines.base import Engine
from densereward.scoring.plans import availability
from densereward.tokenization.align import Aligner
from densereward_client.wire import ModelCard, Precision

__all__ = ["card_of", "fingerprint_of"]


def card_of(name: str, engine: Engine, aligner: Aligner, precision: Precision | None = None) -> ModelCard:
    """What GET /v1/models says of a model; `precision` as it was measured at the start."""
    facts = engine.facts
    return ModelCard(
        id=name,
        family=facts.family,
        head=facts.head,
        engine=facts.engine,
        dtype=facts.dtype,
        residual_dtype=facts.residual_dtype,
        max_length=aligner.max_length,
        closing_token_ids=aligner.closing_ids,
        closing_text=aligner.closing_text,
        adds_bos=aligner.adds_bos,
        step_cut=None if facts.steps is None else facts.steps.cut,
        step_separator=None if facts.steps is None else facts.steps.separator,
        notice=facts.notice,
        precision=precision,
        prefix_modes=[mode for mode in PREFIX_MODES if PrefixScores(mode) in engine.provides],
        tokenizer_fingerprint=aligner.vocabulary.fingerprint,
        template_fingerprint=None if aligner.template is None else aligner.template.fingerprint,
        methods=availability(engine),
    )


def fingerprint_of(card: ModelCard, engine: Engine, aligner: Aligner) -> str:
    """Changes with the model, with how it reads text, and with the version of this package."""
    facts = engine.facts
    model = (facts.weights_fingerprint, card.dtype, card.engine, card.head, __version__)
    written = (facts.unit, facts.steps, *aligner.frame)
    widened = [facts.residual_dtype] if facts.residual_dtype not in (None, facts.dtype) else []
    identity = (
        *model,
        *widened,
        *written,
        card.tokenizer_fingerprint,
        card.template_fingerprint,
        card.closing_token_ids,
    )
    return f"fp-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"
