"""The layers of a model in vLLM's workers whose attention rows can be captured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["attention_layers"]


def attention_layers(config: Any) -> tuple[dict[int, Any], dict[int, str]]:
    """The layers whose rows can be captured, by their numbers, and for the others the reason why not.

    Args:
        config: vLLM's.
    """
    found: dict[int, Any] = {}
    missing: dict[int, str] = {}
    for index, layer in _numbered(config.compilation_config.static_forward_context):
        if reason := _why_not(layer):
            missing[index] = reason
        elif index in found:
            missing[index] = "it has several attentions"
        else:
            found[index] = layer
    return {index: layer for index, layer in found.items() if index not in missing}, missing


def _numbered(layers: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Attention-like layers, by the number in their names; vLLM registers others, such as experts, beside them."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    for name, layer in layers.items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if len(numbers) == 1 and isinstance(layer, AttentionLayerBase):
            yield numbers[0], layer


def _why_not(layer: Any) -> str | None:
    """The reason why a layer's row cannot be captured; None where it can."""
    from vllm.model_executor.layers.attention import Attention

    if type(layer) is not Attention:
        return f"its attention is {type(layer).__name__}"
    if layer.attn_type != "decoder":
        return f"its attention is that of an {layer.attn_type}"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return "its attention has linear biases"
    if layer.query_quant is not None:
        return "its queries are quantised"
    if layer.kv_sharing_target_layer_name is not None:
        return "it shares the keys of another layer"
    return None
