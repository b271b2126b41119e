"""The self-check of a model's numbers: finite, repeatable, and independent of the rest of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from densereward.capture import AttentionRow, Captured, LogProbabilities, Need, PrefixScores, ScoringInput, StepScores
from densereward.engines.base import TOLERANCE, Engine
from densereward.errors import EngineFailure, ModelError

__all__ = ["TOLERANCE", "self_check"]

_LENGTHS = (1, 7, 33, 100)
_PROMPT = 65  # long enough to be cached when it comes again
_CLOSING = 2
_ISOLATED = 40


def self_check(engine: Engine) -> None:
    """Score probes one by one and in a batch, and compare.

    Raises:
        ModelError: a number is missing, not finite, not a weight, or changes with the batch.
    """
    probes = _probes(engine)
    try:
        batched = engine.forward(probes)
        alone = [engine.forward([probe])[0] for probe in probes]
    except EngineFailure as error:
        raise ModelError(f"the self-check's forward pass failed: {error.message}") from error
    tolerance = TOLERANCE[engine.facts.dtype]
    for captured in batched:
        _check_numbers(captured)
        _check_closed_prefixes(captured, tolerance)
    _check_batch_invariance(batched, alone, tolerance)
    _check_isolation(engine, tolerance / 10)


def _check_isolation(engine: Engine, tolerance: float) -> None:
    """A sequence's numbers must not change when its neighbour is replaced by another of the same length."""
    length = min(_ISOLATED, engine.facts.max_length)
    ids = np.random.default_rng(1).integers(0, engine.facts.vocabulary_size, (3, length)).tolist()
    needs = _needs(engine)
    steps = range(1, length) if StepScores() in needs else ()
    own, neighbour, other = (
        ScoringInput(each, 1, length - 1, length - 1, needs=needs - {PrefixScores("closed")}, steps=steps)
        for each in ids
    )
    for place, first, second in ((1, [neighbour, own], [other, own]), (0, [own, neighbour], [own, other])):
        before, after = (engine.forward(batch)[place] for batch in (first, second))
        for one, two in zip(_numbers(before), _numbers(after), strict=True):
            moved = float(np.abs(one - two).max(initial=0))
            if moved > tolerance * float(np.abs(one).max(initial=1e-3)):
                raise ModelError(
                    f"the self-check's numbers of a sequence move by {moved:.2g} when its neighbour in the batch is "
                    "another; something in this model mixes sequences"
                )


def _numbers(captured: Captured) -> list[np.ndarray]:
    return [np.array([captured.reward], np.float32), *captured.arrays]


def _needs(engine: Engine) -> frozenset[Need]:
    """What is checked of all that the engine provides."""
    kinds = PrefixScores | StepScores | LogProbabilities
    every = engine.provides - {LogProbabilities(alone=True)}
    return frozenset(need for need in every if isinstance(need, kinds) or need == AttentionRow(-1))


def _probes(engine: Engine) -> list[ScoringInput]:
    """Random ids from a fixed seed, of several lengths, two with the same prompt, with all needs that are checked."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, engine.facts.vocabulary_size, 2 * max(_LENGTHS)).tolist()
    closing = ids[:_CLOSING]
    needs = _needs(engine)
    probes = []
    for length in (*_LENGTHS, _LENGTHS[-1] - 1):
        prompt = 0 if length < max(_LENGTHS) - 1 else _PROMPT
        response = ids[-length : len(ids) - prompt]
        steps = range(prompt, prompt + len(response)) if StepScores() in needs else ()
        probes.append(
            ScoringInput(
                token_ids=[*ids[:prompt], *response, *closing],
                prompt_length=prompt,
                response_length=len(response),
                scored_position=length + _CLOSING - 1,
                closing_ids=closing,
                needs=needs,
                steps=steps,
            )
        )
    return [probe for probe in probes if len(probe.token_ids) <= engine.facts.max_length]


def _check_numbers(captured: Captured) -> None:
    if not (math.isfinite(captured.reward) and all(np.isfinite(each).all() for each in captured.arrays)):
        raise ModelError("the self-check got a score that is not finite; is the dtype too narrow for this model?")
    for row in captured.attention_rows.values():
        if not (np.isfinite(row).all() and (row >= 0).all() and row.sum() <= 1 + 1e-3):
            raise ModelError("the self-check got an attention row that is not a share of 1")


def _check_closed_prefixes(captured: Captured, tolerance: float) -> None:
    """The last closed prefix is the whole response, so it must have the response's own score."""
    closed = captured.prefixes.get("closed")
    if closed is not None and abs(float(closed.after[-1]) - captured.reward) > tolerance * max(1, abs(captured.reward)):
        raise ModelError("the self-check got another score for a response than for the closed prefix that is all of it")


def _check_batch_invariance(batched: Sequence[Captured], alone: Sequence[Captured], tolerance: float) -> None:
    largest = max(1.0, *(abs(captured.reward) for captured in alone))
    for first, second in zip(batched, alone, strict=True):
        moved = abs(first.reward - second.reward)
        for mode, prefixes in first.prefixes.items():
            moved = max(moved, float(np.abs(prefixes.after - second.prefixes[mode].after).max(initial=0)))
        if moved > tolerance * largest:
            raise ModelError(
                f"the self-check's scores move by {moved:.2g} with the batch around them, which is more than rounding"
            )
        for name in ("step_scores", "log_probabilities"):
            one, two = getattr(first, name), getattr(second, name)
            if one is not None and (moved := float(np.abs(one - two).max(initial=0))) > tolerance:
                raise ModelError(f"the self-check's {name} move by {moved:.2g} with the batch around them")
