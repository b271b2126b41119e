"""The scores of a response's prefixes, as the methods that take their differences read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from densereward.capture import Captured, PrefixMode
from densereward.errors import InvalidRequest
from densereward.methods.base import Response
from densereward.methods.boundaries import TextBoundaries

__all__ = ["Scores", "scores_at", "spread_evenly", "text_boundaries_of"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores at some boundaries, float64.

    Attributes:
        before: s_0; 0 where the prompt is empty and has none.
        after: one a boundary; the last is R, read at the closing token, so that steps telescope to R - s_0.
        has_before: whether there was a prompt to read s_0 at.
        warnings: `code: message` each.
    """

    before: float
    after: Float64[np.ndarray, " B"]
    has_before: bool
    warnings: tuple[str, ...]

    @property
    def steps(self) -> Float64[np.ndarray, " B"]:
        """From each boundary's score to the next one's."""
        return np.diff(self.after, prepend=self.before)

    @property
    def no_prompt(self) -> tuple[str, ...]:
        """The warning of a method that subtracts s_0 where there is none."""
        text = "no_prompt_score: the prompt is empty and has no score to subtract; s_0 = 0 was used"
        return () if self.has_before else (text,)


def scores_at(captured: Captured, response: Response, mode: PrefixMode, boundaries: Sequence[int]) -> Scores:
    """The scores after so many tokens each, the last of them after all."""
    prefixes = captured.prefixes[mode]
    after = prefixes.at(boundaries).astype(np.float64)
    after[-1] = captured.reward
    warnings: tuple[str, ...] = ()
    if mode == "closed" and not response.finished:
        warnings = ("unfinished: the response's own score is read open, as it was cut, its prefixes' closed",)
    return Scores(prefixes.before or 0.0, after, prefixes.before is not None, warnings)


def spread_evenly(values: Float64[np.ndarray, " B"], boundaries: Sequence[int]) -> Float64[np.ndarray, " T"]:
    """Each segment's value in equal shares on its tokens."""
    lengths = np.diff(np.asarray(boundaries), prepend=0)
    return np.repeat(values / lengths, lengths)


def text_boundaries_of(name: str, response: Response) -> TextBoundaries:
    """Where a response can be cut, for the method of this name.

    Raises:
        InvalidRequest: the reward model's tokens have no byte spans.
    """
    if response.text_boundaries is None:
        raise InvalidRequest(
            f"{name} divides the response's text, and the bytes of its ids cannot be known with this tokenizer; give "
            "`response` as text",
            code="no_spans",
            field="response_token_ids",
        )
    return response.text_boundaries
