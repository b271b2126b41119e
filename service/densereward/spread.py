"""How far a model's sequence rewards spread, over all that it gave so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock

from densereward.errors import InvalidRequest

__all__ = ["Spread"]


class Spread:
    """A running standard deviation (Welford's recurrence, so that no sum of squares loses digits). For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
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

    def mean(self) -> float:
        """The mean; 0 before the first reward."""
        return self._mean

    def deviation(self) -> float:
        """The standard deviation, of a sample (divided by one less than there are).

        Raises:
            InvalidRequest: all rewards so far were the same.
        """
        with self._lock:
            count, squares = self._count, self._squares
        if not (count > 1 and squares > 0):
            raise InvalidRequest(
                'normalize: "running" needs two different rewards, and this model has not given them yet; send more '
                "samples or give a number",
                code="no_spread",
                field="methods",
            )
        return math.sqrt(squares / (count - 1))
