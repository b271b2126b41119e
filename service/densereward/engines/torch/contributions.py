"""What each token adds to the score through the scoring token's attention, layer by layer.

In a decoder only attention moves anything between tokens. So the scored tokens can run again by themselves: given the
attention outputs of their first run, they have the same scores, and a backward pass over one position gives the
gradient of the score at each output. With the attention weights held fixed, a head's output is the sum over tokens of
weight times value. A token contributes its part of that sum times the gradient.

The second run is one token a sequence, through the model's own layers: no code here knows their names.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from densereward.capture import Need
from densereward.engines.torch.attention import Replay
from densereward.engines.torch.packed_batch import PackedBatch, ScoredAttention
from densereward.errors import EngineFailure
from densereward.heads.base import DecoderHead

__all__ = ["check_same", "contributions"]

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""How far the score of a second run may be off, relative to the largest: by rounding, not more."""


def contributions(
    backbone: Any, head: DecoderHead, packed: PackedBatch, scored: Float[Tensor, "R E"], gates: Float[Tensor, "B E"]
) -> dict[Need, Float32[Tensor, " K"]]:
    """The contributions that a batch needs, laid out as `packed.row_keys`.

    Args:
        backbone: the decoder.
        head: the score head.
        packed: the batch, after its forward pass.
        scored: hidden states of the scored tokens, from that pass.
        gates: hidden states of every chunk's gate, likewise; empty for a head without a gate.

    Raises:
        EngineFailure: the second run gave other scores, so something but attention moves between the model's tokens.
    """
    layers = sorted(packed.scored_attention)
    with torch.inference_mode(mode=False), torch.enable_grad():
        outputs = {
            layer: output.clone().requires_grad_(layer in packed.scored_attention)
            for layer, output in packed.outputs.items()
        }
        ids, positions = (each[:, packed.scored].clone() for each in (packed.token_ids, packed.position_ids))
        gates = gates.clone()
        hidden = backbone(input_ids=ids, position_ids=positions, use_cache=False, packed=Replay(outputs))
        again = head.parts(hidden.last_hidden_state[0], gates, packed.row_chunks).sum(dim=0)
        gradients = torch.autograd.grad(again.sum(), [outputs[layer] for layer in layers])
    scores = head.parts(scored, gates, packed.row_chunks).sum(dim=0)
    check_same(again.detach(), scores, hidden.last_hidden_state.dtype, "contributions")
    each = {
        layer: _through(packed.scored_attention[layer], gradient[0], packed)
        for layer, gradient in zip(layers, gradients, strict=True)
    }
    return {
        need: torch.stack(list(each.values())).sum(dim=0) if need.layer is None else each[need.layer]
        for need in packed.contributions
    }


def check_same(again: Float32[Tensor, " R"], scores: Float32[Tensor, " R"], dtype: torch.dtype, result: str) -> None:
    """Refuse a second run that does not give the scores of the first.

    Args:
        again: scores of the second run.
        scores: those of the first.
        dtype: the model computes in.
        result: what the second run is for, for the message.

    Raises:
        EngineFailure: the scores differ.
    """
    if not (again - scores).abs().max() <= _TOLERANCE[dtype] * scores.abs().max().clamp(min=1):
        raise EngineFailure(
            f"tokens score differently when they run again to be differentiated; this model cannot serve {result}"
        )


def _through(
    attention: ScoredAttention, gradient: Float[Tensor, "R H E"], packed: PackedBatch
) -> Float32[Tensor, " K"]:
    """Weight times value times gradient, over all heads."""
    groups = len(attention.values)
    toward = gradient.float().unflatten(1, (groups, -1))[packed.row_owner]  # [K, G, H/G, E]
    signed = torch.einsum("kghe,gke->kgh", toward, attention.values.float()).flatten(1)
    return (attention.weights * signed).sum(dim=1)
