"""The running spread against numpy's, over any number of threads and batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from densereward.errors import InvalidRequest
from densereward.scoring.running_deviation import RunningDeviation


def test_the_deviation_is_that_of_all_rewards_so_far_in_whatever_batches_they_came() -> None:
    rewards = np.random.default_rng(0).normal(1e3, 2.0, 600)
    deviation = RunningDeviation(noise=1e-4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(deviation.add, [part.tolist() for part in np.split(rewards, 60)]))
    assert deviation.measured() == pytest.approx((rewards.mean(), rewards.std(ddof=1)), rel=1e-9)


@pytest.mark.parametrize(
    "rewards",
    [[], [1.0], [float(n) for n in range(15)], [2.0] * 40, [2.0, 2.0 + 1e-6] * 20],
    ids=["none", "one", "few", "same", "noise"],
)
def test_no_spread_is_an_error_and_neither_a_division_nor_rounding_blown_up(rewards: list[float]) -> None:
    deviation = RunningDeviation(noise=1e-4)
    deviation.add(rewards)
    with pytest.raises(InvalidRequest, match="differ by more than rounding"):
        deviation.measured()
