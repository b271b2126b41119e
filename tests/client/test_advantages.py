"""Token rewards in a group's advantages: only differences within a sequence count, and only of unmasked tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densereward_client.advantages import with_token_rewards

NUMBERS = st.floats(-100, 100, width=32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    flat = st.lists(NUMBERS, min_size=rows * columns, max_size=rows * columns)
    bits = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    shape = (rows, columns)
    sequence = np.array(draw(st.lists(NUMBERS, min_size=rows, max_size=rows)))
    return sequence, np.reshape(draw(flat), shape), np.reshape(draw(bits), shape)


@given(batch=batches(), alpha=st.floats(-4, 4))
def test_a_sequences_mean_advantage_stays_its_own(batch: tuple[Any, Any, Any], alpha: float) -> None:
    sequence, rewards, mask = batch
    advantages = with_token_rewards(sequence, rewards, mask, alpha)
    assert advantages.shape == rewards.shape
    assert not advantages[~mask].any()
    for row, kept, expected in zip(advantages, mask, sequence, strict=True):
        if kept.any():
            assert row[kept].mean(dtype=np.float64) == pytest.approx(expected, abs=1e-3)


@given(batch=batches(), alpha=st.floats(-4, 4), level=NUMBERS)
def test_the_level_of_rewards_and_what_is_masked_are_of_no_consequence(
    batch: tuple[Any, Any, Any], alpha: float, level: float
) -> None:
    sequence, rewards, mask = batch
    moved = np.where(mask, rewards + level, 7.0)
    given = with_token_rewards(sequence, rewards, mask, alpha)
    np.testing.assert_allclose(with_token_rewards(sequence, moved, mask, alpha), given, atol=1e-3)


def test_two_tokens_differ_by_alpha_times_their_rewards() -> None:
    advantages = with_token_rewards([1.0], [[2.0, 4.0, 9.0]], [[1, 1, 0]], 0.5)
    assert advantages.tolist() == [[0.5, 1.5, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["advantages", "rewards", "alpha"])
def test_a_number_that_is_not_finite_is_refused(where: str, bad: float) -> None:
    numbers: dict[str, Any] = {"advantages": [1.0], "rewards": [[1.0]], "alpha": 1.0}
    numbers[where] = {"advantages": [bad], "rewards": [[bad]], "alpha": bad}[where]
    with pytest.raises(ValueError, match="must be finite"):
        with_token_rewards(numbers["advantages"], numbers["rewards"], [[1]], numbers["alpha"])


def test_shapes_that_would_be_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not \(2,\), \(1, 2\) and \(1, 2\)"):
        with_token_rewards([1.0, 2.0], [[1.0, 2.0]], [[1, 1]], 1.0)
    with pytest.raises(ValueError, match="something else than 0 and 1"):
        with_token_rewards([1.0], [[1.0, 2.0]], [[1, 2]], 1.0)
