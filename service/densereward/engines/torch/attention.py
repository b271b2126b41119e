"""One attention function for every decoder: each packed sequence attends to itself and its prompt, and nothing else.

It is in transformers' attention registry, so a model calls it with its own post-RoPE queries and keys (keys and values
not yet expanded to all heads). What the methods need of each layer's attention is captured here too
(`attention_capture`). Nothing is of size T x T, and nothing is padded:

    plain attention          fused kernels, one segment of keys at a time, merged by their log-sum-exps (kernels.py)
    attention sinks          take their share of what was merged
    window or soft-capping   blocks of queries against the keys they can see

Shapes: H query heads, K key heads, D head size, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from densereward.engines.torch.attention_capture import capture_attention
from densereward.engines.torch.kernels import (
    QUERY_BLOCK,
    AttentionVariant,
    PartialAttention,
    apply_sinks,
    attend,
    attend_segments,
    explicit,
    merge,
    visible_keys,
)
from densereward.engines.torch.packed_batch import PackedBatch, PlacedChunk
from densereward.errors import EngineFailure

__all__ = ["IMPLEMENTATION", "Replay", "SingleSequence", "packed_attention", "register"]

IMPLEMENTATION = "densereward_packed"

# Keywords that models pass and that change nothing here.
_HARMLESS = {
    "cache_position",
    "dropout",
    "is_causal",
    "output_attentions",
    "output_router_logits",
    "position_ids",
    "use_cache",
}


@dataclass(frozen=True, slots=True)
class Replay:
    """In place of a packed batch: the scored tokens run again, and attention returns the outputs of their first run.

    Attributes:
        outputs: by layer.
    """

    outputs: dict[int, Float[Tensor, "1 R H E"]]


class SingleSequence:
    """In place of a packed batch: one sequence, with attention that can be differentiated."""


def register() -> None:
    """Put the function into transformers' registry, under `IMPLEMENTATION`."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N E"],
    attention_mask: None,
    *,
    scaling: float,
    packed: PackedBatch | Replay | SingleSequence | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " H"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 N H E"], None]:
    """Attention of every packed sequence; what `packed` needs of this layer is put into it.

    Raises:
        EngineFailure: the model asks for something this function does not compute (a bias, a mask, bidirectional
            attention), or does not pass the packed batch through.
    """
    if packed is None:
        raise EngineFailure(f"{type(module).__name__} does not pass the packed batch to its attention")
    if isinstance(packed, Replay):
        return packed.outputs[_layer(module)], None
    _refuse_unknown(module, attention_mask, others)
    _refuse_hidden_window(module, sliding_window)
    if isinstance(packed, SingleSequence):
        return _differentiable(query, key, value, AttentionVariant(scaling, sliding_window, softcap, s_aux)), None
    window = sliding_window if sliding_window is not None and sliding_window < packed.longest else None
    variant = AttentionVariant(scaling, window, softcap, s_aux)
    layer = _layer(module)
    q, k, v = query[0], *_with_cached(key[0], value[0], packed, layer)
    for places, cache in packed.to_cache:
        cache.extend(layer, k[:, _slice(places)], v[:, _slice(places)])
    capture_attention(layer, q, k, v, packed, variant)
    fused = variant.plain and (not q.is_cuda or q.dtype in (torch.bfloat16, torch.float16))
    output = _fused(q, k, v, packed, variant) if fused else _explicit(q, k, v, packed, variant)
    output = output.transpose(0, 1)[None]
    if packed.contributions:
        packed.outputs[layer] = output[:, packed.scored]
    return output, None


def _differentiable(query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant) -> Float[Tensor, "1 N H E"]:
    """Causal attention of one sequence, by functions that have derivatives."""
    if variant.plain and variant.sinks is None:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=variant.scaling, enable_gqa=True
        )
    else:
        positions = torch.arange(query.shape[2], device=query.device)
        visible = visible_keys(positions, positions, variant.window)
        output = explicit(query[0], key[0], value[0], visible, variant)[None]
    return output.transpose(1, 2)


