"""Heads called `v_head.summary`: GRM's reward layers, and TRL's value head.

GRM's is Linear, ReLU, Linear, or a single layer if `vhead_layer_type` in its config says so. TRL's
`AutoModelForCausalLMWithValueHead` has a single layer of that name, which estimates a policy's value and is no reward:
it is served, and the notice says what it is.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from densereward.heads.base import LayersHead

__all__ = ["ValueHead"]

_VALUE = "the score is the value that a policy was estimated to have, not a reward (TRL's value head)"


class ValueHead(LayersHead):
    """The layers; dropout has no part in inference."""

    name = "value_head"
    families = "GRM (one or more layers), TRL's value heads"
    layer = "v_head.summary"
    renamed = ((r"^pretrained_model\.", ""), (r"^model\.v_head\.", "v_head."))

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if len(self._layers) == 1 and not hasattr(model.config, "vhead_layer_type"):
            self.notice = _VALUE
