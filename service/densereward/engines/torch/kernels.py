"""Attention of a few queries on a range of keys, with the log-sum-exp that lets parts be merged exactly.

softmax over the keys of A and B together is the average of the softmaxes over each, weighted by the exponentials of
their log-sum-exps: so whatever looks at several stretches of keys is computed stretch by stretch.

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
    "Part",
    "Variant",
    "add",
    "attend",
    "attend_each",
    "beside_sinks",
    "explicit",
    "explicit_weights",
    "visible_keys",
]

QUERY_BLOCK = 256
"""Queries at a time on the explicit path: its scores take H x 256 x L, which grows with L alone."""

# Released versions differ: where the argument is missing, fewer key heads than query heads are simply accepted.
_GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True, slots=True)
class Variant:
    """How a layer's attention departs from the plain one.

    Attributes:
        scaling: factor on the scores.
        window: a query sees the last so many keys, itself included; None sees all.
        softcap: scores are bent by softcap * tanh(score / softcap); None leaves them.
        sinks: a score in each head that takes part in the softmax and has no value; None where there are none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " H"] | None = None

    @property
    def plain(self) -> bool:
        """Whether fused kernels compute it, all but the sinks."""
        return self.window is None and self.softcap is None


@dataclass(frozen=True, slots=True)
class Part:
    """What some queries got from one stretch of keys.

    Attributes:
        output: their attention's output over those keys alone.
        weight: its log-sum-exp.
    """

    output: Float[Tensor, "H Q D"]
    weight: Float32[Tensor, "H Q"]

    def at(self, queries: slice) -> Part:
        """Some of the queries, in the same memory."""
        return Part(self.output[:, queries], self.weight[:, queries])


def add(total: Part, part: Part) -> None:
    """Make `total` the attention over its own keys and the part's together, in place and in float32."""
    weight = torch.logaddexp(total.weight, part.weight)
    mine, others = (torch.exp(each - weight)[..., None] for each in (total.weight, part.weight))
    output = total.output.float().mul_(mine).addcmul_(part.output.float(), others)
    if output is not total.output:  # narrower than float32, so what was added up is a copy
        total.output.copy_(output)
    total.weight.copy_(weight)


def beside_sinks(total: Part, sinks: Float[Tensor, " _"] | None) -> Float[Tensor, "H Q D"]:
    """What sinks leave of the output over all keys, in place; a head may be laid out as several, side by side."""
    if sinks is not None:
        left = _left_by(sinks[:, None, None], total.weight.unflatten(0, (len(sinks), -1)))
        total.output.mul_(left.flatten(0, 1)[..., None])
    return total.output


def _left_by(sinks: Tensor, weight: Tensor) -> Tensor:
    """The keys' share of a softmax that sinks take part in, by the keys' log-sum-exp."""
    return torch.sigmoid(weight - sinks.float())


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool) -> Part:
    """[H, Q, D] on [K, L, D]; causal shows keys 0..i to query i."""
    if q.is_cuda:
        return attend_each(q, k, v, [q.shape[1]], [k.shape[1]], scaling, causal=causal)
    output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], is_causal=causal, scale=scaling
    )
    return Part(output[0], weight[0])


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], scaling: float, *, causal: bool
) -> Part:
    """Stretches side by side, each on its own: `queries[i]` of the queries on `keys[i]` of the keys, in order.

    One call of variable-length attention on CUDA, a loop elsewhere.
    """
    if q.is_cuda:
        return _variable_length(q, k, v, queries, keys, scaling, causal=causal)
    stretches = zip(q.split(list(queries), 1), k.split(list(keys), 1), v.split(list(keys), 1), strict=True)
    parts = [attend(*stretch, scaling, causal=causal) for stretch in stretches]
    return Part(torch.cat([part.output for part in parts], 1), torch.cat([part.weight for part in parts], 1))


def _variable_length(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], scaling: float, *, causal: bool
) -> Part:
    output, weight = varlen_attn(
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
    return Part(output.transpose(0, 1), weight)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Int32[Tensor, " _"]:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def explicit(q: Tensor, k: Tensor, v: Tensor, visible: Bool[Tensor, "Q L"], variant: Variant) -> Float[Tensor, "H Q D"]:
    """Any variant, its scores written out; every query must see a key."""
    return torch.flatten(explicit_weights(q, k, visible, variant).to(v.dtype) @ v[:, None], 0, 1)


def explicit_weights(
    q: Tensor, k: Tensor, visible: Bool[Tensor, "Q L"], variant: Variant
) -> Float32[Tensor, "K G Q L"]:
    """The weights behind it, G = H / K query heads to a key head."""
    grouped = q.reshape(k.shape[0], -1, *q.shape[1:])  # [K, H/K, Q, D]
    logits = (grouped @ k[:, None].transpose(-1, -2)).float() * variant.scaling
    if variant.softcap is not None:
        logits = torch.tanh(logits / variant.softcap) * variant.softcap
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(dim=-1)
    if variant.sinks is None:
        return weights
    return weights * _left_by(variant.sinks.reshape(len(k), -1, 1, 1), logits.logsumexp(dim=-1, keepdim=True))


def visible_keys(queries: Tensor, keys: Tensor, window: int | None) -> Bool[Tensor, "Q L"]:
    """Which keys a query sees, by their positions in one sequence."""
    distance = queries[:, None] - keys
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