def _layer(module: nn.Module) -> int:
    layer: Any = module.layer_idx  # every transformers attention module carries its own
    return int(layer)


def _with_cached(k: Tensor, v: Tensor, packed: PackedBatch, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the row, and behind them the cached ones."""
    if not packed.caches:
        return k, v
    keys, values = zip(*(cache.layer(layer) for cache in packed.caches), strict=True)
    return torch.cat([k, *keys], 1), torch.cat([v, *values], 1)


def _refuse_unknown(module: nn.Module, mask: Tensor | None, others: dict[str, Any]) -> None:
    name = type(module).__name__
    if mask is not None or not getattr(module, "is_causal", True):
        raise EngineFailure(f"{name} is not plainly causal; this model cannot be packed")
    unknown = [key for key, value in others.items() if value is not None and key not in _HARMLESS]
    if unknown:
        raise EngineFailure(f"{name} asks its attention for {', '.join(sorted(unknown))}, which is not supported")


def _refuse_hidden_window(module: nn.Module, window: int | None) -> None:
    """Some models put their window into the mask alone. No mask is made here, so they would be read without it."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        kind = kinds[module.layer_idx]
    else:
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kind = "sliding_attention" if windowed else "full_attention"
    if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
        raise EngineFailure(
            f"{type(module).__name__} hides its {kind} from its attention function; it cannot be packed"
        )


def _fused(q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, variant: AttentionVariant) -> Float[Tensor, "H N E"]:
    """Segments on themselves, own tokens on their context, blocks of closed prefixes on all that comes before them."""
    scaling = variant.scaling
    lengths = [len(segment) for segment in packed.segments]
    end = sum(lengths)
    total = attend_segments(q[:, :end], k[:, :end], v[:, :end], lengths, lengths, scaling, causal=True) if end else None
    if total is not None and any(after for _, after in packed.groups):
        total = total.in_float32()
        contexts, afters = zip(*((context, after) for context, after in packed.groups if after), strict=True)
        ks, vs = (torch.cat([each[:, _slice(places)] for places in contexts], 1) for each in (k, v))
        counts = [len(each) for each in afters], [len(each) for each in contexts]
        queries = _span(afters)
        merge(total.at(queries), attend_segments(q[:, queries], ks, vs, *counts, scaling, causal=False))
    finished = None if total is None else apply_sinks(total, variant.sinks)
    if finished is not None and not packed.blocks:
        return finished.to(q.dtype)
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    if finished is not None:
        output[:, :end] = finished
    for placed in packed.blocks:
        output[:, _slice(placed.blocks)] = _fused_blocks(q, k, v, placed, variant)
    return output


def _fused_blocks(
    q: Tensor, k: Tensor, v: Tensor, placed: PlacedChunk, variant: AttentionVariant
) -> Float[Tensor, "H C E"]:
    """Blocks of closed prefixes: each on itself, on the prompt, and on its prefix of the response.

    Token j of every block is taken as a query of head j, so that one call serves all the blocks, and what each sees
    of the response is plain causality.
    """
    expanded, scaling = placed.chunk.expanded, variant.scaling
    prefix_lengths = expanded.prefix_lengths[placed.chunk.blocks.start : placed.chunk.blocks.stop]
    size = len(expanded.sequence.closing_ids)
    queries = q[:, _slice(placed.blocks)].unflatten(1, (-1, size)).transpose(1, 2).flatten(0, 1)  # [H * size, B, D]
    total = _blocks_on_themselves(q, k, v, placed.blocks, size, scaling)
    first = int(prefix_lengths[0])
    for segment in (*placed.prompt, placed.response[:first]):
        if segment:
            merge(total, attend(queries, k[:, _slice(segment)], v[:, _slice(segment)], scaling, causal=False))
    if rest := placed.response[first : int(prefix_lengths[-1])]:
        # Query i of a causal call sees keys 0..i, so a block's query goes to the index of its prefix's last token.
        at = torch.from_numpy(prefix_lengths[1:] - first - 1).to(q.device)
        later = queries[:, 1:]
        if len(at) < len(rest):
            later = queries.new_zeros(len(queries), len(rest), queries.shape[-1]).index_copy(1, at, later)
        part = attend(later, k[:, _slice(rest)], v[:, _slice(rest)], scaling, causal=True)
        if len(at) < len(rest):
            part = PartialAttention(part.output[:, at], part.log_sum_exp[:, at])
        merge(total.at(slice(1, None)), part)
    output = apply_sinks(total, variant.sinks)
    return torch.flatten(output.unflatten(0, (-1, size)).transpose(1, 2), 1, 2)


def _blocks_on_themselves(
    q: Tensor, k: Tensor, v: Tensor, blocks: range, size: int, scaling: float
) -> PartialAttention:
    """Each block's tokens on the block's own, causally; token j of every block as a query of head j."""
    places = _slice(blocks)
    groups = len(q) // len(k)
    qs = q[:, places].unflatten(0, (-1, groups)).unflatten(2, (-1, size)).float()  # [K, G, B, size, D]
    ks, vs = (each[:, places].unflatten(1, (-1, size))[:, None].float() for each in (k, v))  # [K, 1, B, size, D]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    logits = (qs @ ks.transpose(-1, -2) * scaling).masked_fill(later, -torch.inf)
    output = logits.softmax(dim=-1) @ vs  # [K, G, B, size, E]
    log_sum_exp = logits.logsumexp(dim=-1)
    return PartialAttention(output.transpose(2, 3).flatten(0, 2), log_sum_exp.transpose(2, 3).flatten(0, 2))


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, variant: AttentionVariant
) -> Float[Tensor, "H N E"]:
    """Any variant, a block of queries at a time against the keys of the sequence that they can see."""
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    positions = packed.key_positions
    segments = [(context, range(0)) for context, _ in packed.groups if context in packed.segments]
    segments += [(each.own, each.context) for each in packed.placed]
    for own, context in segments:
        keys = torch.tensor([*context, *own], device=q.device)
        for first in range(0, len(own), QUERY_BLOCK):
            queries = _slice(own[first : first + QUERY_BLOCK])
            start = 0 if variant.window is None else max(0, len(context) + first - variant.window + 1)
            seen = keys[start : len(context) + first + QUERY_BLOCK]
            visible = visible_keys(positions[queries], positions[seen], variant.window)
            output[:, queries] = explicit(q[:, queries], k[:, seen], v[:, seen], visible, variant)
    for placed in packed.blocks:
        _explicit_blocks(output, q, k, v, placed, positions, variant)
    return output


