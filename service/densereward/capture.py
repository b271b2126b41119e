"""What travels between the front and the engine: what a method needs, what goes in, what one forward pass gives.

    align     fills  ScoringInput   (ids, where the response lies, where the score is read)
    methods   fill   ScoringInput.needs
    engine    fills  Captured
    methods   read   Captured

Shapes: S tokens in a sequence (prompt, response, closing tokens), T tokens in its response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

__all__ = ["AttentionRow", "Captured", "Need", "PrefixScores", "ScoringInput", "Span"]

Span = tuple[int, int]
"""[start, end) in UTF-8 bytes of the response."""


@dataclass(frozen=True, slots=True)
class PrefixScores:
    """The score head read before the response and after each of its tokens ("open" prefixes)."""


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """The attention of the scoring token in one layer, averaged over its heads.

    Layers count from 0, or with negative numbers from the last, -1.
    """

    layer: int


Need = PrefixScores | AttentionRow
"""One narrow thing an engine can keep from a forward pass; the sequence's score is always kept."""


@dataclass(frozen=True, slots=True)
class ScoringInput:
    """One sequence for the engine: prompt, response and closing tokens in a row, in the model's own ids."""

    token_ids: Sequence[int]
    prompt_length: int
    response_length: int
    scored_position: int
    needs: frozenset[Need] = frozenset()

    @property
    def response_stop(self) -> int:
        """Position after the last response token."""
        return self.prompt_length + self.response_length


@dataclass(frozen=True, slots=True)
class Captured:
    """What one forward pass gave for one sequence. Everything float32 on the host.

    Attributes:
        reward: R, the model's score of the whole sequence.
        length: T, the response's tokens.
        prompt_score: s_0, the score before the response; None without `PrefixScores` or without any prompt token.
        prefix_scores: s_1..s_T; None without `PrefixScores`.
        attention_rows: per layer as it was asked for, what the scoring token's attention put on each response token;
            the rest of the row, up to its sum of 1, fell on the prompt and the closing tokens.
    """

    reward: float
    length: int
    prompt_score: float | None = None
    prefix_scores: Float32[np.ndarray, " T"] | None = None
    attention_rows: Mapping[int, Float32[np.ndarray, " T"]] = field(default_factory=dict)
