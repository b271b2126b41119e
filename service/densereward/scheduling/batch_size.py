"""How many tokens a forward pass should hold: measured on the machine and the model at hand.

Small passes leave a device idle; large ones make callers wait and do not fit into caches. So passes are timed at sizes
that double, on random sequences, until a larger size is no faster. The smallest size near the best throughput is taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from densereward.capture import AttentionRow, Need, PrefixScores, ScoringInput
from densereward.engines.base import Engine
from densereward.errors import EngineFailure
from densereward.scheduling.cost import BatchCost, cost_of

__all__ = ["measure_batch_size"]

logger = logging.getLogger("densereward")

_FIRST = 128
_SMALLEST = 2048
"""The smallest size that is chosen for its speed. Below it a prompt and its responses hardly fit into one pass, and the
host's work between passes, which random sequences do not have, shows (7.0 s at 1,024, 6.4 s here, on two cores)."""

_LARGEST = {"cpu": 4096, "cuda": 65_536}
_LENGTH = 170
"""Tokens in a random sequence; a third of it is its prompt."""

_RUNS = 3
_NEAR = 0.97
"""This part of the best throughput counts as the best."""

_DOUBLINGS_IN_VAIN = 2
"""Doublings in a row without a gain, after which no larger size is tried."""

_LONGEST_PASS = 1.0
"""Seconds; after a pass of this length no larger size is tried."""

_LONGEST = 3.0
"""Seconds that all passes together may take, as far as that can be foreseen."""

_NEEDS: frozenset[Need] = frozenset([PrefixScores("open"), AttentionRow(-1)])


@dataclass(frozen=True, slots=True)
class _Timed:
    """A size in tokens, seconds of its best pass, work per second."""

    size: int
    seconds: float
    rate: float


def measure_batch_size(engine: Engine, clock: Callable[[], float] = time.perf_counter) -> int:
    """The smallest work of a pass, in tokens' worth, with nearly the best throughput.

    Args:
        engine: loaded and checked.
        clock: seconds.
    """
    started = clock()
    timed: list[_Timed] = []
    failed = False
    for size in _sizes(engine):
        try:
            timed.append(_time(engine, size, clock, deadline=started + _LONGEST))
        except EngineFailure:
            failed = True
            break
        if _is_enough(timed, clock() - started):
            break
    tokens = _choose(timed, failed=failed)
    logger.info("a pass holds %d tokens, as measured in %.1f s", tokens, clock() - started)
    return tokens


def _sizes(engine: Engine) -> list[int]:
    """Tokens of a pass, each size twice the one before."""
    largest = _LARGEST.get(engine.facts.device.partition(":")[0], _LARGEST["cuda"])
    return [_FIRST << n for n in range((largest // _FIRST).bit_length())]


def _time(engine: Engine, size: int, clock: Callable[[], float], deadline: float) -> _Timed:
    """The best of a few passes; one is enough below the sizes that can be chosen, and where time is running out."""
    batch = _random_sequences(engine, size)
    cost = BatchCost(engine.facts.pair_cost)
    for sequence in batch:
        cost.add(cost_of(sequence))
    seconds: list[float] = []
    while not seconds or (size >= _SMALLEST and len(seconds) < _RUNS and clock() + seconds[-1] < deadline):
        before = clock()
        engine.forward(batch)
        seconds.append(clock() - before)
    return _Timed(size, min(seconds), cost.work / max(min(seconds), 1e-9))


def _random_sequences(engine: Engine, size: int) -> list[ScoringInput]:
    """Random sequences that fill a pass and share no prompt."""
    length = min(_LENGTH, size, engine.facts.max_length)
    prompt = length // 3
    ids = np.random.default_rng(size).integers(0, engine.facts.vocabulary_size, (size // length, length))
    needs = _NEEDS & engine.provides
    return [ScoringInput(row, prompt, length - prompt, length - 1, needs=needs) for row in ids.tolist()]


def _is_enough(timed: list[_Timed], spent: float) -> bool:
    """Whether the next size, which takes twice as long, would take too long or gain nothing."""
    if timed[-1].seconds > _LONGEST_PASS or spent + 2 * timed[-1].seconds > _LONGEST:
        return True
    rates = [each.rate for each in timed if each.size >= _SMALLEST]
    return len(rates) > _DOUBLINGS_IN_VAIN and max(rates[-_DOUBLINGS_IN_VAIN:]) * _NEAR < max(
        rates[:-_DOUBLINGS_IN_VAIN]
    )


def _choose(timed: list[_Timed], *, failed: bool) -> int:
    """The smallest size near the best; the last that did not fail where every size that may be chosen failed."""
    rates = {each.size: each.rate for each in timed if each.size >= _SMALLEST}
    if rates:
        return min(size for size, rate in rates.items() if rate >= _NEAR * max(rates.values()))
    if failed:
        return timed[-1].size if timed else _FIRST
    return _SMALLEST
