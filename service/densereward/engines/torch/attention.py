"""One attention function for every decoder: each packed sequence sees itself, its shared prompt, and nothing else.

Registered with transformers' attention registry, so a model calls it with its own post-RoPE queries and keys (keys
and values not yet expanded to all heads). Nothing here is ever of size T x T, and nothing is padded:

    plain attention          fused kernels, stretch by stretch of keys, merged by their log-sum-exps (kernels.py)
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

from densereward.engines.torch.kernels import (
    QUERY_BLOCK,
    Part,
    Variant,
    add,
    attend,
    attend_each,
    beside_sinks,
    explicit,
    visible_keys,
)
from densereward.engines.torch.packed_batch import PackedBatch, Placed
from densereward.engines.torch.rows import keep
from densereward.errors import EngineFailure

__all__ = ["IMPLEMENTATION", "Alone", "Replay", "packed_attention", "register"]

IMPLEMENTATION = "densereward_packed"

# Keywords models pass that do not change what attention computes in a packed forward pass without a cache.
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
    """In place of a packed batch: some tokens run once more, and attention gives them what it gave before.

    Attributes:
        outputs: by layer.
    """

    outputs: dict[int, Float[Tensor, "1 R H E"]]


class Alone:
    """In place of a packed batch: one whole sequence, computed so that it can be differentiated."""


def register() -> None:
    """Make the function known to transformers under `IMPLEMENTATION`."""
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
    packed: PackedBatch | Replay | Alone | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " H"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 N H E"], None]:
    """Attention of every packed sequence, and the scored rows of the layers that `packed` names.

    Raises:
        EngineFailure: the model asks for something this function does not compute (a bias, a mask, bidirectional
            attention), or does not pass the packed batch through.
    """
    if packed is None:
        raise EngineFailure(f"{type(module).__name__} does not hand the packed batch to its attention")
    if isinstance(packed, Replay):
        return packed.outputs[_layer(module)], None
    _refuse_unknown(module, attention_mask, others)
    _refuse_hidden_window(module, sliding_window)
    if isinstance(packed, Alone):
        return _differentiable(query, key, value, Variant(scaling, sliding_window, softcap, s_aux)), None
    window = sliding_window if sliding_window is not None and sliding_window < packed.longest else None
    variant = Variant(scaling, window, softcap, s_aux)
    layer = _layer(module)
    q, k, v = query[0], *_with_kept(key[0], value[0], packed, layer)
    for places, kept in packed.grows:
        kept.extend(layer, k[:, _slice(places)], v[:, _slice(places)])
    keep(layer, q, k, v, packed, variant)
    fused = variant.plain and (not q.is_cuda or q.dtype in (torch.bfloat16, torch.float16))
    output = _fused(q, k, v, packed, variant) if fused else _written_out(q, k, v, packed, variant)
    output = output.transpose(0, 1)[None]
    if packed.contributions:
        packed.outputs[layer] = output[:, packed.scored]
    return output, None


def _differentiable(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Float[Tensor, "1 N H E"]:
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


def _with_kept(k: Tensor, v: Tensor, packed: PackedBatch, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the row, and behind them those of earlier passes."""
    if not packed.kept:
        return k, v
    keys, values = zip(*(kept.layer(layer) for kept in packed.kept), strict=True)
    return torch.cat([k, *keys], 1), torch.cat([v, *values], 1)


def _refuse_unknown(module: nn.Module, mask: Tensor | None, others: dict[str, Any]) -> None:
    name = type(module).__name__
    if mask is not None or not getattr(module, "is_causal", True):
        raise EngineFailure(f"{name} is not plainly causal; this model cannot be packed")
    unknown = [key for key, value in others.items() if value is not None and key not in _HARMLESS]
    if unknown:
        raise EngineFailure(f"{name} asks its attention for {', '.join(sorted(unknown))}, which is not supported")


def _refuse_hidden_window(module: nn.Module, window: int | None) -> None:
    """Some models put their window into the mask alone, and masks are not made here: they would be read wrong."""
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


def _fused(q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, variant: Variant) -> Float[Tensor, "H N E"]:
    """Segments on themselves, trunks on what they follow elsewhere, blocks of closed prefixes on all they follow."""
    scaling = variant.scaling
    lengths = [len(segment) for segment in packed.segments]
    end = sum(lengths)
    own = attend_each(q[:, :end], k[:, :end], v[:, :end], lengths, lengths, scaling, causal=True) if end else None
    if own is not None and any(followers for _, followers in packed.groups):
        beginnings, followers = zip(*((first, after) for first, after in packed.groups if after), strict=True)
        ks, vs = (torch.cat([each[:, _slice(places)] for places in beginnings], 1) for each in (k, v))
        counts = [len(each) for each in followers], [len(each) for each in beginnings]
        after = _span(followers)
        add(own.at(after), attend_each(q[:, after], ks, vs, *counts, scaling, causal=False))
    finished = None if own is None else beside_sinks(own, variant.sinks)
    if finished is not None and not packed.blocks:
        return finished
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    if finished is not None:
        output[:, :end] = finished
    for placed in packed.blocks:
        output[:, _slice(placed.blocks)] = _closed(q, k, v, placed, variant)
    return output


