"""Closed prefixes as sequences of their own, for models that must read each prefix by itself, such as encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from densereward.capture import Captured, Prefixes, PrefixScores, ScoringInput

__all__ = ["count_prefix_tokens", "join_prefixes", "split_prefixes"]

_CLOSED = PrefixScores("closed")


def split_prefixes(sequence: ScoringInput) -> tuple[ScoringInput, list[ScoringInput]]:
    """The sequence without its closed prefixes, and these: each a response that ends there, the empty one first.

    A prefix without any token, before an empty prompt that nothing closes, is left out.
    """
    ids = sequence.response_ids
    prefixes = [sequence.with_response(ids[:length], finished=True) for length in sequence.closed_prefixes]
    return replace(sequence, needs=sequence.needs - {_CLOSED}), [each for each in prefixes if each.token_ids]


def count_prefix_tokens(sequence: ScoringInput) -> int:
    """Tokens of all the closed prefixes as sequences of their own."""
    lengths = sequence.closed_prefixes
    return len(lengths) * (sequence.prompt_length + len(sequence.closing_ids)) + sum(lengths)


def join_prefixes(captured: Captured, prefixes: Sequence[Captured], boundaries: Sequence[int] | None) -> Captured:
    """What the engine gave for a sequence, with the scores of its closed prefixes."""
    if not prefixes:
        return captured
    scores = np.array([each.reward for each in prefixes], dtype=np.float32)
    count = captured.length if boundaries is None else len(boundaries)
    before, after = np.split(scores, [len(scores) - count])
    closed = Prefixes(float(before[0]) if len(before) else None, after, boundaries)
    return replace(captured, prefixes={**captured.prefixes, "closed": closed})
