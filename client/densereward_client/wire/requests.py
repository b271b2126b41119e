"""Bodies of POST /token_rewards and POST /rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from .arrays import Ids, Mask, Numbers, Spans

__all__ = ["Ensemble", "Include", "Message", "MethodRequest", "RewardsRequest", "Sample", "TokenRewardsRequest"]

Include = Literal["tokens", "spans", "prefix_scores", "attention", "segments", "objectives"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
