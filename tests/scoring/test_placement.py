"""Rewards on their way to the trainer's tokens: nothing is lost, nothing lands on a wrong slot."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densereward.capture import Span
from densereward.errors import EngineFailure, InvalidRequest
from densereward.methods.base import Credit, Params
from densereward.scoring.placement import Slots, move_to_spans, place, slot_boundaries, slots_of
from densereward_client.wire import Sample


def naive_move(values: list[float], sources: list[Span], targets: list[Span]) -> list[float]:
    """Byte by byte: every byte of a source carries its share to the target that owns the byte."""
    result = [0.0] * len(targets)
    for value, (start, stop) in zip(values, sources, strict=True):
        owners = [i for byte in range(start, stop) for i, (a, b) in enumerate(targets) if a <= byte < b]
        if not owners:
            owners = [next((i for i, (_, b) in enumerate(targets) if b > start), len(targets) - 1)]
        for owner in owners:
            result[owner] += value / len(owners)
    return result


def cuts(size: int) -> st.SearchStrategy[list[Span]]:
    """Spans that cover `size` bytes without a gap."""
    inner = st.lists(st.integers(0, size), max_size=8).map(sorted)
    return inner.map(lambda points: list(pairwise([0, *points, size])))


@st.composite
def gappy(draw: st.DrawFn, size: int) -> list[Span]:
    """Spans in order with gaps between them, some of no bytes."""
    points = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=12)))
    return [(points[i], points[i + 1]) for i in range(0, len(points) - 1, 2)]


def test_a_token_over_two_of_the_trainers_gives_each_its_bytes_share() -> None:
    np.testing.assert_allclose(move_to_spans(np.array([3.0, 1.0]), [(0, 3), (3, 4)], [(0, 1), (1, 4)]), [1.0, 3.0])


def test_a_character_split_between_tokens_is_shared_by_bytes() -> None:
    # One four-byte character: the model has tokens of 3 and 1 bytes, the trainer of 2 and 2.
    np.testing.assert_allclose(move_to_spans(np.array([3.0, 5.0]), [(0, 3), (3, 4)], [(0, 2), (2, 4)]), [2.0, 6.0])


def test_a_token_that_no_slot_shares_goes_to_the_next_one_or_the_last() -> None:
    targets = [(0, 2), (3, 5)]
    values = move_to_spans(np.array([1.0, 10.0, 100.0, 1000.0]), [(0, 2), (2, 3), (3, 5), (5, 9)], targets)
    np.testing.assert_allclose(values, [1.0, 1110.0])


@given(data=st.data(), size=st.integers(0, 30))
def test_spreading_equals_the_byte_by_byte_reading_and_keeps_the_sum(data: st.DataObject, size: int) -> None:
    sources = data.draw(cuts(size))
    targets = data.draw(gappy(size))
    values = data.draw(st.lists(st.floats(-9, 9), min_size=len(sources), max_size=len(sources)))
    result = move_to_spans(np.array(values, dtype=np.float64), sources, targets)
    np.testing.assert_allclose(result, naive_move(values, sources, targets), atol=1e-9)
    assert result.sum() == pytest.approx(sum(values), abs=1e-9)


def test_the_sparse_share_lands_on_the_trainers_last_token_whatever_the_models_tokens_are() -> None:
    credit = Credit(np.array([1.0, 3.0]))
    slots = Slots(3, [(0, 1), (1, 2), (2, 4)])
    placed = place(credit, 4.0, Params(beta=0.5), slots, [(0, 2), (2, 4)])
    np.testing.assert_allclose(placed.rewards, [0.25, 0.25, 1.5 + 2.0])
    assert placed.baseline == 0.0


def test_beta_scales_the_baseline_with_the_dense_rewards() -> None:
    placed = place(Credit(np.array([1.0, 2.0]), baseline=0.5), 3.5, Params(beta=0.5), Slots(2), None)
    np.testing.assert_allclose(placed.rewards, [0.5, 1.0 + 1.75])
    assert placed.baseline == 0.25


def test_normalising_divides_everything_and_shifts_nothing() -> None:
    placed = place(Credit(np.array([1.0, 2.0]), baseline=0.5), 3.5, Params(beta=0.5, normalize=4.0), Slots(2), None)
    np.testing.assert_allclose(placed.rewards, [0.125, 0.6875])
    assert (placed.baseline, placed.scale) == (0.0625, 0.25)


def test_what_is_clipped_is_told_and_joins_the_baseline() -> None:
    placed = place(Credit(np.array([1.0, -3.0, 2.5]), baseline=0.5), 1.0, Params(clip=1.5), Slots(3), None)
    np.testing.assert_allclose(placed.rewards, [1.0, -1.5, 1.5])
    assert placed.clipped == -1.5 + 1.0
    assert placed.baseline == 0.5 - 0.5


def test_clipping_comes_after_the_mask_and_the_scale() -> None:
    credit = Credit(np.array([2.0, 2.0]))
    placed = place(credit, 4.0, Params(clip=1.5, normalize=2.0), Slots(2, kept=[1]), None)
    np.testing.assert_allclose(placed.rewards, [0.0, 1.5])
    assert (placed.clipped, placed.baseline) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("spans", "boundaries"),
    [
        (None, [2, 3, 5]),
        ([(0, 1), (1, 2), (2, 4), (4, 6)], [2, 3, 4]),
        ([(0, 3), (3, 6)], [1, 2, 2]),
        ([(2, 3), (3, 3), (5, 6)], [0, 2, 3]),
    ],
)
def test_a_boundary_between_the_models_tokens_is_after_the_slots_that_begin_before_it(
    spans: list[Span] | None, boundaries: list[int]
) -> None:
    tokens = [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6)]
    slots = Slots(len(tokens if spans is None else spans), spans)
    assert slot_boundaries([2, 3, 5], slots, tokens) == boundaries


def test_masked_slots_get_nothing_and_their_share_moves_to_the_next_kept_slot_or_the_last() -> None:
    credit = Credit(np.array([1.0, 2.0, 4.0, 8.0, 16.0]))
    placed = place(credit, 31.0, Params(), Slots(5, kept=[1, 3]), None)
    np.testing.assert_array_equal(placed.rewards, [0, 3, 0, 28, 0])


def test_a_mask_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="keeps no token"):
        Slots(2, kept=[])


def test_numbers_that_are_not_finite_or_do_not_sum_never_leave() -> None:
    with pytest.raises(EngineFailure, match="not finite"):
        place(Credit(np.array([np.nan, 1.0])), 1.0, Params(), Slots(2), None)
    with pytest.raises(EngineFailure, match="sum to 3"):
        place(Credit(np.array([1.0, 2.0])), 4.0, Params(), Slots(2), None)


@given(
    values=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20),
    beta=st.floats(0, 1),
    baseline=st.floats(-5, 5),
    normalize=st.one_of(st.none(), st.floats(0.1, 10)),
    clip=st.one_of(st.none(), st.floats(0.01, 10)),
    data=st.data(),
)
def test_sums_survive_every_mix_and_mask(
    values: list[float],
    beta: float,
    baseline: float,
    normalize: float | None,
    clip: float | None,
    data: st.DataObject,
) -> None:
    kept = data.draw(st.one_of(st.none(), st.sets(st.integers(0, len(values) - 1), min_size=1).map(sorted)))
    reward = sum(values) + baseline
    credit = Credit(np.array(values, dtype=np.float64), baseline=baseline)
    params = Params(beta=beta, normalize=normalize, clip=clip)
    placed = place(credit, reward, params, Slots(len(values), kept=kept), None)
    rewards = placed.rewards
    assert rewards.dtype == np.float32
    assert placed.scale == 1 / (normalize or 1)
    assert np.abs(rewards).max() <= np.float32(np.inf if clip is None else clip)
    assert rewards.sum(dtype=np.float64) + placed.baseline == pytest.approx(
        placed.scale * reward, abs=1e-5 * max(1.0, float(np.abs(rewards).sum()), placed.scale * abs(reward))
    )
    if kept is not None:
        assert not rewards[[i for i in range(len(values)) if i not in kept]].any()


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        ({"response_token_ids": [5, 6], "response_mask": [1]}, "length_mismatch"),
        ({"response_token_ids": [5, 6], "weights": [1.0]}, "length_mismatch"),
        ({"response_token_ids": [5, 6], "token_entropies": [1.0]}, "length_mismatch"),
        ({"response_token_ids": [5, 6], "response_mask": [0, 0]}, "empty_mask"),
        ({"response": "ab", "response_spans": [(0, 1), (0, 2)]}, "invalid_spans"),
        ({"response": "ab", "response_spans": [(0, 3)]}, "invalid_spans"),
        ({"response": "ab", "response_spans": [(1, 0)]}, "invalid_spans"),
        ({"response": "ab", "response_spans": []}, "invalid_spans"),
        ({"response": "ab", "response_spans": [(0, 2)], "response_mask": [1, 1]}, "length_mismatch"),
    ],
)
def test_lists_that_name_other_slots_than_there_are_are_refused(sample: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        slots_of(Sample(prompt="", **sample), 2)
    assert refused.value.error_code == code
