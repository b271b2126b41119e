"""Heads made of linear layers on a decoder of transformers, found by the names and shapes of their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, PositionHead, in_float32

__all__ = ["LayersHead", "decoder_class", "decoder_with"]


class LayersHead(PositionHead):
    """A linear layer, or several with ReLU between them, on a decoder of transformers.

    Attributes:
        layer: the layers' name in the checkpoint: one linear layer, or a sequence of modules.
        outputs: of the last layer.
        places: indices of the linear layers in the sequence, where the family fixes them.
        bias: whether layers have a bias, where the family fixes that.

    Raises:
        ModelError: the layers have another form.
    """

    layer: ClassVar[str]
    outputs: ClassVar[int] = 1
    places: ClassVar[tuple[int, ...] | None] = None
    bias: ClassVar[bool | None] = None

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The checkpoint has the layers."""
        return bool(_linear_layers(checkpoint, cls.layer))

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """The decoder, with the layers as they are in the checkpoint."""
        found = _linear_layers(checkpoint, cls.layer)
        if cls.places is not None and tuple(sorted(found, key=str)) != cls.places:
            raise ModelError(f"{cls.layer} has weights for layers {sorted(found, key=str)}, not {list(cls.places)}")
        if wrong := [place for place, (*_, bias) in found.items() if cls.bias is not None and bias != cls.bias]:
            what = "a bias is missing" if cls.bias else "there is a bias that the family does not have"
            raise ModelError(f"{cls.layer}: {what} in layer {wrong[0]}")
        return decoder_with(checkpoint, cls.layer)

    def __init__(self, model: PreTrainedModel) -> None:
        self._take_layers(model, self.layer)

    def _take_layers(self, model: PreTrainedModel, layer: str) -> None:
        self._layers = [each for each in model.get_submodule(layer).modules() if isinstance(each, nn.Linear)]
        if not self._layers or self._layers[-1].out_features != self.outputs:
            found = self._layers[-1].out_features if self._layers else 0
            raise ModelError(
                f"{type(model).__name__} has {found} outputs in {layer}, where there must be {self.outputs}"
            )

    def logits(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, "M L"]:
        """The output of the last layer."""
        *inner, last = self._layers
        for each in inner:
            hidden = in_float32(each, hidden).relu()
        return in_float32(last, hidden)

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The single output."""
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
    """A model class: the decoder of the config's family, and linear layers under the names that the checkpoint has.

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
    """Outputs, inputs and bias of each linear layer, by its index in the sequence, or by None if it is the only one."""
    found: dict[int | None, tuple[int, int, bool]] = {}
    for name, shape in checkpoint.shapes.items():
        match = re.fullmatch(rf"(?:.*\.)?{re.escape(layer)}(?:\.(\d+))?\.weight", name)
        if match and len(shape) == 2:
            place = None if match[1] is None else int(match[1])
            found[place] = (*shape, name.removesuffix("weight") + "bias" in checkpoint.shapes)
    return found


def _layers_like(found: Mapping[int | None, tuple[int, int, bool]]) -> nn.Module:
    """The layers, with ReLU at the indices that have no weights."""
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
