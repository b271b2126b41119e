"""OpenRLHF's reward models: one linear layer without a bias, whose scores may be normalised.

The layer is called what `value_head_prefix` in the config says, by default `score`. With `normalize_reward` in the
config, a score is (r - mean) / std, both from the config.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from densereward.heads.base import Checkpoint, normaliser
from densereward.heads.layers import LayersHead, decoder_with

__all__ = ["OpenRlhfHead"]


def _layer(config: Any) -> str:
    return str(getattr(config, "value_head_prefix", None) or "score")


class OpenRlhfHead(LayersHead):
    """The layer, and the normaliser where the config asks for it."""

    name = "openrlhf"
    families = "OpenRLHF's reward models, with their normaliser"

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The config has an entry that OpenRLHF writes."""
        from_openrlhf = any(hasattr(checkpoint.config, name) for name in ("value_head_prefix", "normalize_reward"))
        return from_openrlhf and checkpoint.holds(f"{_layer(checkpoint.config)}.weight")

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """The decoder with the layer on it."""
        return decoder_with(checkpoint, _layer(checkpoint.config))

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        self._take_layers(model, _layer(config))
        self._mean, self._deviation = 0.0, 1.0
        if figures := normaliser(config, "normalize_reward", "mean", "std"):
            self._mean, self._deviation = (float(figure) for figure in figures)

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The output, normalised if the config asks for it."""
        return (self.logits(hidden)[:, 0] - self._mean) / self._deviation
