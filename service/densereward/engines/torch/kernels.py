"""Attention of some queries on one segment of keys, with the log-sum-exp that lets segments be merged exactly.

A softmax over the keys of segments A and B is the average of the softmaxes over A and over B, weighted by the
exponentials of their log-sum-exps. So attention over several segments is computed segment by segment.

Shapes: H query heads, K key heads (H a multiple of K), D head size, Q queries, L keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

__all__ = [
    "QUERY_BLOCK",
    "AttentionVariant",
    "PartialAttention",
    "apply_sinks",
    "attend",
    "attend_segments",
    "explicit",
    "explicit_weights",
    "merge",
    "visible_keys",
]

QUERY_BLOCK = 256
"""Queries at a time on the explicit path: its scores take H x 256 x L, which grows with L alone."""

# torch versions without this argument accept fewer key heads than query heads as they are.
_GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """How a layer computes attention.

    Attributes:
        scaling: factor on the scores.
        window: keys that a query sees, its own included, counted back from it; None sees all.
        softcap: scores become softcap * tanh(score / softcap); None leaves them.
        sinks: a score in each head that takes part in the softmax and has no value; None where there are none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " H"] | None = None

    @property
    def plain(self) -> bool:
        """Whether fused kernels compute it; sinks are applied to what they give."""
        return self.window is None and self.softcap is None


@dataclass(frozen=True, slots=True)
class PartialAttention:
    """Attention of some queries on one segment of keys alone.

    Attributes:
        output: the attention's output.
        log_sum_exp: of the scores.
    """

    output: Float[Tensor, "H Q D"]
    log_sum_exp: Float32[Tensor, "H Q"]

    def in_float32(self) -> PartialAttention:
        """The same, to be merged with others without rounding in between."""
        return PartialAttention(self.output.float(), self.log_sum_exp)

    def at(self, queries: slice) -> PartialAttention:
        """A view of some of the queries."""
        return PartialAttention(self.output[:, queries], self.log_sum_exp[:, queries])


def merge(total: PartialAttention, part: PartialAttention) -> None:
    """Make `total` the attention over its own keys and the part's, in place; computed in float32."""
    log_sum_exp = torch.logaddexp(total.log_sum_exp, part.log_sum_exp)
    own, other = (torch.exp(each - log_sum_exp)[..., None] for each in (total.log_sum_exp, part.log_sum_exp))
    output = total.output.float().mul_(own).addcmul_(part.output.float(), other)
    if output is not total.output:  # narrower than float32, so the sum is in a copy
        total.output.copy_(output)
    total.log_sum_exp.copy_(log_sum_exp)


def apply_sinks(total: PartialAttention, sinks: Float[Tensor, " _"] | None) -> Float[Tensor, "H Q D"]:
    """Scale the output over all keys down by the sinks' share, in place.

    A head of the model may be laid out as several heads of `total`, side by side.
    """
    if sinks is not None:
        share = _share_of_keys(sinks[:, None, None], total.log_sum_exp.unflatten(0, (len(sinks), -1)))
        total.output.mul_(share.flatten(0, 1)[..., None])
    return total.output


def _share_of_keys(sinks: Tensor, log_sum_exp: Tensor) -> Tensor:
    """The keys' share of a softmax that sinks take part in, by the keys' log-sum-exp."""
    return torch.sigmoid(log_sum_exp - sinks.float())


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool) -> PartialAttention:
    """[H, Q, D] on [K, L, D]; where it is causal, query i sees keys 0..i."""
    if q.is_cuda:
        return attend_segments(q, k, v, [q.shape[1]], [k.shape[1]], scaling, causal=causal)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], is_causal=causal, scale=scaling
    )
    return PartialAttention(output[0], log_sum_exp[0])


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], scaling: float, *, causal: bool
) -> PartialAttention:
    """Segments side by side, each by itself: the next `queries[i]` queries on the next `keys[i]` keys.

    One call of variable-length attention on CUDA, a loop elsewhere.
    """
    if q.is_cuda:
        return _variable_length(q, k, v, queries, keys, scaling, causal=causal)
    segments = zip(q.split(list(queries), 1), k.split(list(keys), 1), v.split(list(keys), 1), strict=True)
    parts = [attend(*segment, scaling, causal=causal) for segment in segments]
    return PartialAttention(
        torch.cat([part.output for part in parts], 1), torch.cat([part.log_sum_exp for part in parts], 1)
    )


def _variable_length(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], scaling: float, *, causal: bool
) -> PartialAttention:
    output, log_sum_exp = varlen_attn(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        _cumulative(queries, q.device),
        _cumulative(keys, q.device),
        max(queries),
        max(keys),
        scale=scaling,
        window_size=(-1, 0 if causal else -1),
        return_aux=AuxRequest(lse=True),
        **_GROUPED_HEADS,
    )
    return PartialAttention(output.transpose(0, 1), log_sum_exp)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Int32[Tensor, " _"]:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def explicit(
    q: Tensor, k: Tensor, v: Tensor, visible: Bool[Tensor, "Q L"], variant: AttentionVariant
) -> Float[Tensor, "H Q D"]:
    """Any variant, with the scores as a matrix; every query must see a key."""
    return torch.flatten(explicit_weights(q, k, visible, variant).to(v.dtype) @ v[:, None], 0, 1)


def explicit_weights(
    q: Tensor, k: Tensor, visible: Bool[Tensor, "Q L"], variant: AttentionVariant
) -> Float32[Tensor, "K G Q L"]:
    """The weights of `explicit`, for G = H / K query heads on each key head."""
    grouped = q.reshape(k.shape[0], -1, *q.shape[1:])  # [K, H/K, Q, D]
    logits = (grouped @ k[:, None].transpose(-1, -2)).float() * variant.scaling
    if variant.softcap is not None:
        logits = torch.tanh(logits / variant.softcap) * variant.softcap
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(dim=-1)
    if variant.sinks is None:
        return weights
    return weights * _share_of_keys(variant.sinks.reshape(len(k), -1, 1, 1), logits.logsumexp(dim=-1, keepdim=True))


def visible_keys(queries: Tensor, keys: Tensor, window: int | None) -> Bool[Tensor, "Q L"]:
    """Which keys a query sees, by their positions in one sequence."""
    distance = queries[:, None] - keys
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
