"""Contestants that do the same work and take turns, and what their seconds say. Knows no model.

A figure is a ratio of two contestants' seconds, taken round by round and not of their medians: what slows the machine
for a while slows both sides of a round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = dict[str, NDArray[np.float64]]
"""What a contestant computed, by name; names in common must agree."""

Contestant = Callable[[], Numbers]
Seconds = Mapping[str, Sequence[float]]


class Disagreement(Exception):
    """Contestants do the same work and found different numbers, so their times mean nothing."""


@dataclass(frozen=True)
class Figure:
    """One row of the table: seconds of `over` / seconds of `under`, times `factor`."""

    title: str
    over: str
    under: str
    goal: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class Reading:
    """A row that is no ratio: something read off in every round, in its own unit. No values: it was not measured."""

    title: str
    values: Sequence[float]
    unit: str = ""
    goal: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines to be drawn on logarithmic axes; `name` is the end of the file's."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Group:
    """Contestants that take turns on one piece of work; notes, readings and charts come after the last round."""

    work: str
    contestants: Mapping[str, Contestant]
    figures: Sequence[Figure] = ()
    rounds: int = 1
    notes: Callable[[], list[str]] = list
    readings: Callable[[Seconds], list[Reading]] = lambda _: []
    charts: Callable[[Seconds], list[Chart]] = lambda _: []


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; every other round runs backwards, so that no place is the better."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(rounds):
        for name in order:
            gc.collect()
            started = clock()
            contestants[name]()
            seconds[name].append(clock() - started)
        order.reverse()
    return seconds


def ratios(seconds: Seconds, figure: Figure) -> list[float]:
    """The figure in every round."""
    pairs = zip(seconds[figure.over], seconds[figure.under], strict=True)
    return [over / under * figure.factor for over, under in pairs]


def difference(first: Numbers, second: Numbers) -> float | None:
    """The largest difference of what both computed, relative to the largest number; None where they share nothing."""
    common = first.keys() & second.keys()
    return max((_relative(first[name], second[name]) for name in common), default=None)


def _relative(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    if first.shape != second.shape:
        raise Disagreement(f"{first.shape} numbers here and {second.shape} there")
    return float(np.abs(first - second).max() / np.abs(first).max())


def agreement(numbers: Mapping[str, Numbers], figures: Sequence[Figure], tolerance: float) -> dict[str, float | None]:
    """The largest difference between the two sides of each figure, by its title.

    Raises:
        Disagreement: it is more than the tolerance.
    """
    differences = {each.title: difference(numbers[each.over], numbers[each.under]) for each in figures}
    for title, found in differences.items():
        if found is not None and not found <= tolerance:  # a difference that is no number fails too
            raise Disagreement(f"{title}: the two sides differ by {found:.2g}, and {tolerance:.2g} is allowed")
    return differences
