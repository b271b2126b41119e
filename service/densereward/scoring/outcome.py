"""What the engine gave for one sample: its own pass, its variants and its closed prefixes, or the first failure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from densereward.capture import Captured
from densereward.errors import DenseRewardError, EngineFailure
from densereward.scheduling.batcher import Scored
from densereward.scoring.preparation import PreparedSample
from densereward.scoring.reencoding import join_prefixes

__all__ = ["Outcome", "checked_finite", "take_outcome"]

Result = Scored | EngineFailure


@dataclass(frozen=True, slots=True)
class Outcome:
    """One sample's own pass with its closed prefixes, and per method what its variants gave."""

    scored: Scored
    variants: Sequence[Sequence[Captured]]


def take_outcome(prepared: PreparedSample, results: Iterator[Result]) -> Outcome | EngineFailure:
    """Take one sample's results, in the order in which its sequences were queued. The first failure stands for all."""
    own = next(results)
    variants = [list(islice(results, len(sequences))) for sequences in prepared.variants]
    prefixes = list(islice(results, len(prepared.prefixes)))
    for each in (own, *prefixes, *chain(*variants)):
        if isinstance(each, EngineFailure):
            return each
    if not isinstance(own, Scored):
        raise TypeError(f"{own!r} is no result")
    captured = join_prefixes(own.captured, _captured(prefixes), prepared.sequence.boundaries)
    return Outcome(replace(own, captured=captured), [_captured(each) for each in variants])


def checked_finite(outcome: Outcome | DenseRewardError) -> Outcome | DenseRewardError:
    """The outcome; a failure where it holds a number that is not finite."""
    if isinstance(outcome, DenseRewardError):
        return outcome
    captured = [outcome.scored.captured, *chain(*outcome.variants)]
    arrays = (array for each in captured for array in each.arrays)
    if all(math.isfinite(each.reward) for each in captured) and all(np.isfinite(array).all() for array in arrays):
        return outcome
    return EngineFailure("the model gave a number that is not finite", code="not_finite")


def _captured(results: Sequence[Result]) -> list[Captured]:
    return [each.captured for each in results if isinstance(each, Scored)]
