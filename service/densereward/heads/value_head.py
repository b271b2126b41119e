"""Heads called `v_head.summary`: GRM's reward layers, and TRL's value head.

GRM's is Linear, ReLU, Linear, or a single layer, as `vhead_layer_type` in its config says. The single layer of TRL's
`AutoModelForCausalLMWithValueHead` estimates a policy's value, which is no reward: it is served, with a notice.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from densereward.heads.layers import LayersHead

__all__ = ["ValueHead"]

_VALUE = "the score is the value that a policy was estimated to have, not a reward (TRL's value head)"


class ValueHead(LayersHead):
    """The layers; dropout does nothing in inference."""

    name = "value_head"
    families = "GRM (one or more layers), TRL's value heads"
    layer = "v_head.summary"
    renamed = ((r"^pretrained_model\.", ""), (r"^model\.v_head\.", "v_head."))

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if len(self._layers) == 1 and not hasattr(model.config, "vhead_layer_type"):
            self.notice = _VALUE
