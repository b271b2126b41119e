"""`shapley`: each word's or sentence's average part in the score over all orders of putting the response together.

Source: SCAR, arXiv 2505.20417 (Shapley values over spans, Owen values over words in spans).

Equation:
    v_u = mean over orders of R(units before u, and u) - R(units before u)
    r_t = v_u / tokens in u

Sum: R - R(empty response), exactly and however few orders are drawn: every order's parts telescope. `baseline` is
R(empty response).

Use: where a few samples deserve the fairest split: the joint effect of words is divided between them.
`within_sentences` only takes orders that keep each sentence's words together (Owen values): their sums over sentences
are the sentences' own Shapley values, and broken sentences are seen less often.

Traps: most orders put together texts that no one writes. Up to 8 units the values are exact; beyond that, `orders`
orders and their reverses are drawn from `seed`, and the answer's `standard_error` is the largest of the units'.

Cost: up to 2^U forward passes for U <= 8 units, beyond that up to 2 * orders * (U - 1), in packed batches that share
the prompt; the answer's `passes` says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import factorial
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pydantic import Field, NonNegativeInt

from densereward.capture import Captured, Need, Variants
from densereward.errors import InvalidRequest
from densereward.methods.base import Credit, Method, Response, Segment
from densereward.methods.prefixes import text_boundaries_of
from densereward.methods.units import UnitParams, Units

__all__ = ["EXACT_UP_TO", "MOST_COALITIONS", "Shapley", "ShapleyParams"]

EXACT_UP_TO = 8
"""Units whose every coalition is scored."""

MOST_COALITIONS = 8192
"""Passes for one response."""

_Coalition = bytes


class ShapleyParams(UnitParams):
    """Parameters of `shapley`.

    Attributes:
        within_sentences: orders keep each sentence's units together.
        orders: how many are drawn, each with its reverse, beyond 8 units.
        seed: of the drawing.
    """

    within_sentences: bool = False
    orders: Annotated[int, Field(ge=2, le=1024)] = 4
    seed: NonNegativeInt = 0


class Shapley(Method[ShapleyParams]):
    """Marginal parts, averaged over orders."""

    params_type = ShapleyParams
    passes = None

    def needs(self, params: ShapleyParams) -> frozenset[Need]:
        """The scores of other responses."""
        return frozenset([Variants()])

    def variants(self, response: Response, params: ShapleyParams) -> Sequence[Sequence[int]]:
        """The response's coalitions, but for the whole."""
        units = Units.of(response, params)
        drawn = 2 * params.orders * (len(units.stops) - 1)
        if not _exact(units, params) and drawn > MOST_COALITIONS:
            raise InvalidRequest(
                f"{params.orders} orders of {len(units.stops)} units are up to {drawn} passes for one response, and "
                f"{MOST_COALITIONS} is the most; take fewer orders or larger units",
                code="too_many_units",
                field="methods",
                given=drawn,
                limit=MOST_COALITIONS,
            )
        present = [np.frombuffer(each, dtype=bool) for each in _coalitions(units, params)]
        return [units.without(each) for each in present]

    def credit(self, captured: Captured, response: Response, params: ShapleyParams) -> Credit:
        """The values, on the tokens of each unit."""
        units = Units.of(response, params)
        count = len(units.stops)
        scores = dict(zip(_coalitions(units, params), (each.reward for each in captured.variants), strict=True))
        scores[np.ones(count, dtype=bool).tobytes()] = captured.reward
        error = None
        if _exact(units, params):
            values = _all_coalitions(scores, count)
        else:
            pairs = np.array(
                [(_parts(scores, order) + _parts(scores, order[::-1])) / 2 for order in _orders(units, params)]
            )
            values = pairs.mean(axis=0)
            error = float((pairs.std(axis=0, ddof=1) / np.sqrt(len(pairs))).max())
        spans = zip(units.spans(), values.tolist(), strict=True)
        return Credit(
            units.spread(values),
            baseline=scores[np.zeros(count, dtype=bool).tobytes()],
            segments=tuple(Segment(start, stop, value) for (start, stop), value in spans),
            standard_error=error,
        )


def _exact(units: Units, params: ShapleyParams) -> bool:
    return len(units.stops) <= EXACT_UP_TO and not params.within_sentences


def _coalitions(units: Units, params: ShapleyParams) -> list[_Coalition]:
    """Each one that is scored, once, the whole left out; the empty one comes first."""
    count = len(units.stops)
    if _exact(units, params):
        found = [_members(number, count) for number in range(2**count - 1)]
    else:
        drawn = [order for each in _orders(units, params) for order in (each, each[::-1])]
        found = [coalition for order in drawn for coalition in _grown(order)[:-1]]
    return list(dict.fromkeys(each.tobytes() for each in found))


def _members(number: int, count: int) -> Bool[np.ndarray, " U"]:
    """The coalition whose members are a number's bits."""
    return np.array([number >> unit & 1 for unit in range(count)], dtype=bool)


def _orders(units: Units, params: ShapleyParams) -> list[Int64[np.ndarray, " U"]]:
    """Orders of the units, the same for the same response and seed."""
    generator = np.random.default_rng(params.seed)
    count = len(units.stops)
    if not params.within_sentences:
        return [generator.permutation(count) for _ in range(params.orders)]
    groups = _by_sentence(units)
    return [
        np.concatenate([generator.permutation(groups[index]) for index in generator.permutation(len(groups))])
        for _ in range(params.orders)
    ]


def _by_sentence(units: Units) -> list[Int64[np.ndarray, " n"]]:
    """The units of each sentence; one that lies across its end belongs to it."""
    boundaries = text_boundaries_of("within_sentences", units.response)
    starts = np.array([start for start, _ in units.spans()])
    edges = np.searchsorted(starts, [0, *boundaries.sentences])
    return [np.arange(start, stop) for start, stop in pairwise(edges.tolist()) if stop > start]


def _grown(order: Int64[np.ndarray, " U"]) -> Bool[np.ndarray, "U+1 U"]:
    """The coalitions that an order puts together, from the empty one to the whole."""
    ranks = np.argsort(order)
    return ranks[None, :] < np.arange(len(order) + 1)[:, None]


def _parts(scores: dict[_Coalition, float], order: Int64[np.ndarray, " U"]) -> Float64[np.ndarray, " U"]:
    """What each unit adds in one order."""
    steps = np.diff([scores[coalition.tobytes()] for coalition in _grown(order)])
    parts = np.empty(len(order))
    parts[order] = steps
    return parts


def _all_coalitions(scores: dict[_Coalition, float], count: int) -> Float64[np.ndarray, " U"]:
    """The exact values: each coalition without u, weighted by the share of orders in which it comes before u."""
    values = np.zeros(count)
    for number in range(2**count):
        present = _members(number, count)
        size = int(present.sum())
        for unit in np.flatnonzero(~present):
            grown = present.copy()
            grown[unit] = True
            weight = factorial(size) * factorial(count - size - 1) / factorial(count)
            values[unit] += weight * (scores[grown.tobytes()] - scores[present.tobytes()])
    return values
