"""Answers of GET /v1/models and GET /v1/methods: what a server can serve."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .answers import AnswerModel

__all__ = [
    "EnsembleCard",
    "MethodAvailability",
    "MethodDescription",
    "MethodList",
    "ModelCard",
    "ModelList",
    "Precision",
]


class MethodAvailability(AnswerModel):
    """Whether a model can serve a method, at what cost, or why not."""

    available: bool
    passes: int | None = Field(None, description="null: it depends on the response.")
    cost: str | None = None
    reason: str | None = None


class MethodDescription(AnswerModel):
    """What a method is; `parameters` maps each of its parameters to a JSON schema."""

    name: str
    title: str
    source: str
    equation: str
    sum: str = Field(description="What the token rewards sum to, and what `baseline` holds.")
    use: str
    traps: str
    cost: str
    parameters: dict[str, dict[str, Any]]


class MethodList(AnswerModel):
    """Answer of GET /v1/methods."""

    object: Literal["list"] = "list"
    data: list[MethodDescription]


class Precision(AnswerModel):
    """What half precision costs, measured at the start on a few texts against float32 arithmetic on its weights."""

    dtype: str
    score: float = Field(description="How far a score moved at most.")
    score_deviation: float = Field(description="Standard deviation of the texts' scores, to compare with.")
    red: float | None = Field(
        None, description="Noise of the token rewards of `red`, as a share of their size (root mean squares)."
    )
    contribution: float | None = Field(None, description="The same of `contribution`.")
    flipped_signs: float | None = Field(None, description="Share of token rewards that change their sign.")


class ModelCard(AnswerModel):
    """One loaded model: what it is, how it reads text, what it can serve."""

    id: str
    object: Literal["model"] = "model"
    family: str
    head: str
    engine: str
    dtype: str
    residual_dtype: str | None = Field(
        None, description="Of the residual stream: float32, or that of the weights. Null: the engine does not say."
    )
    max_length: int
    closing_token_ids: list[int]
    closing_text: str | None = Field(
        None,
        description="What begins them, up to a special token; a policy's EOS stands for it. Null: no text is read so.",
    )
    adds_bos: bool
    step_cut: str | None = Field(None, description="What ends a step in a response, where the model judges steps.")
    step_separator: str | None = Field(
        None, description="What is written after each step of a response, where the model judges steps."
    )
    notice: str | None = Field(None, description="What must be known of the scores, where they are no plain rewards.")
    precision: Precision | None = Field(
        None, description="Null: it computes in float32, or there is nothing to compare it with."
    )
    prefix_modes: list[str]
    tokenizer_fingerprint: str
    template_fingerprint: str | None
    methods: dict[str, MethodAvailability]


class EnsembleCard(AnswerModel):
    """Several of the models under a name of their own."""

    id: str
    object: Literal["ensemble"] = "ensemble"
    models: list[str]
    how: str


class ModelList(AnswerModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    ensembles: list[EnsembleCard] = Field(default_factory=list)
