"""The running spread against numpy's, over any number of threads and batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from densereward.errors import InvalidRequest
from densereward.spread import Spread


def test_the_deviation_is_that_of_all_rewards_so_far_in_whatever_batches_they_came() -> None:
    rewards = np.random.default_rng(0).normal(1e4, 2.0, 600)
    spread = Spread()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(spread.add, [part.tolist() for part in np.split(rewards, 60)]))
    assert spread.deviation() == pytest.approx(rewards.std(ddof=1), rel=1e-9)


@pytest.mark.parametrize("rewards", [[], [1.0], [2.0, 2.0]])
def test_no_spread_is_an_error_and_not_a_division(rewards: list[float]) -> None:
    spread = Spread()
    spread.add(rewards)
    with pytest.raises(InvalidRequest, match="two different rewards"):
        spread.deviation()
