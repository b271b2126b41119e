"""Attention rows on vLLM: how a request asks for them, and how they are computed from queries and keys.

Imported by the engine and, in vLLM's own processes, by its workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

__all__ = ["RowRequest", "attention_weights", "over_ranks", "row_error"]


@dataclass(frozen=True, slots=True)
class RowRequest:
    """The rows that a request asks for; it travels in the request's pooling parameters.

    Attributes:
        layers: those whose rows are asked for, counted from 0.
        checks: whether each row is to be compared with what the layer's kernel computed.
    """

    layers: tuple[int, ...] = ()
    checks: bool = False

    @property
    def extra_kwargs(self) -> dict[str, Any] | None:
        """As pooling parameters carry it; None where no rows are asked for."""
        return {"densereward": [list(self.layers), self.checks]} if self.layers else None

    @classmethod
    def read(cls, parameters: Any) -> RowRequest:
        """From any pooling parameters."""
        entry = (getattr(parameters, "extra_kwargs", None) or {}).get("densereward")
        return cls(tuple(entry[0]), bool(entry[1])) if entry else cls()


def attention_weights(
    layer: Any, query: Float[Tensor, "H D"], keys: Float[Tensor, "S K D"]
) -> Float32[Tensor, "K G S"]:
    """The attention weights of a sequence's last token, for each of G query heads on each of K key heads.

    Args:
        layer: vLLM's attention layer, for its scale, window, soft cap and sinks.
        query: of the last token.
        keys: of all tokens up to and with the last.
    """
    implementation, length = layer.impl, len(keys)
    grouped = query.float().view(keys.shape[1], -1, query.shape[-1])
    scores: Tensor = torch.einsum("kgd,skd->kgs", grouped, keys.float()) * implementation.scale
    if cap := getattr(implementation, "logits_soft_cap", None):
        scores = cap * torch.tanh(scores / cap)
    if (window := layer.sliding_window) is not None and window < length:
        scores[..., : length - window] = -torch.inf
    sinks = getattr(implementation, "sinks", None)
    if sinks is None:
        return scores.softmax(dim=-1)
    with_sink = torch.cat([sinks.float().view(*scores.shape[:2], 1), scores], dim=-1)
    weights: Tensor = with_sink.softmax(dim=-1)[..., 1:]
    return weights


def row_error(
    weights: Float32[Tensor, "K G S"], values: Float[Tensor, "S K V"], output: Float[Tensor, "H V"]
) -> Float32[Tensor, ""]:
    """How far weights times values are from the kernel's output, in the worst head, relative to the summed sizes."""
    computed, size = (
        torch.einsum("kgs,skv->kgv", weights, each).flatten(0, 1) for each in (values.float(), values.float().abs())
    )
    error = (computed - output.float().view(computed.shape)).abs().amax(dim=-1)
    return (error / size.amax(dim=-1).clamp_min(1e-6)).max()


def over_ranks(
    columns: dict[int, Float32[Tensor, "S _"]], requests: Sequence[RowRequest], ranks: Any
) -> dict[int, Float32[Tensor, "S _"]]:
    """Average rows and sum errors over tensor-parallel ranks, each of which has an equal part of the heads.

    Args:
        columns: this rank's, of the same requests on every rank.
        requests: of the pass.
        ranks: vLLM's group of ranks.
    """
    if ranks.world_size == 1 or not columns:
        return columns
    total = ranks.all_reduce(torch.cat([each.flatten() for each in columns.values()]))
    parts = total.split([each.numel() for each in columns.values()])
    summed = {i: part.view_as(each) for (i, each), part in zip(columns.items(), parts, strict=True)}
    for i, each in summed.items():
        each[:, : len(requests[i].layers)] /= ranks.world_size
    return summed
