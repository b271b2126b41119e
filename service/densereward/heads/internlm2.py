"""InternLM2's reward models: one linear layer called `v_head`, read at a token that is written after the dialogue.

The decoder is Llama's under other names, with queries, keys and values in one matrix: for each key head its queries,
then the key, then the value. The matrix is split while it is loaded, so that transformers' Llama runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint
from densereward.heads.layers import LayersHead

__all__ = ["InternLM2Head"]

_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class InternLM2Head(LayersHead):
    """The layer.

    Raises:
        ModelError: the config does not name the token at which the score is read.
    """

    name = "internlm2"
    families = "InternLM2-Reward"
    layer = "v_head"
    bias = False

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The architecture is InternLM2's reward model."""
        return checkpoint.architecture == "InternLM2ForRewardModel"

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """Llama with the layer on it; transformers is told how to convert the weights."""
        model_class = super().model_class(checkpoint)
        renamed = [WeightRenaming(theirs, ours) for theirs, ours in _NAMES.items()]
        parts = [f"self_attn.{part}_proj" for part in "qkv"]
        split = WeightConverter("attention.wqkv", parts, [_SplitAttention()])
        register_checkpoint_conversion_mapping(model_class.__name__, [*renamed, split], overwrite=True)
        return model_class

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        token = getattr(model.config, "reward_token_id", None)
        if not isinstance(token, int):
            raise ModelError("the config has no `reward_token_id`, the token at which the score is read")
        self.score_token = token


class _SplitAttention(ConversionOps):
    """Splits one matrix, or one bias, into queries, keys and values."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002
        target_patterns: list[str],
        **context: Any,
    ) -> dict[str, Any]:
        """The three, by their names."""
        config = context["config"]
        (value,) = input_dict.values()
        fused: Tensor = value[0] if isinstance(value, list) else value
        heads = config.num_key_value_heads
        groups = fused.unflatten(0, (heads, config.num_attention_heads // heads + 2, -1))
        parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
        return {name: part.flatten(0, 2).contiguous() for name, part in zip(target_patterns, parts, strict=True)}
