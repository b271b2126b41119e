"""What a method is: a pure function from what the forward pass gave to rewards, and what it needs from that pass.

Every method names only its own dense part. The mix with the sparse reward, `beta`, is common to all and applied
afterwards (`densereward.slots`), where the last token is the trainer's own.

Notation: R the sequence's reward, T the response's tokens in the reward model's vocabulary, L its slots, that is the
tokens the trainer wants its rewards on (the same T, or the spans it sent).
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

__all__ = ["Beta", "Credit", "Method", "Params", "TrainerTokens"]

Beta = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Params(BaseModel):
    """A method's parameters; unknown ones are refused.

    Attributes:
        beta: share of the dense reward; the rest, 1 - beta, is R on the last token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: Beta = 1.0


@dataclass(frozen=True, slots=True)
class TrainerTokens:
    """What the trainer said of its own tokens.

    Attributes:
        count: L.
        weights: one a slot, for `weights`.
        finished: whether the response ended by itself; otherwise no closing tokens were scored.
    """

    count: int
    weights: Float64[np.ndarray, " L"] | None = None
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Credit:
    """A method's dense rewards.

    Attributes:
        rewards: sum(rewards) + baseline == R.
        on: whether the rewards are on the reward model's tokens (T, then mapped to slots) or on the slots (L).
        baseline: what the sum leaves out.
        attention_mass: share of the scoring token's row that fell on the response.
        warnings: `code: message` each.
    """

    rewards: Float64[np.ndarray, " _"]
    on: Literal["tokens", "slots"] = "tokens"
    baseline: float = 0.0
    attention_mass: float | None = None
    warnings: tuple[str, ...] = ()


P = TypeVar("P", bound=Params)


class Method(ABC, Generic[P]):
    """One way of redistributing a reward. Stateless.

    Attributes:
        params_type: its parameters.
        passes: forward passes it needs; one is shared by all the methods of a request.
    """

    params_type: ClassVar[type[Params]] = Params
    passes: ClassVar[int] = 1

    def needs(self, params: P) -> frozenset[Need]:
        """What the engine must keep of the forward pass."""
        return frozenset()

    def boundaries(self, length: int, params: P) -> Sequence[int] | None:
        """After how many of a response's tokens closed prefixes are needed; None is after each.

        In order, from 1 on, and `length` itself, all of the response, is the last.
        """
        return None

    def check(self, tokens: TrainerTokens) -> None:
        """Look at what the trainer sent, before anything is queued.

        Raises:
            InvalidRequest: the method needs something the sample does not bring.
        """

    @abstractmethod
    def credit(self, captured: Captured, tokens: TrainerTokens, params: P) -> Credit:
        """The dense rewards of one sequence with at least one response token."""


def proportional(weights: Float64[np.ndarray, " _"], total: float) -> Float64[np.ndarray, " _"]:
    """`total` shared out in proportion to weights that are not negative and not all zero.

    Raises:
        InvalidRequest: such weights share nothing out.
    """
    mass = weights.sum()
    if not (np.isfinite(mass) and mass > 0 and (weights >= 0).all()):
        raise InvalidRequest("weights must be finite, not negative, and not all zero", code="invalid_weights")
    return np.asarray(weights / mass * total)
