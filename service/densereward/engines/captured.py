"""What a method reads, taken from the numbers of all positions of a sequence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from densereward.capture import AttentionRow, Captured, Prefixes, PrefixMode, PrefixScores, ScoringInput

__all__ = ["from_positions"]


def from_positions(
    sequence: ScoringInput,
    reward: float,
    scores: Float32[np.ndarray, " S"],
    row: Callable[[int], Float32[np.ndarray, " S"]],
    step_scores: Float32[np.ndarray, " B"] | None = None,
) -> Captured:
    """What a sequence needs of its reward, its open prefixes, its attention rows and its steps.

    Args:
        sequence: the sequence.
        reward: the model's score of it.
        scores: the head's score at each of its tokens.
        row: the scored token's attention on each of its tokens, by layer as `AttentionRow` counts it.
        step_scores: one a step, where they are needed.
    """
    start, stop = sequence.prompt_length, sequence.response_stop
    prefixes: dict[PrefixMode, Prefixes] = {}
    if PrefixScores("open") in sequence.needs:
        prefixes["open"] = Prefixes(float(scores[start - 1]) if start else None, scores[start:stop])
    layers = [need.layer for need in sequence.needs if isinstance(need, AttentionRow)]
    return Captured(
        reward=reward,
        length=sequence.response_length,
        prefixes=prefixes,
        attention_rows={layer: row(layer)[start:stop] for layer in layers},
        step_scores=step_scores,
    )
