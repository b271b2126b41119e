"""What a batch costs, against a count of every token and of every pair of a query and a key."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densereward.capture import Need, PrefixScores, ScoringInput
from densereward.scheduling.cost import BatchCost, Cost, cost_of

CLOSED: frozenset[Need] = frozenset([PrefixScores("closed")])


Shape = tuple[list[int], list[int], list[int], bool]

SHAPES = st.tuples(
    st.lists(st.integers(0, 1), max_size=3),
    st.lists(st.integers(0, 9), max_size=4),
    st.lists(st.integers(0, 9), max_size=2),
    st.booleans(),
)
BATCHES = st.lists(SHAPES, max_size=5)


def made(shape: Shape) -> ScoringInput:
    prompt, response, closing, closed = shape
    ids = [*prompt, *response, *closing] or [0]
    needs = CLOSED if closed else frozenset()
    return ScoringInput(ids, len(prompt), len(response), len(ids) - 1, closing, needs)


def counted(batch: Sequence[ScoringInput]) -> Cost:
    """Every token that runs, with the keys it sees: its own sequence up to itself. A prompt's tokens run once."""
    seen: dict[object, int] = {}
    for number, each in enumerate(batch):
        prompt = tuple(each.token_ids[: each.prompt_length])
        for position in range(len(each.token_ids)):
            shared = position < len(prompt) < len(each.token_ids)
            owner = ("prompt", prompt) if shared else ("own", number)
            seen[owner, position] = sum(1 for key in range(len(each.token_ids)) if key <= position)
        for t in range(each.response_length + 1) if each.closes_prefixes else ():
            for k in range(len(each.closing_ids)):
                before = sum(1 for key in range(len(each.token_ids)) if key < each.prompt_length + t)
                seen["block", number, t, k] = before + k + 1
    return Cost(len(seen), sum(seen.values()))


def billed(batch: Sequence[ScoringInput]) -> Cost:
    cost = BatchCost(0.5)
    for each in batch:
        cost.add(cost_of(each))
    return cost.total


@given(BATCHES)
def test_a_batch_costs_what_counting_gives(shapes: list[Shape]) -> None:
    batch = list(map(made, shapes))
    assert billed(batch) == counted(batch)


@given(BATCHES)
def test_the_order_of_a_batch_does_not_change_its_cost(shapes: list[Shape]) -> None:
    batch = list(map(made, shapes))
    assert billed(batch[::-1]) == billed(batch)


@given(BATCHES, SHAPES, st.integers(0, 40))
def test_what_fits_is_what_stays_within_the_limit(shapes: list[Shape], shape: Shape, limit: int) -> None:
    cost, more = BatchCost(0.5), cost_of(made(shape))
    for each in map(made, shapes):
        cost.add(cost_of(each))
    fits = cost.fits(more, float(limit))
    cost.add(more)
    assert fits == (cost.work <= limit)


@given(SHAPES)
def test_a_sequence_alone_costs_its_forward_tokens(shape: Shape) -> None:
    sequence = made(shape)
    assert billed([sequence]).tokens == sequence.forward_tokens


def test_eight_responses_to_one_prompt_pay_for_it_once() -> None:
    group = [ScoringInput([*range(512), *[i] * 64], 512, 64, 575) for i in range(8)]
    assert billed(group).tokens == 512 + 8 * 64


def test_work_counts_pairs_in_tokens_worth() -> None:
    assert Cost(tokens=10, pairs=400).work(0.25) == 110


def test_a_prompt_that_is_met_again_is_kept_once() -> None:
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    first, second = (cost_of(ScoringInput([1, 2, i], 2, 1, 2), known) for i in range(2))
    assert first.prompt_ids is second.prompt_ids


@pytest.mark.parametrize("prompt_length", [0, 2])
def test_no_prompt_and_nothing_but_a_prompt_share_nothing(prompt_length: int) -> None:
    sequence = ScoringInput([1, 2], prompt_length, 2 - prompt_length, 1)
    assert billed([sequence, sequence]) == Cost(4, 6)
