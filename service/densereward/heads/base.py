"""What a head is: the last step from a model's hidden states to numbers, in float32 whatever the model's dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float, Float32, Int64
from torch import Tensor

__all__ = ["Head", "ScoreHead"]


class Head(ABC):
    """Reads hidden states, each by itself.

    Attributes:
        name: its row in the table of heads.
    """

    name: ClassVar[str]

    @abstractmethod
    def read(self, hidden: Float[Tensor, "M E"], following: Int64[Tensor, " _"]) -> Float32[Tensor, " M"]:
        """One number a position.

        Args:
            hidden: after the model's last norm, at M positions.
            following: the token after each, for heads that judge it; otherwise empty.
        """


class ScoreHead(Head):
    """Reads a score, which is about the text so far."""

    @abstractmethod
    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Scores at M positions; can be differentiated."""

    def read(self, hidden: Float[Tensor, "M E"], following: Int64[Tensor, " _"]) -> Float32[Tensor, " M"]:  # noqa: ARG002
        """The scores, whatever follows."""
        return self.scores(hidden)
