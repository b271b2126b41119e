"""What a method asks of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "PREFIX_MODES",
    "AttentionRow",
    "Contributions",
    "Gradients",
    "LogProbabilities",
    "LogRatios",
    "Need",
    "Objectives",
    "PrefixMode",
    "PrefixScores",
    "ReceivedAttention",
    "StepScores",
    "Variants",
]

PrefixMode = Literal["open", "closed"]
PREFIX_MODES: tuple[PrefixMode, ...] = ("open", "closed")
"""open: the head is read at the response's tokens. closed: each prefix is scored as if the response ended there,
closing tokens included."""


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
    """What each token adds to the score through the scoring token's attention in one layer, or summed over all layers.

    That is its value, weighted by the attention, times the gradient of the score (`methods.contribution`). Layers count
    as for `AttentionRow`; None is all of them.
    """

    layer: int | None = None


@dataclass(frozen=True, slots=True)
class ReceivedAttention:
    """The attention that each response token gets from all later ones: summed, in one layer, averaged over its heads.

    Layers count as for `AttentionRow`.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class Gradients:
    """The score's gradient at each response token's embedding, times the embedding less that of the padding token."""


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """A language model's log-probability of each response token, then of each closing token.

    With `alone`, nothing else is needed of the sequence, not even its score.
    """

    alone: bool = False


@dataclass(frozen=True, slots=True)
class LogRatios:
    """The log-probabilities under a policy less those under its reference."""


@dataclass(frozen=True, slots=True)
class StepScores:
    """The score of each step, or token, by a model that was trained to judge these."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """What each objective adds to the score and to the scores of open prefixes, for a model with several."""


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
"""One narrow thing that an engine can keep of a forward pass, beside the sequence's score."""
