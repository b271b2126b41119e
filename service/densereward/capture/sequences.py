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
        cut: what stands between two steps in a response.
        separator: what is written after each step for the model, whose last token is where the step is judged.
        blank: whether steps without a letter are judged, too.
        whole: whether prompt and response, separators and cuts in it, are read as one text; otherwise each step is
            tokenised by itself and the separator stands in the cut's place.
        joint: what stands between prompt and response, for a family that reads no chat template; a prompt that ends
            with it is taken to hold it.
    """

    cut: str
    separator: str
    blank: bool = False
    whole: bool = False
    joint: str | None = None


@dataclass(frozen=True, slots=True)
class ScoringInput:
    """One sequence for the engine: prompt, response and closing tokens in a row, in the model's own ids.

    `closing_ids` are all the closing tokens of the model, for closed prefixes; how many of them end this sequence is a
    matter of its own. Closed prefixes are scored before the response and after each of its tokens, or only after
    the numbers of tokens that `boundaries` lists, in order, the whole response among them. `steps` are the positions
    at which a model that judges steps, or single tokens, is read; `gate` is where one that weighs objectives by the
    prompt reads that. `ending` is what is written behind a response that is not closed, since the score is read there.
    `least_closing` closing tokens and more at a response's end are taken for these; fewer are text like any other.
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
        """Response tokens before each closed prefix that is scored; empty where none is needed."""
        if not self.closes_prefixes:
            return ()
        return range(self.response_length + 1) if self.boundaries is None else (0, *self.boundaries)

    @property
    def longest(self) -> int:
        """Tokens up to the furthest position the model reads, that of a closed prefix included."""
        closed = self.response_stop + len(self.closing_ids) if self.closes_prefixes else 0
        return max(len(self.token_ids), closed)

    @property
    def forward_tokens(self) -> int:
        """Tokens the model runs on, those of closed prefixes included, where no prompt is shared."""
        return len(self.token_ids) + len(self.closed_prefixes) * len(self.closing_ids)

    def with_prompt(self, ids: Sequence[int]) -> ScoringInput:
        """The same response, closed in the same way, to another prompt; only its log-probabilities are needed."""
        token_ids = [*ids, *self.token_ids[self.prompt_length :]]
        needs: frozenset[Need] = frozenset([LogProbabilities(alone=True)])
        return ScoringInput(token_ids, len(ids), self.response_length, len(token_ids) - 1, needs=needs)

    def with_response(self, ids: Sequence[int], *, finished: bool) -> ScoringInput:
        """Another response to the same prompt, of which only the score is needed."""
        closing = missing_closing(ids, self.closing_ids if finished else self.ending, self.least_closing)
        token_ids = [*self.token_ids[: self.prompt_length], *ids, *closing]
        return ScoringInput(token_ids, self.prompt_length, len(ids), len(token_ids) - 1, gate=self.gate)

    @property
    def response_ids(self) -> Sequence[int]:
        """The response's tokens."""
        return self.token_ids[self.prompt_length : self.response_stop]


def missing_closing(response_ids: Sequence[int], closing_ids: Sequence[int], least: int = 1) -> Sequence[int]:
    """The closing tokens that a response does not already end with; fewer than `least` of them do not count."""
    for written in range(min(len(closing_ids), len(response_ids)), max(least, 1) - 1, -1):
        if list(response_ids[-written:]) == list(closing_ids[:written]):
            return closing_ids[written:]
    return closing_ids