def _explicit_blocks(
    output: Tensor, q: Tensor, k: Tensor, v: Tensor, placed: PlacedChunk, positions: Tensor, variant: AttentionVariant
) -> None:
    """Write the output of one sequence's blocks of closed prefixes, some blocks at a time."""
    expanded = placed.chunk.expanded
    size, start = len(expanded.sequence.closing_ids), expanded.sequence.prompt_length
    prefix_lengths = torch.from_numpy(expanded.prefix_lengths).to(q.device)[_slice(placed.chunk.blocks)]
    places = [place for segment in (*placed.prompt, placed.response) for place in segment]
    sequence = torch.tensor(places, dtype=torch.int64, device=q.device)
    step = max(1, QUERY_BLOCK // size) * size
    for first in range(0, len(placed.blocks), step):
        queries = torch.tensor(placed.blocks[first : first + step], device=q.device)
        block = torch.arange(first, first + len(queries), device=q.device) // size
        before = positions[sequence] < (start + prefix_lengths[block])[:, None]
        visible = torch.cat([before, block[:, None] == block], dim=1)
        keys = torch.cat([sequence, queries])
        visible &= visible_keys(positions[queries], positions[keys], variant.window)
        output[:, queries] = explicit(q[:, queries], k[:, keys], v[:, keys], visible, variant)


def _span(ranges: Sequence[range]) -> slice:
    """Adjacent ranges as one slice."""
    return slice(ranges[0].start, ranges[-1].stop)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop)
