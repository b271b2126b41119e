"""Before a model is served: does it give finite, repeatable numbers that do not depend on who shares the batch?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from densereward.capture import AttentionRow, Captured, PrefixScores, ScoringInput
from densereward.engines.base import Engine
from densereward.errors import EngineFailure, ModelError

__all__ = ["TOLERANCE", "self_check"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far a score may move with the batch around it, relative to the largest score: rounding, not more."""

_LENGTHS = (1, 7, 33, 70)


def self_check(engine: Engine) -> None:
    """Score probes alone and together, and compare.

    Raises:
        ModelError: a number is missing, not finite, not a weight, or changes with the batch.
    """
    probes = _probes(engine)
    try:
        together = engine.forward(probes)
        alone = [engine.forward([probe])[0] for probe in probes]
    except EngineFailure as error:
        raise ModelError(f"the self-check's forward pass failed: {error.message}") from error
    for captured in together:
        _check_numbers(captured)
    _check_batch_invariance(together, alone, TOLERANCE[engine.facts.dtype])


def _probes(engine: Engine) -> list[ScoringInput]:
    """Token ids from a fixed seed, of several lengths, with all that the engine provides."""
    generator = np.random.default_rng(0)
    needs = frozenset(need for need in engine.provides if isinstance(need, PrefixScores) or need == AttentionRow(-1))
    return [
        ScoringInput(
            token_ids=generator.integers(0, engine.facts.vocabulary_size, length).tolist(),
            prompt_length=length // 3,
            response_length=length - length // 3,
            scored_position=length - 1,
            needs=needs,
        )
        for length in _LENGTHS
        if length <= engine.facts.max_length
    ]


def _check_numbers(captured: Captured) -> None:
    prefixes = captured.prefix_scores
    if not math.isfinite(captured.reward) or (prefixes is not None and not np.isfinite(prefixes).all()):
        raise ModelError("the self-check got a score that is not finite; is the dtype too narrow for this model?")
    for row in captured.attention_rows.values():
        if not (np.isfinite(row).all() and (row >= 0).all() and row.sum() <= 1 + 1e-3):
            raise ModelError("the self-check got an attention row that is not a share of 1")


def _check_batch_invariance(together: Sequence[Captured], alone: Sequence[Captured], tolerance: float) -> None:
    largest = max(1.0, *(abs(captured.reward) for captured in alone))
    for first, second in zip(together, alone, strict=True):
        moved = abs(first.reward - second.reward)
        if first.prefix_scores is not None and second.prefix_scores is not None:
            moved = max(moved, float(np.abs(first.prefix_scores - second.prefix_scores).max()))
        if moved > tolerance * largest:
            raise ModelError(
                f"the self-check's scores move by {moved:.2g} with the batch around them, which is more than rounding"
            )
