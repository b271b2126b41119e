"""The request and the answer, defined once: the service imports this module, so the two cannot drift apart.

Requests refuse unknown keys (a misspelt field must not be ignored in silence); answers accept them, so that an
older client can read a newer server. Token rewards arrive as numpy float32 arrays, whichever encoding was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainSerializer,
    StrictBool,
    WithJsonSchema,
    model_validator,
)

from ._arrays import Ids, Mask, Numbers, Spans, decode_base64, encode_base64

__all__ = [
    "Ensemble",
    "EnsembleCard",
    "Error",
    "ErrorBody",
    "FloatArray",
    "Include",
    "Message",
    "MethodAvailability",
    "MethodDescription",
    "MethodList",
    "MethodRequest",
    "ModelCard",
    "ModelList",
    "Objective",
    "RewardsRequest",
    "RewardsResponse",
    "Sample",
    "SampleReward",
    "SampleTokenRewards",
    "Segment",
    "Spans",
    "Timing",
    "TokenRewardsRequest",
    "TokenRewardsResponse",
    "Usage",
    "encode_base64",
]

Include = Literal["tokens", "spans", "prefix_scores", "attention", "segments", "objectives"]


def _decode_floats(value: str | Iterable[float] | NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        if isinstance(value, str):
            return decode_base64(value, "<f4").astype(np.float32)
        array = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError("neither a list of numbers nor base64 of little-endian float32 values") from error
    if array.ndim != 1:
        raise ValueError(f"{array.ndim} dimensions where there must be one")
    return array


FloatArray = Annotated[
    NDArray[np.float32],
    BeforeValidator(_decode_floats),
    PlainSerializer(lambda array: array.tolist(), return_type=list[float]),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}),
]
"""float32[T]; on the wire a list of numbers, or base64 of little-endian float32 values."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class Message(BaseModel):
    """One turn of a dialogue; further keys reach the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str


class Sample(_Request):
    """One prompt and one response. Exactly one way of giving each.

    Lists of ids, masks, numbers and spans may each be given as base64 of little-endian values instead.
    """

    id: str | None = Field(None, description="Echoed in the answer.")
    prompt: str | None = Field(None, description="Prompt text as it stands; template tokens in it are recognised.")
    messages: list[Message] | None = Field(None, description="Dialogue, rendered with the model's chat template.")
    prompt_token_ids: Ids | None = Field(
        None, description="The prompt in the reward model's own tokens; in base64, int32."
    )
    response: str | None = Field(None, description="Response text.")
    response_token_ids: Ids | None = Field(
        None, description="The response in the reward model's own tokens; in base64, int32."
    )
    response_spans: Spans | None = Field(
        None,
        description="[start, end) of the policy's tokens in `response`, in UTF-8 bytes; rewards come back on them. "
        "In base64, int32: start and end in turn.",
    )
    response_mask: Mask | None = Field(
        None,
        description="0 gets reward 0; its share moves to the next kept token, or the last kept one. In base64, uint8.",
    )
    finished: StrictBool = Field(True, description="False: cut by length, so no closing tokens are scored.")
    weights: Numbers | None = Field(None, description="One per token, for the method `weights`; in base64, float32.")
    token_entropies: Numbers | None = Field(
        None, description="The policy's entropies, one per token (nats); in base64, float32."
    )

    @model_validator(mode="after")
    def _one_prompt_and_one_response(self) -> Self:
        prompts = ("prompt", "messages", "prompt_token_ids")
        responses = ("response", "response_token_ids")
        for names in (prompts, responses):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) != 1:
                raise ValueError(f"give exactly one of {', '.join(names)}; got {', '.join(given) or 'none'}")
        if self.response_spans is not None and self.response is None:
            raise ValueError("response_spans are byte spans of `response`: give the response as text")
        return self


class MethodRequest(BaseModel):
    """A method by name, with its own parameters beside it: `{"name": "abc", "beta": 0.8}`."""

    model_config = ConfigDict(extra="allow")

    name: str
    label: str | None = Field(None, description="Key of its rewards in the answer; needed to ask for one method twice.")

    @property
    def key(self) -> str:
        """The key of this method's rewards in the answer."""
        return self.label or self.name

    @property
    def params(self) -> dict[str, Any]:
        """The method's own parameters, as given."""
        return dict(self.model_extra or {})


_Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
_Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]


class Ensemble(_Request):
    """How several models' rewards become one; with `normalize`, each first less its mean and over its deviation."""

    how: Literal["mean", "min", "uncertainty"] = Field(
        "mean", description="uncertainty: the mean less `penalty` times the variance between the models."
    )
    penalty: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    normalize: Literal["running"] | dict[str, tuple[_Mean, _Deviation]] | None = Field(
        None,
        description="Mean and deviation of each model's rewards: given by its name, or of all that it gave so far.",
    )


class RewardsRequest(_Request):
    """Body of POST /rewards: one number a sample."""

    model: str | Annotated[list[str], Field(min_length=2)] | None = Field(
        None,
        description="One of GET /v1/models, the first of them by default; or several, which answer as an ensemble.",
    )
    ensemble: Ensemble | None = Field(None, description="Only with several models; by default their mean.")
    samples: list[Sample] = Field(min_length=1)
    on_error: Literal["request", "item"] = Field(
        "request", description="item: a bad sample becomes an error item and the rest are served."
    )
    truncate: Literal["prompt_left"] | None = Field(
        None,
        description="prompt_left: what is too long loses tokens at its prompt's beginning, but for a BOS, and the item "
        "says how many; the response is never touched. By default what is too long is refused.",
    )
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="Lower numbers are served before all that waits with a higher one, which may wait for ever.",
    )


class TokenRewardsRequest(RewardsRequest):
    """Body of POST /token_rewards."""

    methods: list[str | MethodRequest] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description='Default: the first of "red", "steps", "sparse" that the model can serve.',
    )
    include: list[Include] = Field(default_factory=list)
    encoding_format: Literal["float", "base64"] = "float"

    def method_requests(self, default: str) -> list[MethodRequest]:
        """The methods asked for, plain names expanded."""
        asked = self.methods if self.methods is not None else [default]
        return [MethodRequest(name=each, label=None) if isinstance(each, str) else each for each in asked]


class Error(_Answer):
    """What went wrong and what to do next."""

    code: str
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class ErrorBody(_Answer):
    """The body of every answer that is not a success."""

    error: Error


class _Item(_Answer):
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


class Segment(_Answer):
    """A stretch of the response, [start, end) in the tokens that the rewards are on; its score is not scaled."""

    start: int
    end: int
    score: FiniteFloat
    keep: bool | None = Field(None, description="Whether to learn from it; null where the method does not say.")


class Objective(_Answer):
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


class Usage(_Answer):
    """Tokens. forward_tokens is what the model runs on, closing tokens included, where no prompt is shared."""

    prompt_tokens: int
    response_tokens: int
    forward_tokens: int


class Timing(_Answer):
    """Milliseconds on the server: the longest wait of a sample, its longest pass, and the whole request."""

    queue_ms: float
    forward_ms: float
    total_ms: float


class _Envelope(_Answer):
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


class MethodAvailability(_Answer):
    """Whether a model can serve a method, at what cost, or why not."""

    available: bool
    passes: int | None = Field(None, description="null: it depends on the response.")
    cost: str | None = None
    reason: str | None = None


class MethodDescription(_Answer):
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


class MethodList(_Answer):
    """Answer of GET /v1/methods."""

    object: Literal["list"] = "list"
    data: list[MethodDescription]


class ModelCard(_Answer):
    """One loaded model: what it is, how it reads text, what it can serve."""

    id: str
    object: Literal["model"] = "model"
    family: str
    head: str
    engine: str
    dtype: str
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
    prefix_modes: list[str]
    tokenizer_fingerprint: str
    template_fingerprint: str | None
    methods: dict[str, MethodAvailability]


class EnsembleCard(_Answer):
    """Several of the models under a name of their own."""

    id: str
    object: Literal["ensemble"] = "ensemble"
    models: list[str]
    how: str


class ModelList(_Answer):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    ensembles: list[EnsembleCard] = Field(default_factory=list)
