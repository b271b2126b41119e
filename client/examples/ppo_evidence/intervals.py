"""Means, their 95 % intervals and sign tests, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["half_width", "interval", "sign_test", "student"]


def student(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t, within 0.2 % (Abramowitz and Stegun 26.7.5 from three degrees on)."""
    if degrees < 3:
        return (12.706, 4.303)[degrees - 1]
    x = 1.959964
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / math.pow(degrees, power) for power, term in enumerate(terms))


def interval(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± half width (count)`, with the 95 % interval by Student's t; a single value has no interval."""
    count = len(values)
    mean = f"{np.mean(values):+.{digits}f} " if count else ""
    error = f"± {half_width(np.array(values)[:, None])[0]:.{digits}f} " if count > 1 else ""
    return f"{mean}{error}({count})"


def half_width(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the width of the 95 % interval of the mean over rows; 0 for a single row."""
    count = len(rows)
    half: NDArray[np.float64] = np.zeros(rows.shape[1])
    return half if count < 2 else student(count - 1) * rows.std(0, ddof=1) / math.sqrt(count)


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of the split of signs, if both signs were equally likely."""
    count, wins = len(differences), sum(difference > 0 for difference in differences)
    tail = sum(math.comb(count, k) for k in range(max(wins, count - wins), count + 1)) * 0.5**count
    return min(1.0, 2 * tail)
