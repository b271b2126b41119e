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
from typing import Literal

import numpy as np
from jaxtyping import Float32

__all__ = [
    "PREFIX_MODES",
    "AttentionRow",
    "Captured",
    "Contributions",
    "Gradients",
    "LogProbabilities",
    "LogRatios",
    "Need",
    "Objectives",
    "PrefixMode",
    "PrefixScores",
    "Prefixes",
    "ReceivedAttention",
    "ScoringInput",
    "Span",
    "StepScores",
    "Steps",
    "Variants",
    "missing_closing",
]

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


PrefixMode = Literal["open", "closed"]
PREFIX_MODES: tuple[PrefixMode, ...] = ("open", "closed")
"""open: the head is read at the response's tokens as they stand. closed: each prefix is scored as if the response
ended there, closing tokens included."""


@dataclass(frozen=True, slots=True)
class PrefixScores:
    """The score before the response and after each of its tokens."""

    mode: PrefixMode = "open"


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """The attention of the scoring token in one layer, averaged over its heads.

    Layers count from 0, or with negative numbers from the last, -1.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class Contributions:
    """What each token adds to the score through the scoring token's attention in one layer, or in all together.

    Through its values, that is, weighted by the attention and carried on by the rest of the model as it is linear
    around this sequence (`methods.contribution`). Layers count as for `AttentionRow`; None is all of them.
    """

    layer: int | None = None


@dataclass(frozen=True, slots=True)
class ReceivedAttention:
    """The attention that each response token gets from all later ones, summed, in one layer, averaged over heads.

    Layers count as for `AttentionRow`.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class Gradients:
    """The score's gradient at each response token's embedding, times the embedding less that of the padding token."""


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """How probable a language model finds each response token, and then each closing token, after those before it.

    With `alone`, nothing else is needed of the sequence, not even its score.
    """

    alone: bool = False


@dataclass(frozen=True, slots=True)
class LogRatios:
    """The same under a policy, less that under its reference."""


@dataclass(frozen=True, slots=True)
class StepScores:
    """What a model that was trained to judge steps, or single tokens, says of each."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """What each objective of a model with several adds to the score, where scores of open prefixes are read."""


@dataclass(frozen=True, slots=True)
class Variants:
    """The scores of other responses to the prompt."""


Need = (
    PrefixScores
    | AttentionRow
    | Contributions
    | ReceivedAttention
    | Gradients
    | LogProbabilities
    | LogRatios
    | StepScores
    | Objectives
    | Variants
)
"""One narrow thing an engine can keep from a forward pass; the sequence's score is always kept."""


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
