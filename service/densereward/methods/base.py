"""What a method is: a pure function from what the forward pass gave to rewards, and what it needs from that pass.

Every method names only its own dense part. The mix with the sparse reward, `beta`, and the scale, `normalize` and
`clip`, are common to all and applied afterwards (`densereward.scoring.placement`), on the trainer's own tokens.

Notation: R the sequence's reward, T the response's tokens in the reward model's vocabulary, L its slots, that is the
tokens the trainer wants its rewards on (the same T, or the spans it sent).

A method's module says in its docstring what there is to know, under the headings of `describe.HEADINGS`: that is what
GET /v1/methods and the pages in service/docs/methods are made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict, Field

from densereward.capture import Captured, Need
from densereward.errors import InvalidRequest
from densereward.methods.boundaries import TextBoundaries

__all__ = [
    "Beta",
    "Credit",
    "Finite",
    "Instruction",
    "Layers",
    "Method",
    "Params",
    "Positive",
    "Response",
    "Segment",
    "layer_numbers",
    "proportional",
]

Beta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(ge=1e-6, le=1e6)]
"""No reward model has scores beyond these, and float32 can represent what is computed from them."""

Instruction = Annotated[str, Field(min_length=1, max_length=4096)]
"""An instruction for a language model."""

Layers = Literal["last"] | Annotated[list[int], Field(min_length=1, max_length=256)]
"""The last layer, or layer numbers to average or to add up; negative ones count from the last."""


class Params(BaseModel):
    """A method's parameters; unknown ones are refused.

    Attributes:
        beta: share of the dense reward; the rest, 1 - beta, is R on the last token.
        normalize: divide everything by a standard deviation of sequence rewards: by this number, or by that of the
            rewards this server has given so far ("running"). Nothing is shifted: a shift of every token would add
            its T-fold to the sum.
        clip: no token's reward goes beyond this, up or down (after `normalize`); what is cut off joins the baseline.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: Beta = 1.0
    normalize: Literal["running"] | Positive | None = None
    clip: Positive | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """What is known of a response beside what the pass gives.

    Attributes:
        length: T.
        count: L.
        ids: the response's, T of them.
        blank_id: the token of a single space; None where the tokenizer has none.
        weights: one a slot, for `weights`.
        entropies: the policy's, in nats, one a slot, for `segment`.
        finished: whether the response ended by itself; otherwise no closing tokens were scored.
        text_boundaries: where its text can be cut; None where the bytes of its tokens cannot be known.
        steps: tokens before each step's end, for a model that judges steps, or single tokens.
    """

    length: int
    count: int
    ids: Sequence[int] = ()
    blank_id: int | None = None
    weights: Float64[np.ndarray, " L"] | None = None
    entropies: Float64[np.ndarray, " L"] | None = None
    finished: bool = True
    text_boundaries: TextBoundaries | None = None
    steps: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the response that a method judged as one.

    Attributes:
        start, stop: [start, stop) in the reward model's tokens.
        score: what the method says of it.
        keep: whether a trainer should learn from it; None where the method does not say.
    """

    start: int
    stop: int
    score: float
    keep: bool | None = None


@dataclass(frozen=True, slots=True)
class Credit:
    """A method's dense rewards.

    Attributes:
        rewards: sum(rewards) + baseline == R.
        on: whether the rewards are on the reward model's tokens (T, then mapped to slots) or on the slots (L).
        baseline: what the sum leaves out.
        attention_mass: share of the scoring token's row that fell on the response.
        segments: in order, all of the response; empty where the method has none.
        standard_error: of values that were sampled, the largest.
        warnings: `code: message` each.
    """

    rewards: Float64[np.ndarray, " _"]
    on: Literal["tokens", "slots"] = "tokens"
    baseline: float = 0.0
    attention_mass: float | None = None
    segments: tuple[Segment, ...] = ()
    standard_error: float | None = None
    warnings: tuple[str, ...] = ()


P = TypeVar("P", bound=Params)


class Method(ABC, Generic[P]):
    """One way of redistributing a reward. Stateless.

    Attributes:
        params_type: its parameters.
        passes: forward passes it needs, one of which is shared by all the methods of a request; None where that
            depends on the response.
        by_pair: whether a pair of language models gives the rewards, for any model that is served beside it.
    """

    params_type: ClassVar[type[Params]] = Params
    passes: ClassVar[int | None] = 1
    by_pair: ClassVar[bool] = False

    def needs(self, params: P) -> frozenset[Need]:
        """What the engine must keep of the forward pass."""
        return frozenset()

    def boundaries(self, response: Response, params: P) -> Sequence[int] | None:
        """After how many of a response's tokens closed prefixes are needed; None is after each.

        In order, from 1 on, and T itself, all of the response, is the last.
        """
        return None

    def variants(self, response: Response, params: P) -> Sequence[Sequence[int]]:
        """Other responses to the prompt, by their ids, whose scores are needed too; first in `Captured.variants`.

        Raises:
            InvalidRequest: they cannot be made.
        """
        return ()

    def instructions(self, params: P) -> Sequence[str]:
        """Instructions for a language model before the prompt, each in a sequence of its own, after the variants.

        Only the log-probabilities of the response are needed of these sequences.
        """
        return ()

    def settle(self, captured: Sequence[Captured], params: P) -> P:
        """Parameters that the request left to its own samples, all of them taken together."""
        return params

    def check(self, response: Response) -> None:
        """Check what the trainer sent, before anything is queued.

        Raises:
            InvalidRequest: the method needs something the sample does not bring.
        """

    @abstractmethod
    def credit(self, captured: Captured, response: Response, params: P) -> Credit:
        """The dense rewards of one sequence with at least one response token."""


def layer_numbers(layers: Layers) -> list[int]:
    """The layers as numbers."""
    return [-1] if layers == "last" else list(layers)


def proportional(weights: Float64[np.ndarray, " _"], total: float) -> Float64[np.ndarray, " _"]:
    """`total` divided in proportion to weights that are not negative and not all zero.

    Raises:
        InvalidRequest: the weights are others.
    """
    mass = weights.sum()
    if not (np.isfinite(mass) and mass > 0 and (weights >= 0).all()):
        raise InvalidRequest("weights must be finite, not negative, and not all zero", code="invalid_weights")
    return np.asarray(weights / mass * total)
