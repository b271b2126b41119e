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
        boundaries: response tokens before each of these, where not all prefixes were scored.
    """

    before: float | None
    after: Float32[np.ndarray, " _"]
    boundaries: Sequence[int] | None = None

    def at(self, boundaries: Sequence[int]) -> Float32[np.ndarray, " _"]:
        """Scores after so many tokens each; all of them must have been scored."""
        if self.boundaries is None:
            return self.after[np.asarray(boundaries, dtype=np.int64) - 1]
        return self.after[np.searchsorted(self.boundaries, boundaries)]


@dataclass(frozen=True, slots=True)
class Captured:
    """What one forward pass gave for one sequence. Everything float32 on the host.

    Attributes:
        reward: R, the model's score of the whole sequence.
        length: T, the response's tokens.
        prefixes: per mode as it was asked for, the scores of the prefixes.
        attention_rows: per layer as it was asked for, what the scoring token's attention put on each response token;
            the rest of the row, up to its sum of 1, fell on the prompt, the closing tokens and attention sinks.
        contributions: per layer as it was asked for, what each response token added to the score.
        received_attention: per layer as it was asked for, what each response token got from later ones.
        gradients: as they were asked for, what each response token's embedding does to the score, to first order.
        objectives: as they were asked for, [K, 1 + T]: each objective's part of the reward, and of s_1..s_T.
        step_scores: as they were asked for, one a step.
        log_probabilities, log_ratios: as they were asked for, of the response's tokens and then the closing ones, nats.
        variants: for one method, what the variants gave that it asked for (`methods.base.Method.variants`).
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
        """Everything that was kept beside the reward."""
        kept = [each.values() for each in (self.attention_rows, self.contributions, self.received_attention)]
        scores = [prefixes.after for prefixes in self.prefixes.values()]
        before = [
            np.array([prefixes.before], np.float32)
            for prefixes in self.prefixes.values()
            if prefixes.before is not None
        ]
        parts = None if self.objectives is None else self.objectives.ravel()
        found = (self.gradients, parts, self.step_scores, self.log_probabilities, self.log_ratios)
        single = [each for each in found if each is not None]
        return [*scores, *before, *single, *(row for rows in kept for row in rows)]
