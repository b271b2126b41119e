"""Attention rows on vLLM: how a request asks for them, and how they are computed from queries and keys.

Imported on both sides: by the engine, and inside vLLM's workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

__all__ = ["Asked", "attended", "off", "over_ranks"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants, as it travels in its pooling parameters.

    Attributes:
        layers: of which rows are wanted, counted from 0.
        checks: whether each row is to be compared with what the layer's kernel gave.
    """

    layers: tuple[int, ...] = ()
    checks: bool = False

    @property
    def written(self) -> dict[str, Any] | None:
        """As pooling parameters carry it; None where nothing is wanted."""
        return {"densereward": [list(self.layers), self.checks]} if self.layers else None

    @classmethod
    def read(cls, parameters: Any) -> Asked:
        """From pooling parameters, whoever made them."""
        written = (getattr(parameters, "extra_kwargs", None) or {}).get("densereward")
        return cls(tuple(written[0]), bool(written[1])) if written else cls()


def attended(layer: Any, query: Float[Tensor, "H D"], keys: Float[Tensor, "S K D"]) -> Float32[Tensor, "K G S"]:
    """The attention weights of a sequence's last token, for each of G query heads on each of K key heads.

    Args:
        layer: vLLM's attention layer, for its scale, window, soft cap and sinks.
        query: of the last token.
        keys: of all tokens up to and with it.
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


def off(
    weights: Float32[Tensor, "K G S"], values: Float[Tensor, "S K V"], output: Float[Tensor, "H V"]
) -> Float32[Tensor, ""]:
    """How far the weighted values of the worst head are from what the kernel gave, of what it added up."""
    own, added = (
        torch.einsum("kgs,skv->kgv", weights, each).flatten(0, 1) for each in (values.float(), values.float().abs())
    )
    off = (own - output.float().view(own.shape)).abs().amax(dim=-1)
    return (off / added.amax(dim=-1).clamp_min(1e-6)).max()


def over_ranks(
    columns: dict[int, Float32[Tensor, "S _"]], wanted: Sequence[Asked], ranks: Any
) -> dict[int, Float32[Tensor, "S _"]]:
    """Rows averaged and errors added up: every rank has its part of the heads, all as many, of the same requests."""
    if ranks.world_size == 1 or not columns:
        return columns
    together = ranks.all_reduce(torch.cat([each.flatten() for each in columns.values()]))
    parts = together.split([each.numel() for each in columns.values()])
    summed = {i: part.view_as(each) for (i, each), part in zip(columns.items(), parts, strict=True)}
    for i, each in summed.items():
        each[:, : len(wanted[i].layers)] /= ranks.world_size
    return summed
