"""One attention function for every decoder: causal within each packed sequence, and the scored rows on the side.

Registered with transformers' attention registry, so a model calls it with its own post-RoPE queries and keys (keys
and values not yet expanded to all heads). Nothing here is ever of size T x T:

    CUDA in half precision          variable-length flash attention over the whole row
    plain causal                    fused attention, sequence by sequence
    sliding window or soft-capping  blocks of queries against the keys they can see

Shapes: H query heads, K key heads, D head size, N packed tokens.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from densereward.engines.torch.packing import PackedBatch
from densereward.errors import EngineFailure

__all__ = ["IMPLEMENTATION", "packed_attention", "register", "scored_rows"]

IMPLEMENTATION = "densereward_packed"

QUERY_BLOCK = 256
"""Queries at a time on the blocked path: its scores take H x 256 x T, which grows with T alone."""

# Keywords models pass that do not change what attention computes in a packed forward pass without a cache.
_HARMLESS = {"cache_position", "dropout", "is_causal", "output_attentions", "position_ids", "use_cache"}

# Released versions differ: where the argument is missing, fewer key heads than query heads are simply accepted.
_GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def register() -> None:
    """Make the function known to transformers under `IMPLEMENTATION`."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    attention_mask: None,
    *,
    scaling: float,
    packed: PackedBatch | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 N H D"], None]:
    """Attention of every packed sequence on itself, and the scored rows of the layers that `packed` names.

    Raises:
        EngineFailure: the model asks for something this function does not compute (attention sinks, a bias, a mask,
            bidirectional attention), or does not pass the packed batch through.
    """
    if packed is None:
        raise EngineFailure(f"{type(module).__name__} does not hand the packed batch to its attention")
    _refuse_unknown(module, attention_mask, others)
    window = sliding_window if sliding_window is not None and sliding_window < packed.max_length else None
    q, k, v = query[0], key[0], value[0]
    layer: int = module.layer_idx  # type: ignore[assignment]  # every transformers attention module carries its own
    if layer in packed.row_layers:
        packed.rows[layer] = scored_rows(q, k, packed, scaling=scaling, window=window, softcap=softcap)
    if softcap is None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        output = _variable_length(q, k, v, packed, scaling, window)
    elif softcap is None and window is None:
        output = _by_segment(q, k, v, packed, scaling)
    else:
        output = _blocked(q, k, v, packed, scaling, window, softcap)
    return output[None], None


def _refuse_unknown(module: nn.Module, mask: Tensor | None, others: dict[str, Any]) -> None:
    name = type(module).__name__
    if mask is not None or not getattr(module, "is_causal", True):
        raise EngineFailure(f"{name} is not plainly causal; this model cannot be packed")
    unknown = [key for key, value in others.items() if value is not None and key not in _HARMLESS]
    if unknown:
        raise EngineFailure(f"{name} asks its attention for {', '.join(sorted(unknown))}, which is not supported")


def scored_rows(
    query: Float[Tensor, "H N D"],
    key: Float[Tensor, "K N D"],
    packed: PackedBatch,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Float32[Tensor, " N"]:
    """The attention row of each sequence's scored token, averaged over heads, in float32.

    One product of every key with its own sequence's scored query, then a softmax per sequence: O(N), no loop.
    """
    heads, _, size = query.shape
    groups = heads // key.shape[0]
    queries = query[:, packed.scored].float().view(-1, groups, len(packed.scored), size)  # [K, G, B, D]
    per_key = queries[:, :, packed.segment]  # [K, G, N, D]
    logits = torch.einsum("kgnd,knd->nkg", per_key, key.float()).flatten(1) * scaling  # [N, H]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(_unseen(packed, window)[:, None], -torch.inf)
    index = packed.segment[:, None].expand_as(logits)
    highest = logits.new_full((len(packed.scored), heads), -torch.inf).scatter_reduce(0, index, logits, "amax")
    weights = torch.exp(logits - highest[packed.segment])
    sums = torch.zeros_like(highest).index_add(0, packed.segment, weights)
    return (weights / sums[packed.segment]).mean(dim=1)


def _unseen(packed: PackedBatch, window: int | None) -> Tensor:
    """[N], true where the sequence's scored token cannot look: after it, or before its window."""
    positions = torch.arange(len(packed.segment), device=packed.segment.device)
    scored = packed.scored[packed.segment]
    unseen = positions > scored
    return unseen if window is None else unseen | (positions <= scored - window)


def _by_segment(q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float) -> Tensor:
    output = q.new_empty(q.shape[1], q.shape[0], v.shape[-1])
    for start, stop in packed.segments:
        part = slice(start, stop)
        attended = nn.functional.scaled_dot_product_attention(
            q[None, :, part], k[None, :, part], v[None, :, part], is_causal=True, scale=scaling, enable_gqa=True
        )
        output[part] = attended[0].transpose(0, 1)
    return output


def _variable_length(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, window: int | None
) -> Tensor:
    # Flash attention counts the keys to the left of a query, transformers the query itself too.
    left = -1 if window is None else window - 1
    lengths, longest = packed.cumulative_lengths, packed.max_length
    output = varlen_attn(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        lengths,
        lengths,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        **_GROUPED_HEADS,
    )
    return cast("Tensor", output)  # a pair only where the log-sum-exp is asked for


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    output = q.new_empty(q.shape[1], q.shape[0], v.shape[-1])
    for start, stop in packed.segments:
        for first in range(start, stop, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, stop)
            seen = slice(start if window is None else max(start, first - window + 1), last)
            block = _attend(q[:, first:last], k[:, seen], v[:, seen], first - seen.start, scaling, window, softcap)
            output[first:last] = block.transpose(0, 1)
    return output


def _attend(
    q: Tensor, k: Tensor, v: Tensor, offset: int, scaling: float, window: int | None, softcap: float | None
) -> Float[Tensor, "H Q D"]:
    """Queries against the keys they can see; the first query stands `offset` keys after the first key."""
    grouped = q.reshape(k.shape[0], -1, *q.shape[1:])
    logits = (grouped @ k[:, None].transpose(-1, -2)).float() * scaling  # [K, G, Q, keys]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    distance = torch.arange(q.shape[1], device=q.device)[:, None] + offset - torch.arange(k.shape[1], device=q.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).to(v.dtype)
    return torch.flatten(weights @ v[:, None], 0, 1)
