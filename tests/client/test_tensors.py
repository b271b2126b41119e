"""Padding: every row comes back complete, on the requested side, and what cannot be padded is named."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densereward_client import Error, Padded, SampleTokenRewards, Timing, TokenRewardsResponse, Usage, to_padded

ROWS = st.lists(st.lists(st.floats(-100, 100, width=32), max_size=9), min_size=1, max_size=6)
SIDES = st.sampled_from(["right", "left"])


def answer_of(*items: SampleTokenRewards) -> TokenRewardsResponse:
    return TokenRewardsResponse(
        id="tr-1",
        model="default",
        fingerprint="f",
        created=1,
        data=list(items),
        usage=Usage(prompt_tokens=0, response_tokens=0, forward_tokens=0),
        timing=Timing(queue_ms=0, forward_ms=0, total_ms=0),
    )


def rows_of(*rows: list[float]) -> TokenRewardsResponse:
    return answer_of(
        *(
            SampleTokenRewards(index=index, reward=0.0, token_rewards={"red": np.asarray(row, dtype=np.float32)})
            for index, row in enumerate(rows)
        )
    )


def test_rows_start_in_column_0_when_the_padding_is_on_the_right() -> None:
    rewards, mask = to_padded(rows_of([1.0], [2.0, 3.0]), "red", length=3)
    assert rewards.tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0]]
    assert mask.tolist() == [[True, False, False], [True, True, False]]


def test_rows_end_in_the_last_column_when_the_padding_is_on_the_left() -> None:
    rewards, mask = to_padded(rows_of([1.0], [2.0, 3.0]), "red", length=3, padding_side="left")
    assert rewards.tolist() == [[0.0, 0.0, 1.0], [0.0, 2.0, 3.0]]
    assert mask.tolist() == [[False, False, True], [False, True, True]]


@given(rows=ROWS, extra=st.none() | st.integers(0, 5), side=SIDES)
def test_every_row_is_under_its_mask_and_all_else_is_zero(
    rows: list[list[float]], extra: int | None, side: Literal["right", "left"]
) -> None:
    longest = max(map(len, rows))
    length = None if extra is None else longest + extra
    rewards, mask = to_padded(rows_of(*rows), "red", length=length, padding_side=side)
    assert rewards.shape == mask.shape == (len(rows), longest if length is None else length)
    assert rewards.dtype == np.float32
    assert mask.dtype == np.bool_
    assert not rewards[~mask].any()
    for row, padded, kept in zip(rows, rewards, mask, strict=True):
        assert padded[kept].tolist() == row
        # The mask is one block at its side: sorted, it does not change.
        assert (np.sort(kept) == (kept if side == "left" else kept[::-1])).all()


@given(rows=ROWS)
def test_the_left_is_the_mirror_of_the_right(rows: list[list[float]]) -> None:
    right = to_padded(rows_of(*rows), "red")
    left = to_padded(rows_of(*(row[::-1] for row in rows)), "red", padding_side="left")
    assert (right.rewards == left.rewards[:, ::-1]).all()
    assert (right.mask == left.mask[:, ::-1]).all()


def test_a_row_longer_than_the_length_is_never_cut() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 3 tokens, more than length=2"):
        to_padded(rows_of([1.0], [1.0, 2.0, 3.0]), "red", length=2)


def test_a_sample_that_was_not_served_is_named() -> None:
    bad = SampleTokenRewards(index=1, id="second", error=Error(code="too_long", message="9 tokens"))
    with pytest.raises(ValueError, match=r"sample 1 \(id 'second'\) was not served: too_long: 9 tokens"):
        to_padded(answer_of(rows_of([1.0]).data[0], bad), "red")


def test_a_method_that_is_not_there_is_told_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"sample 0 has no token rewards of 'abc'; there are: red"):
        to_padded(rows_of([1.0]), "abc")


def test_a_side_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="padding_side"):
        to_padded(rows_of([1.0]), "red", padding_side="middle")  # type: ignore[arg-type]


def test_torch_tensors_have_the_same_numbers() -> None:
    torch = pytest.importorskip("torch")
    padded = to_padded(rows_of([1.0], [2.0, 3.0]), "red")
    rewards, mask = padded.to_torch()
    assert (rewards.dtype, mask.dtype) == (torch.float32, torch.bool)
    assert rewards.tolist() == padded.rewards.tolist()
    assert mask.tolist() == padded.mask.tolist()
    assert Padded(*padded).to_torch("meta")[0].device.type == "meta"
