"""Where attention is captured: the scored tokens' rows, and what response tokens received, of each layer."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from densereward.capture import AttentionRow, Contributions
from densereward.engines.torch.kernels import QUERY_BLOCK, AttentionVariant, explicit_weights, visible_keys
from densereward.engines.torch.packed_batch import PackedBatch, PlacedChunk, ScoredAttention

__all__ = ["capture_attention"]


def capture_attention(
    layer: int, q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, variant: AttentionVariant
) -> None:
    """Put what the batch needs of this layer's attention into `packed`, beside the layer's output."""
    needs = {AttentionRow(layer), Contributions(layer), Contributions()} & packed.row_needs
    if needs:
        weights = scored_weights(q, k, packed, variant)
    if AttentionRow(layer) in needs:
        packed.rows[AttentionRow(layer)] = weights.mean(dim=1)
    if needs - {AttentionRow(layer)}:
        packed.scored_attention[layer] = ScoredAttention(weights, v[:, packed.row_keys])
    for index, placed in enumerate(packed.placed):
        if (index, layer) in packed.received:
            packed.received[index, layer] = received_attention(q, k, placed, packed.key_positions, variant)


def scored_weights(
    query: Float[Tensor, "H N D"], key: Float[Tensor, "K L D"], packed: PackedBatch, variant: AttentionVariant
) -> Float32[Tensor, "R H"]:
    """The attention of each sequence's scored token on `packed.row_keys` in every head, in float32.

    One product of every key with its own sequence's scored query, then a softmax per sequence: O(N), no loop.
    """
    owner = packed.row_owner
    heads, groups = query.shape[0], query.shape[0] // key.shape[0]
    queries = query[:, packed.scored].float().reshape(key.shape[0], groups, len(packed.scored), -1)[:, :, owner]
    logits = torch.einsum("kgrd,krd->rkg", queries, key[:, packed.row_keys].float()).flatten(1) * variant.scaling
    if variant.softcap is not None:
        logits = torch.tanh(logits / variant.softcap) * variant.softcap
    if variant.window is not None:
        positions = packed.key_positions
        far = positions[packed.row_keys] <= positions[packed.scored][owner] - variant.window
        logits = logits.masked_fill(far[:, None], -torch.inf)
    sinks = logits.new_full((heads,), -torch.inf) if variant.sinks is None else variant.sinks.float()
    highest = sinks.repeat(len(packed.scored), 1)
    highest = highest.scatter_reduce(0, owner[:, None].expand_as(logits), logits, "amax")
    weights = torch.exp(logits - highest[owner])
    sums = torch.exp(sinks - highest).index_add(0, owner, weights)
    return weights / sums[owner]


def received_attention(
    query: Float[Tensor, "H N D"],
    key: Float[Tensor, "K L D"],
    placed: PlacedChunk,
    positions: Int64[Tensor, " L"],
    variant: AttentionVariant,
) -> Float32[Tensor, " S"]:
    """The attention that the chunk's queries in the response give to each earlier key of the sequence.

    Summed over the queries, averaged over heads, in float32. Queries are taken in blocks, so that memory is
    256 x S and not S x S.
    """
    sequence = placed.chunk.expanded.sequence
    keys = torch.tensor([*placed.context, *placed.own], device=query.device)
    first, last = (
        min(max(position - len(placed.context), 0), len(placed.own))
        for position in (sequence.prompt_length, sequence.response_stop)
    )
    response = placed.own[first:last]
    sums = torch.zeros(len(keys), device=query.device)
    for start in range(response.start, response.stop, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, response.stop))
        visible = visible_keys(positions[queries], positions[keys], variant.window)
        weights = explicit_weights(query[:, queries], key[:, keys], visible, variant).flatten(0, 1).mean(dim=0)
        itself = positions[queries][:, None] == positions[keys]
        sums += weights.masked_fill(itself, 0).sum(dim=0)
    return sums
