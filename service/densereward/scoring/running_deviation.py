"""The running mean and standard deviation of a model's sequence rewards, for `normalize: "running"`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock

from densereward.errors import InvalidRequest

__all__ = ["RunningDeviation"]


_FEWEST = 16
"""Rewards before their deviation says anything."""


class RunningDeviation:
    """A running standard deviation (Welford's recurrence, so that no sum of squares loses digits). For any thread.

    Args:
        noise: how far a reward may move by rounding, relative to its size; a deviation within that counts as zero.
    """

    def __init__(self, noise: float) -> None:
        self._lock = Lock()
        self._noise = noise
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0

    def add(self, rewards: Sequence[float]) -> None:
        """Count some rewards in."""
        with self._lock:
            for reward in rewards:
                self._count += 1
                before = reward - self._mean
                self._mean += before / self._count
                self._squares += before * (reward - self._mean)

    def measured(self) -> tuple[float, float]:
        """Mean and standard deviation (of a sample: divided by one less than there are).

        Raises:
            InvalidRequest: too few rewards so far, or all the same.
        """
        with self._lock:
            count, mean, squares = self._count, self._mean, self._squares
        deviation = math.sqrt(squares / max(count - 1, 1))
        if count < _FEWEST or deviation <= self._noise * max(1.0, abs(mean)):
            raise InvalidRequest(
                f'normalize: "running" needs {_FEWEST} rewards that differ by more than rounding, and this model has '
                f"given {count}, {deviation:.1e} apart; send more samples or give a number",
                code="no_spread",
                field="methods",
            )
        return mean, deviation
