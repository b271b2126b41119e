"""What goes into an engine: one sequence in the model's own ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from densereward.capture.needs import LogProbabilities, Need, PrefixScores

__all__ = ["ScoringInput", "Span", "Steps", "missing_closing"]

Span = tuple[int, int]
"""[start, end) in UTF-8 bytes of the response."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How a response is written for a model that judges its steps.

    Attributes:
        cut: the text between two steps of a response.
        separator: the text written after each step for the model; the step is judged at its last token.
        blank: whether steps without a letter are judged, too.
        whole: whether prompt and response are tokenised as one text, with both cuts and separators in it; otherwise
            each step is tokenised by itself, and the separator replaces the cut.
        joint: the text between prompt and response, for a family without a chat template; it is not repeated after a
            prompt that ends with it.
    """

    cut: str
    separator: str
    blank: bool = False
    whole: bool = False
    joint: str | None = None


@dataclass(frozen=True, slots=True)
class ScoringInput:
    """One sequence for the engine: prompt, response and closing tokens, in the model's own ids.

    Attributes:
        token_ids: the sequence.
        prompt_length: tokens of the prompt, with which the sequence begins.
        response_length: tokens of the response, which follows.
        scored_position: the position at which the score is read.
        closing_ids: all closing tokens of the model, for closed prefixes; this sequence may end with fewer.
        needs: what is needed of the forward pass.
        boundaries: lengths, in response tokens, of the closed prefixes that are scored, beside the empty one:
            ascending, the whole response among them. None scores the prefixes of all lengths.
        steps: positions at which a model that judges steps, or tokens, is read.
        gate: the position at which a model reads the weights of its objectives.
        ending: ids written after a response that is not closed, for a model whose score is read there.
        least_closing: closing tokens with which a response must end to count as closed; fewer are plain text.
    """

    token_ids: Sequence[int]
    prompt_length: int
    response_length: int
    scored_position: int
    closing_ids: Sequence[int] = ()
    needs: frozenset[Need] = frozenset()
    boundaries: Sequence[int] | None = None
    steps: Sequence[int] = ()
    gate: int = 0
    ending: Sequence[int] = ()
    least_closing: int = 1

    @property
    def response_stop(self) -> int:
        """Position after the last response token."""
        return self.prompt_length + self.response_length

    @property
    def closes_prefixes(self) -> bool:
        """Whether closed prefixes are needed."""
        return PrefixScores("closed") in self.needs

    @property
    def closed_prefixes(self) -> Sequence[int]:
        """Lengths, in response tokens, of the closed prefixes that are scored; empty where none are needed."""
        if not self.closes_prefixes:
            return ()
        return range(self.response_length + 1) if self.boundaries is None else (0, *self.boundaries)

    @property
    def longest(self) -> int:
        """One more than the highest position, those of closed prefixes included."""
        closed = self.response_stop + len(self.closing_ids) if self.closes_prefixes else 0
        return max(len(self.token_ids), closed)

    @property
    def forward_tokens(self) -> int:
        """Tokens that run, those of closed prefixes included, if no prompt is shared."""
        return len(self.token_ids) + len(self.closed_prefixes) * len(self.closing_ids)

    def with_prompt(self, ids: Sequence[int]) -> ScoringInput:
        """The same response and closing tokens after another prompt, for their log-probabilities alone."""
        token_ids = [*ids, *self.token_ids[self.prompt_length :]]
        needs: frozenset[Need] = frozenset([LogProbabilities(alone=True)])
        return ScoringInput(token_ids, len(ids), self.response_length, len(token_ids) - 1, needs=needs)

    def with_response(self, ids: Sequence[int], *, finished: bool) -> ScoringInput:
        """Another response to the same prompt, for its score alone."""
        closing = missing_closing(ids, self.closing_ids if finished else self.ending, self.least_closing)
        token_ids = [*self.token_ids[: self.prompt_length], *ids, *closing]
        return ScoringInput(token_ids, self.prompt_length, len(ids), len(token_ids) - 1, gate=self.gate)

    @property
    def response_ids(self) -> Sequence[int]:
        """The response's tokens."""
        return self.token_ids[self.prompt_length : self.response_stop]


def missing_closing(response_ids: Sequence[int], closing_ids: Sequence[int], least: int = 1) -> Sequence[int]:
    """The closing tokens that a response does not already end with; an end of fewer than `least` does not count."""
    for present in range(min(len(closing_ids), len(response_ids)), max(least, 1) - 1, -1):
        if list(response_ids[-present:]) == list(closing_ids[:present]):
            return closing_ids[present:]
    return closing_ids
