"""Attention in parts against attention written out whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densereward.engines.torch.kernels import (
    AttentionVariant,
    PartialAttention,
    apply_sinks,
    attend,
    attend_segments,
    explicit,
    merge,
)

SINKS = torch.tensor([-torch.inf, -3.0, 0.0, 1.0, 5.0, 200.0])


def tensors(queries: int, keys: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(6, queries, 16, generator=generator),
        torch.randn(2, keys, 16, generator=generator),
        torch.randn(2, keys, 16, generator=generator),
    )


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, variant: AttentionVariant
) -> torch.Tensor:
    """One query of one head at a time."""
    output = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    for head in range(q.shape[0]):
        for query in range(q.shape[1]):
            scores = variant.scaling * k[head // 3] @ q[head, query]
            if variant.softcap is not None:
                scores = variant.softcap * torch.tanh(scores / variant.softcap)
            sink = torch.empty(0) if variant.sinks is None else variant.sinks[head : head + 1]
            shares = torch.softmax(torch.cat([sink, scores[visible[query]]]), dim=0)[len(sink) :]
            output[head, query] = shares @ v[head // 3][visible[query]]
    return output


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (4, 9)])
def test_a_fused_call_equals_the_naive_loop(queries: int, keys: int, causal: bool) -> None:
    q, k, v = tensors(queries, keys)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    expected = naive(q, k, v, visible.tril() if causal else visible, AttentionVariant(0.3))
    torch.testing.assert_close(attend(q, k, v, 0.3, causal=causal).output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
def test_explicit_attention_equals_the_naive_loop(softcap: float | None, sinks: torch.Tensor | None) -> None:
    q, k, v = tensors(5, 7)
    visible = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, 0] = True
    variant = AttentionVariant(0.3, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(
        explicit(q, k, v, visible, variant), naive(q, k, v, visible, variant), atol=1e-5, rtol=1e-5
    )


@given(keys=st.lists(st.integers(1, 9), min_size=1, max_size=4), queries=st.integers(1, 5), seed=st.integers(0, 99))
def test_merged_segments_are_attention_over_all_their_keys(keys: list[int], queries: int, seed: int) -> None:
    q, k, v = tensors(queries, sum(keys), seed)
    pieces = zip(k.split(keys, 1), v.split(keys, 1), strict=True)
    whole = attend(q, k, v, 0.3, causal=False)
    merged, *rest = [attend(q, *piece, 0.3, causal=False) for piece in pieces]
    for part in rest:
        merge(merged, part)
    torch.testing.assert_close(merged.output, whole.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.log_sum_exp, whole.log_sum_exp, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_take_their_share_once_after_merging(dtype: torch.dtype) -> None:
    q, k, v = tensors(5, 9)
    total, part = (attend(q, k[:, each], v[:, each], 0.3, causal=False) for each in (slice(4), slice(4, 9)))
    total = PartialAttention(total.output.to(dtype), total.log_sum_exp)
    merge(total, part)
    expected = naive(q, k, v, torch.ones(5, 9, dtype=torch.bool), AttentionVariant(0.3, sinks=SINKS))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found = apply_sinks(total, SINKS.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def test_queries_taken_as_heads_have_the_sink_of_their_own_head() -> None:
    q, k, v = tensors(8, 9)
    beside = q.unflatten(1, (4, 2)).transpose(1, 2).flatten(0, 1)
    found = apply_sinks(attend(beside, k, v, 0.3, causal=False), SINKS)
    expected = apply_sinks(attend(q, k, v, 0.3, causal=False), SINKS)
    torch.testing.assert_close(found.unflatten(0, (6, 2)).transpose(1, 2).flatten(1, 2), expected)


def test_merging_a_segment_without_keys_changes_nothing() -> None:
    q, k, v = tensors(3, 4)
    part = attend(q, k, v, 0.3, causal=False)
    nothing = PartialAttention(torch.zeros_like(part.output), torch.full_like(part.log_sum_exp, -torch.inf))
    total = PartialAttention(part.output.clone(), part.log_sum_exp.clone())
    merge(total, nothing)
    torch.testing.assert_close(total.output, part.output)
    torch.testing.assert_close(total.log_sum_exp, part.log_sum_exp)


def test_half_precision_is_merged_in_float32() -> None:
    q, k, v = tensors(5, 8)
    first, second = (attend(q, k[:, part], v[:, part], 0.3, causal=False) for part in (slice(3), slice(3, 8)))
    total = PartialAttention(first.output.bfloat16(), first.log_sum_exp)
    merge(total, PartialAttention(second.output.bfloat16(), second.log_sum_exp))
    whole = attend(q, k, v, 0.3, causal=False).output
    assert total.output.dtype == torch.bfloat16
    torch.testing.assert_close(total.output.float(), whole, atol=2e-2, rtol=2e-2)


def test_segments_side_by_side_do_not_see_each_other() -> None:
    q, k, v = tensors(7, 7)
    both = attend_segments(q, k, v, [3, 4], [3, 4], 0.3, causal=True)
    alone = attend(q[:, 3:], k[:, 3:], v[:, 3:], 0.3, causal=True)
    torch.testing.assert_close(both.output[:, 3:], alone.output)
    torch.testing.assert_close(both.log_sum_exp[:, 3:], alone.log_sum_exp)
