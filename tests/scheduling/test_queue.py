"""Whose turn it is among all that waits, and that nothing is left of a call that was served."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from densereward.capture import ScoringInput
from densereward.metrics import Metrics
from densereward.scheduling.cost import cost_of
from densereward.scheduling.queue import Queue, Scored, Waiting


def waiting(prompt: int, response: int, mark: int = 0) -> Waiting:
    """A prompt of as many tokens, which is the same for all prompts of that length, and its response."""
    ids = (*[1] * prompt, *[2 + mark] * response)
    sequence = ScoringInput(ids, prompt, response, prompt + response - 1)
    future: asyncio.Future[Scored] = asyncio.Future(loop=_LOOP)
    return Waiting(sequence, cost_of(sequence), prompt + response, future, 0.0)


_LOOP = asyncio.new_event_loop()


def marks(batch: list[Waiting]) -> list[int]:
    return [each.sequence.token_ids[-1] - 2 for each in batch]


def test_lower_numbers_come_before_all_that_waits_with_higher_ones() -> None:
    queue = Queue(4, 0.0, Metrics())
    for mark, priority in enumerate([5, 0, 5, -3, 0]):
        queue.join([waiting(0, 2, mark)] * 2, priority)
    served = []
    while batch := queue.next_batch():
        served += marks(batch)
    assert [sorted(served[:2]), sorted(served[2:6]), sorted(served[6:])] == [[3, 3], [1, 1, 4, 4], [0, 0, 2, 2]]


def test_callers_of_one_priority_take_turns() -> None:
    queue = Queue(2, 0.0, Metrics())
    for mark in range(3):
        queue.join([waiting(0, 2, mark)] * 3, priority=7)
    assert [marks(queue.next_batch()) for _ in range(9)] == [[0], [1], [2]] * 3


def test_a_call_that_others_took_along_leaves_nothing_behind() -> None:
    queue = Queue(10, 0.0, Metrics())
    queue.join([waiting(0, 3)])
    queue.join([waiting(5, 4, mark=1)])  # does not fit beside the first, but without its prompt it does
    queue.join([waiting(5, 1, mark=2)])
    queue.next_batch()
    while queue.next_batch():
        pass
    assert len(queue._to_fill) == len(queue._to_begin) == len(queue._groups) == queue.tokens == 0


@given(
    st.lists(
        st.tuples(
            st.integers(-2, 2), st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=5)
        ),
        max_size=8,
    ),
    st.integers(1, 20),
)
def test_all_that_waits_is_served_once_and_nothing_is_left(
    calls: list[tuple[int, list[tuple[int, int]]]], budget: int
) -> None:
    queue = Queue(budget, 0.0, Metrics())
    for mark, (priority, sizes) in enumerate(calls):
        queue.join([waiting(prompt, response, mark) for prompt, response in sizes], priority)
    served: list[int] = []
    while batch := queue.next_batch():
        served += marks(batch)
    assert sorted(served) == [mark for mark, (_, sizes) in enumerate(calls) for _ in sizes]
    assert len(queue._to_fill) == len(queue._to_begin) == len(queue._groups) == queue.tokens == 0
