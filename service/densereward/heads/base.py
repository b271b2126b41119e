"""What a head is: the last step from a model's hidden states to numbers, in float32 whatever the model's dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import PretrainedConfig

from densereward.errors import ModelError

__all__ = ["Head", "ScoreHead", "Steps", "good_label", "in_float32"]

Unit = Literal["sequence", "token", "step"]

_GOOD = {"good", "correct", "true", "yes", "positive", "pos", "+", "1", "label_1"}


@dataclass(frozen=True, slots=True)
class Steps:
    """How a response is written for a model that judges its steps.

    Attributes:
        cut: what stands between two steps in a response.
        separator: what is written after each step for the model, whose last token is where the step is judged.
    """

    cut: str
    separator: str


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
    """Reads a score, which is about the text so far.

    Attributes:
        unit: what a score is of: the sequence (and likewise of any prefix), a token, or a step.
        steps: how steps are written, where that comes with the family.
    """

    unit: ClassVar[Unit] = "sequence"
    steps: ClassVar[Steps | None] = None

    @classmethod
    @abstractmethod
    def model_class(cls, config: PretrainedConfig) -> Any:
        """What loads the family's models by `from_pretrained`.

        Raises:
            ModelError: the config is that of a model which this head cannot read.
        """

    @abstractmethod
    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Scores at M positions; can be differentiated."""

    def read(self, hidden: Float[Tensor, "M E"], following: Int64[Tensor, " _"]) -> Float32[Tensor, " M"]:  # noqa: ARG002
        """The scores, whatever follows."""
        return self.scores(hidden)


def in_float32(layer: nn.Linear, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, "M L"]:
    """A linear layer in float32, whatever its weights are stored in."""
    bias = None if layer.bias is None else layer.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), layer.weight.float(), bias)


def good_label(config: Any) -> int:
    """Which of two labels means that a token or step is good: by its name, or the second where they have no names.

    Raises:
        ModelError: the labels' names do not say.
    """
    names = [str(config.id2label[index]).lower() for index in range(config.num_labels)]
    good = [index for index, name in enumerate(names) if name in _GOOD]
    if len(good) != 1:
        raise ModelError(
            f"id2label is {config.id2label}, and which of these is the good one cannot be told; name it `good` there",
            labels=names,
        )
    return good[0]
