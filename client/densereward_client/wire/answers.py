"""Answers of POST /token_rewards and POST /rewards, and the body of every error."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from .arrays import FloatArray

__all__ = [
    "AnswerModel",
    "Error",
    "ErrorBody",
    "Objective",
    "RewardsResponse",
    "SampleReward",
    "SampleTokenRewards",
    "Segment",
    "Timing",
    "TokenRewardsResponse",
    "Usage",
]


class AnswerModel(BaseModel):
    """Whatever a server answers; fields that this client does not know are kept."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class Error(AnswerModel):
    """What went wrong and what to do next."""

    code: str
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class ErrorBody(AnswerModel):
    """The body of every answer that is not a success."""

    error: Error


class _Item(AnswerModel):
    index: int
    id: str | None = None
    error: Error | None = Field(None, description="Only with on_error=item: this sample was not served.")
    warnings: list[str] = Field(default_factory=list, description="`code: message` each.")
    truncated_prompt_tokens: int | None = Field(
        None, description="Only with `truncate`, where the sample was too long: how many tokens its prompt lost."
    )


class SampleReward(_Item):
    """One sample of POST /rewards."""

    reward: FiniteFloat | None = None
    rewards: dict[str, FiniteFloat] | None = Field(None, description="Of an ensemble: each model's own.")
    disagreement: FiniteFloat | None = Field(
        None, description="Of an ensemble: the standard deviation between its models' normalised rewards."
    )


class Segment(AnswerModel):
    """A stretch of the response, [start, end) in the tokens that the rewards are on; its score is not scaled."""

    start: int
    end: int
    score: FiniteFloat
    keep: bool | None = Field(None, description="Whether to learn from it; null where the method does not say.")


class Objective(AnswerModel):
    """What one of a model's objectives adds: over all of them, the rewards sum to R and the scores to s_1..s_T."""

    reward: FiniteFloat
    scores: FloatArray = Field(description="After each response token.")


class SampleTokenRewards(SampleReward):
    """One sample of POST /token_rewards: sum(token_rewards[m]) + baseline[m] == reward * scale[m].

    The scale is 1 unless a method was asked to `normalize`.
    """

    token_rewards: dict[str, FloatArray] = Field(default_factory=dict)
    baseline: dict[str, FiniteFloat] = Field(default_factory=dict, description="What the sum leaves out, per method.")
    attention_mass: dict[str, FiniteFloat] | None = Field(
        None, description="Per attention method: the share of the scoring token's row that fell on the response."
    )
    scale: dict[str, FiniteFloat] | None = Field(
        None, description="Per method with `normalize`: what all of its numbers were multiplied by."
    )
    clipped: dict[str, FiniteFloat] | None = Field(
        None, description="Per method with `clip`: what was cut off, summed; the baseline holds it."
    )
    passes: dict[str, int] | None = Field(
        None, description="Per method that scores variants of the response: how many passes that took."
    )
    standard_error: dict[str, FiniteFloat] | None = Field(
        None, description="Per method that samples: the largest of its values' standard errors."
    )
    segments: dict[str, list[Segment]] | None = Field(None, description="Per method that cuts segments.")
    mask: dict[str, list[int]] | None = Field(
        None, description="Per method whose segments say what to keep: 1 for the tokens to learn from."
    )
    tokens: list[str] | None = Field(
        None, description="The reward model's tokens of the response, separators of steps among them."
    )
    spans: list[tuple[int, int]] | None = Field(None, description="Their [start, end) in UTF-8 bytes of the response.")
    prefix_scores: FloatArray | None = Field(None, description="s_1..s_T: the score read after each response token.")
    prompt_score: FiniteFloat | None = Field(None, description="s_0: the score read before the response.")
    objectives: list[Objective] | None = Field(
        None, description="Of a model with several objectives, in its own order: each one's part."
    )
    attention: FloatArray | None = Field(None, description="Last layer's row on the response, before renormalising.")


class Usage(AnswerModel):
    """Tokens. forward_tokens is what the model runs on, closing tokens included, where no prompt is shared."""

    prompt_tokens: int
    response_tokens: int
    forward_tokens: int


class Timing(AnswerModel):
    """Milliseconds on the server: the longest wait of a sample, its longest pass, and the whole request."""

    queue_ms: float
    forward_ms: float
    total_ms: float


class _Envelope(AnswerModel):
    id: str
    model: str
    fingerprint: str = Field(description="Changes when the weights, the tokenizer, the template or the dtype do.")
    created: int = Field(description="Unix seconds.")
    usage: Usage
    timing: Timing


class RewardsResponse(_Envelope):
    """Answer of POST /rewards."""

    object: Literal["rewards"] = "rewards"
    data: list[SampleReward]


class TokenRewardsResponse(_Envelope):
    """Answer of POST /token_rewards."""

    object: Literal["token_rewards"] = "token_rewards"
    data: list[SampleTokenRewards]
