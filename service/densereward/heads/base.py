"""What a head is: the last step from a model's hidden states to scores, in float32 whatever the model's dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from densereward.capture import Steps
from densereward.errors import ModelError

__all__ = [
    "Checkpoint",
    "DecoderHead",
    "PositionHead",
    "ScoreHead",
    "good_label",
    "in_float32",
    "normaliser",
    "refuse_several_labels",
]

Unit = Literal["sequence", "token", "step"]

_GOOD = {"good", "correct", "true", "yes", "positive", "pos", "+", "1", "label_1"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a model before it is loaded.

    Attributes:
        config: its config.
        shapes: of its weights, by name; empty where the files were not read.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The class that the config names."""
        return next(iter(self.config.architectures or []), "")

    def holds(self, name: str) -> bool:
        """Whether there is a weight of this name, under any prefix."""
        return any(each == name or each.endswith("." + name) for each in self.shapes)


class ScoreHead(ABC):
    """What the reward models of one family have in common: how they are recognised, loaded and described.

    How a score is read is not said here, since the model itself may do that for a whole text (`heads.encoder`).

    Attributes:
        name: the head's row in the table of heads.
        families: the models that have it, for the table of families.
        unit: what a score is of: a sequence (and likewise any prefix), a token, or a step.
        steps: how steps are written, where the family fixes that.
        renamed: patterns of weight names in its checkpoints, and what they are called here.
        notice: what an operator must know of its scores; None where they are rewards as they stand.
        score_token: the id written after the closing tokens, for a family whose score is read there.
        pooling: what a score is read from: one position, the mean over all positions so far, or the whole text.
        tokens: tokens that the head knows by their ids; the tokenizer must have the same ids for them.
        gate: the text that a prompt must end with; the head's gate is read where it begins (`heads.gated`).
        objectives: whether a score is a sum over several objectives.
    """

    name: ClassVar[str]
    families: ClassVar[str]
    unit: ClassVar[Unit] = "sequence"
    steps: ClassVar[Steps | None] = None
    renamed: ClassVar[tuple[tuple[str, str], ...]] = ()
    notice: str | None = None
    score_token: int | None = None
    pooling: Literal["position", "mean", "text"] = "position"
    tokens: ClassVar[Mapping[str, int]] = {}
    gate: ClassVar[str | None] = None
    objectives: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the head's families."""

    @classmethod
    @abstractmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """The class whose `from_pretrained` loads the family's models.

        Raises:
            ModelError: this head cannot read the model in the checkpoint.
        """

    def steps_with(self, separator: str | None) -> Steps | None:
        """How steps are written: as the family does, or with an operator's separator after each step."""
        if self.steps is None and separator is not None and self.unit == "token":
            return Steps(cut=separator, separator=separator)
        return self.steps


class DecoderHead(ScoreHead):
    """A head that is read from a decoder's hidden states."""

    @abstractmethod
    def parts(
        self,
        hidden: Float[Tensor, "M E"],
        gates: Float[Tensor, "B E"],
        owner: Int64[Tensor, " M"] | Sequence[int],
    ) -> Float32[Tensor, "K M"]:
        """What each of K objectives adds to the scores at M positions; a score is their sum. Can be differentiated.

        Args:
            hidden: hidden states at the positions, after the model's last norm.
            gates: hidden states at the gates of B sequences; not read by a head without a gate.
            owner: the sequence of each position.
        """


class PositionHead(DecoderHead):
    """A head whose score at a position is made of that position's hidden state alone."""

    @abstractmethod
    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Scores at M positions, in float32. Can be differentiated."""

    def parts(
        self,
        hidden: Float[Tensor, "M E"],
        gates: Float[Tensor, "B E"],  # noqa: ARG002
        owner: Int64[Tensor, " M"] | Sequence[int],  # noqa: ARG002
    ) -> Float32[Tensor, "K M"]:
        """The scores, as those of a single objective."""
        return self.scores(hidden)[None]


def in_float32(layer: nn.Linear, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, "M L"]:
    """A linear layer's output, computed in float32 whatever the dtype of its weights."""
    bias = None if layer.bias is None else layer.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), layer.weight.float(), bias)


def refuse_several_labels(config: Any) -> None:
    """Refuse a sequence classifier that has no single score.

    Raises:
        ModelError: it has several labels.
    """
    if config.num_labels != 1:
        raise ModelError(f"num_labels = {config.num_labels}; a reward model that scores sequences has 1")


def normaliser(config: Any, switch: str, center: str, spread: str) -> tuple[Any, Any] | None:
    """The two figures by which scores are normalised; None where the config does not ask for it.

    Args:
        config: the model's.
        switch: the config's entry that asks for it.
        center: the entry that is subtracted from scores.
        spread: the entry that says how far scores spread.

    Raises:
        ModelError: the config asks for it and lacks a figure.
    """
    if not getattr(config, switch, False):
        return None
    figures = getattr(config, center, None), getattr(config, spread, None)
    if figures[0] is None or not figures[1]:
        raise ModelError(f"{switch} is set, and the config has no `{center}` and `{spread}` to normalise by")
    return figures


def good_label(config: Any) -> int:
    """The index of the label that means a good token or step: by its name, or the second where labels have no names.

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