def _closed(q: Tensor, k: Tensor, v: Tensor, placed: Placed, variant: Variant) -> Float[Tensor, "H C E"]:
    """Blocks of closed prefixes: each on itself, on the prompt, and on the response so far.

    A block's tokens stand beside each other as further heads, so that one call serves all the blocks, and what each
    sees of the response is plain causality.
    """
    whole, scaling = placed.piece.whole, variant.scaling
    closed_at = whole.closed_at[placed.piece.blocks.start : placed.piece.blocks.stop]
    size = len(whole.sequence.closing_ids)
    beside = q[:, _slice(placed.blocks)].unflatten(1, (-1, size)).transpose(1, 2).flatten(0, 1)  # [H * size, B, D]
    total = _on_itself(q, k, v, placed.blocks, size, scaling)
    first = int(closed_at[0])
    for stretch in (*placed.prompt, placed.response[:first]):
        if stretch:
            add(total, attend(beside, k[:, _slice(stretch)], v[:, _slice(stretch)], scaling, causal=False))
    if rest := placed.response[first : int(closed_at[-1])]:
        # Query i of a causal call sees keys 0..i, so a block stands where the last token it follows does.
        at = torch.from_numpy(closed_at[1:] - first - 1).to(q.device)
        queries = beside[:, 1:]
        if len(at) < len(rest):
            queries = beside.new_zeros(len(beside), len(rest), beside.shape[-1]).index_copy(1, at, queries)
        seen = attend(queries, k[:, _slice(rest)], v[:, _slice(rest)], scaling, causal=True)
        add(total.at(slice(1, None)), seen if len(at) == len(rest) else Part(seen.output[:, at], seen.weight[:, at]))
    output = beside_sinks(total, variant.sinks)
    return torch.flatten(output.unflatten(0, (-1, size)).transpose(1, 2), 1, 2)


def _on_itself(q: Tensor, k: Tensor, v: Tensor, blocks: range, size: int, scaling: float) -> Part:
    """Each block's tokens on the block's own, causally, laid out as further heads."""
    places = _slice(blocks)
    groups = len(q) // len(k)
    qs = q[:, places].unflatten(0, (-1, groups)).unflatten(2, (-1, size)).float()  # [K, G, B, size, D]
    ks, vs = (each[:, places].unflatten(1, (-1, size))[:, None].float() for each in (k, v))  # [K, 1, B, size, D]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    logits = (qs @ ks.transpose(-1, -2) * scaling).masked_fill(later, -torch.inf)
    output = (logits.softmax(dim=-1) @ vs).to(v.dtype)  # [K, G, B, size, E]
    weight = logits.logsumexp(dim=-1)
    return Part(output.transpose(2, 3).flatten(0, 2), weight.transpose(2, 3).flatten(0, 2))


def _written_out(q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, variant: Variant) -> Float[Tensor, "H N E"]:
    """Any variant, a block of queries at a time against the keys of the sequence that they can see."""
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    positions = packed.key_positions
    stretches = [(prompt, range(0)) for prompt, _ in packed.groups if prompt in packed.segments]
    stretches += [(each.trunk, each.shared) for each in packed.placed]
    for own, shared in stretches:
        keys = torch.tensor([*shared, *own], device=q.device)
        for first in range(0, len(own), QUERY_BLOCK):
            queries = _slice(own[first : first + QUERY_BLOCK])
            start = 0 if variant.window is None else max(0, len(shared) + first - variant.window + 1)
            seen = keys[start : len(shared) + first + QUERY_BLOCK]
            visible = visible_keys(positions[queries], positions[seen], variant.window)
            output[:, queries] = explicit(q[:, queries], k[:, seen], v[:, seen], visible, variant)
    for placed in packed.blocks:
        _write_blocks(output, q, k, v, placed, positions, variant)
    return output


def _write_blocks(
    output: Tensor, q: Tensor, k: Tensor, v: Tensor, placed: Placed, positions: Tensor, variant: Variant
) -> None:
    """Closed prefixes of one sequence, some blocks at a time, on the sequence so far and on themselves."""
    whole = placed.piece.whole
    size, start = len(whole.sequence.closing_ids), whole.sequence.prompt_length
    closed_at = torch.from_numpy(whole.closed_at).to(q.device)[_slice(placed.piece.blocks)]
    places = [place for stretch in (*placed.prompt, placed.response) for place in stretch]
    sequence = torch.tensor(places, dtype=torch.int64, device=q.device)
    step = max(1, QUERY_BLOCK // size) * size
    for first in range(0, len(placed.blocks), step):
        queries = torch.tensor(placed.blocks[first : first + step], device=q.device)
        block = torch.arange(first, first + len(queries), device=q.device) // size
        before = positions[sequence] < (start + closed_at[block])[:, None]
        visible = torch.cat([before, block[:, None] == block], dim=1)
        keys = torch.cat([sequence, queries])
        visible &= visible_keys(positions[queries], positions[keys], variant.window)
        output[:, queries] = explicit(q[:, queries], k[:, keys], v[:, keys], visible, variant)


def _span(ranges: Sequence[range]) -> slice:
    """Ranges that lie side by side, as one."""
    return slice(ranges[0].start, ranges[-1].stop)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop)
