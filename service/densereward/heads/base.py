"""What a head is: the last step from a model's hidden states to numbers, in float32 whatever the model's dtype."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel

from densereward.capture import Steps
from densereward.errors import ModelError

__all__ = [
    "Checkpoint",
    "DecoderHead",
    "LayersHead",
    "PositionHead",
    "ScoreHead",
    "decoder_class",
    "decoder_with",
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
        shapes: of its weights, by their names; empty where they could not be read beforehand.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The class that the config names."""
        return next(iter(self.config.architectures or []), "")

    def holds(self, name: str) -> bool:
        """Whether there is a weight of this name, under whatever prefix."""
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

    def written_in(self, separator: str | None) -> Steps | None:
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


class LayersHead(PositionHead):
    """A linear layer, or several with ReLU between them, on a decoder of transformers' own.

    Attributes:
        layer: where the layers are in the checkpoint: one module, or a sequence of them.
        outputs: of the last one.
        places: of the layers in the sequence, where the family has no choice.
        bias: whether layers have one, where the family has no choice.

    Raises:
        ModelError: the layers have another form.
    """

    layer: ClassVar[str]
    outputs: ClassVar[int] = 1
    places: ClassVar[tuple[int, ...] | None] = None
    bias: ClassVar[bool | None] = None

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The layers are there."""
        return bool(_linear_layers(checkpoint, cls.layer))

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """The decoder with the layers on it, as they are in the checkpoint."""
        found = _linear_layers(checkpoint, cls.layer)
        if cls.places is not None and tuple(sorted(found, key=str)) != cls.places:
            raise ModelError(f"{cls.layer} has weights for layers {sorted(found, key=str)}, not {list(cls.places)}")
        if wrong := [place for place, (*_, bias) in found.items() if cls.bias is not None and bias != cls.bias]:
            what = "a bias is missing" if cls.bias else "there is a bias that the family does not have"
            raise ModelError(f"{cls.layer}: {what} in layer {wrong[0]}")
        return decoder_with(checkpoint, cls.layer)

    def __init__(self, model: PreTrainedModel) -> None:
        self._take(model, self.layer)

    def _take(self, model: PreTrainedModel, layer: str) -> None:
        self._layers = [each for each in model.get_submodule(layer).modules() if isinstance(each, nn.Linear)]
        if not self._layers or self._layers[-1].out_features != self.outputs:
            found = self._layers[-1].out_features if self._layers else 0
            raise ModelError(
                f"{type(model).__name__} has {found} outputs in {layer}, where there must be {self.outputs}"
            )

    def logits(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, "M L"]:
        """What the last layer gives."""
        *inner, last = self._layers
        for each in inner:
            hidden = in_float32(each, hidden).relu()
        return in_float32(last, hidden)

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The one output."""
        return self.logits(hidden)[:, 0]


def decoder_class(checkpoint: Checkpoint) -> Any:
    """Transformers' decoder for a checkpoint's config.

    Raises:
        ModelError: transformers has no such decoder.
    """
    if type(checkpoint.config) not in MODEL_MAPPING:
        raise ModelError(f"transformers has no decoder for {checkpoint.config.model_type}")
    return MODEL_MAPPING[type(checkpoint.config)]


def decoder_with(checkpoint: Checkpoint, *layers: str) -> Any:
    """A model class: the decoder of the config's family, and linear layers under the names that a checkpoint has.

    Raises:
        ModelError: the checkpoint has no such layers, or transformers has no such decoder.
    """
    found = {layer: _linear_layers(checkpoint, layer) for layer in layers}
    if missing := [layer for layer in layers if not found[layer]]:
        raise ModelError(f"the checkpoint has no weights called {missing[0]}")
    decoder = decoder_class(checkpoint)
    family: Any = decoder.__bases__[0]

    class DecoderWithHead(family):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, decoder(config))
            for layer in layers:
                *parents, name = layer.split(".")
                holder: nn.Module = self
                for parent in parents:
                    setattr(holder, parent, nn.Module())
                    holder = getattr(holder, parent)
                setattr(holder, name, _layers_like(found[layer]))
            self.post_init()

    DecoderWithHead.__name__ = checkpoint.architecture or decoder.__name__ + "WithHead"
    return DecoderWithHead


def _linear_layers(checkpoint: Checkpoint, layer: str) -> dict[int | None, tuple[int, int, bool]]:
    """By their places in a sequence, or under None where there is one: outputs, inputs, and whether there is a bias."""
    found: dict[int | None, tuple[int, int, bool]] = {}
    for name, shape in checkpoint.shapes.items():
        match = re.fullmatch(rf"(?:.*\.)?{re.escape(layer)}(?:\.(\d+))?\.weight", name)
        if match and len(shape) == 2:
            place = None if match[1] is None else int(match[1])
            found[place] = (*shape, name.removesuffix("weight") + "bias" in checkpoint.shapes)
    return found


def _layers_like(found: Mapping[int | None, tuple[int, int, bool]]) -> nn.Module:
    """The layers, with ReLU in the places that have no weights."""
    if None in found:
        outputs, inputs, bias = found[None]
        return nn.Linear(inputs, outputs, bias=bias)
    modules: list[nn.Module] = []
    for place in range(max(each for each in found if each is not None) + 1):
        if place in found:
            outputs, inputs, bias = found[place]
            modules.append(nn.Linear(inputs, outputs, bias=bias))
        else:
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def in_float32(layer: nn.Linear, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, "M L"]:
    """A linear layer in float32, whatever its weights are stored in."""
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
