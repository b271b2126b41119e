"""What comes out of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from densereward.capture.needs import PrefixMode

__all__ = ["Captured", "Prefixes"]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Scores of a response's prefixes.

    Attributes:
        before: s_0, the score before the response; None for an open prefix where there is no prompt to read it at.
        after: s_1..s_T, or the scores at the boundaries alone.
        boundaries: lengths, in response tokens, of these prefixes; None where all prefixes were scored.
    """

    before: float | None
    after: Float32[np.ndarray, " _"]
    boundaries: Sequence[int] | None = None

    def at(self, boundaries: Sequence[int]) -> Float32[np.ndarray, " _"]:
        """Scores of the prefixes of these lengths; they must have been scored."""
        if self.boundaries is None:
            return self.after[np.asarray(boundaries, dtype=np.int64) - 1]
        return self.after[np.searchsorted(self.boundaries, boundaries)]


@dataclass(frozen=True, slots=True)
class Captured:
    """What one forward pass gave for one sequence, in float32 on the host.

    Attributes:
        reward: R, the model's score of the whole sequence.
        length: T, the response's tokens.
        prefixes: by mode, the scores of the prefixes.
        attention_rows: by layer, the scoring token's attention on each response token; the rest of the row, which sums
            to 1, is on the prompt, the closing tokens and attention sinks.
        contributions: by layer, what each response token adds to the score.
        received_attention: by layer, the attention that each response token got from later ones.
        gradients: to first order, what each response token's embedding adds to the score.
        objectives: [K, 1 + T], each objective's part of the reward and of s_1..s_T.
        step_scores: one per step.
        log_probabilities, log_ratios: of the response's tokens, then of the closing tokens, in nats.
        variants: for one method, the results of the variants that it asked for (`methods.base.Method.variants`).

    All but reward and length are there where they were needed; layers are counted as in the need.
    """

    reward: float
    length: int
    prefixes: Mapping[PrefixMode, Prefixes] = field(default_factory=dict)
    attention_rows: Mapping[int, Float32[np.ndarray, " T"]] = field(default_factory=dict)
    contributions: Mapping[int | None, Float32[np.ndarray, " T"]] = field(default_factory=dict)
    received_attention: Mapping[int, Float32[np.ndarray, " T"]] = field(default_factory=dict)
    gradients: Float32[np.ndarray, " T"] | None = None
    objectives: Float32[np.ndarray, "K _"] | None = None
    step_scores: Float32[np.ndarray, " B"] | None = None
    log_probabilities: Float32[np.ndarray, " _"] | None = None
    log_ratios: Float32[np.ndarray, " _"] | None = None
    variants: Sequence[Captured] = ()

    @property
    def arrays(self) -> list[Float32[np.ndarray, " _"]]:
        """All numbers beside the reward, as arrays."""
        by_layer = [each.values() for each in (self.attention_rows, self.contributions, self.received_attention)]
        scores = [prefixes.after for prefixes in self.prefixes.values()]
        before = [
            np.array([prefixes.before], np.float32)
            for prefixes in self.prefixes.values()
            if prefixes.before is not None
        ]
        parts = None if self.objectives is None else self.objectives.ravel()
        others = (self.gradients, parts, self.step_scores, self.log_probabilities, self.log_ratios)
        single = [each for each in others if each is not None]
        return [*scores, *before, *single, *(row for rows in by_layer for row in rows)]
