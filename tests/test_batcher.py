"""The queue: who runs with whom, who is refused, and what happens to those who leave or break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from densereward.batcher import Batcher, Scored
from densereward.capture import ScoringInput
from densereward.errors import EngineFailure, NotReady, Overloaded, TooLarge
from densereward.metrics import Metrics
from fakes import FakeEngine


def sequence(*ids: int) -> ScoringInput:
    return ScoringInput(ids, 1, len(ids) - 1, len(ids) - 1)


@asynccontextmanager
async def running(
    engine: FakeEngine, *, max_batch_tokens: int = 10, max_queue_tokens: int = 100
) -> AsyncIterator[Batcher]:
    batcher = Batcher(engine, max_batch_tokens=max_batch_tokens, max_queue_tokens=max_queue_tokens, metrics=Metrics())
    try:
        yield batcher
    finally:
        engine.gate.set()
        await batcher.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def rewards(results: list[Scored | EngineFailure]) -> list[float | str]:
    return [each.captured.reward if isinstance(each, Scored) else each.message for each in results]


async def test_a_lone_request_starts_at_once() -> None:
    engine = FakeEngine()
    async with running(engine) as batcher, asyncio.timeout(5):
        assert rewards(await batcher.score([sequence(1, 2)])) == [3.0]
    assert engine.batches == [[[1, 2]]]


async def test_an_empty_request_is_answered_without_a_pass() -> None:
    engine = FakeEngine()
    async with running(engine) as batcher, asyncio.timeout(5):
        assert await batcher.score([]) == []
    assert engine.batches == []


async def test_whoever_waits_together_runs_together_in_order_up_to_the_budget() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with running(engine, max_batch_tokens=6) as batcher:
        first = asyncio.create_task(batcher.score([sequence(9, 9)]))
        await until(engine.started.is_set)
        others = [asyncio.create_task(batcher.score([sequence(i, i)])) for i in range(1, 6)]
        await asyncio.sleep(0)
        engine.gate.set()
        results = await asyncio.gather(first, *others)
    assert [rewards(each) for each in results] == [[18.0], [2.0], [4.0], [6.0], [8.0], [10.0]]
    assert engine.batches == [[[9, 9]], [[1, 1], [2, 2], [3, 3]], [[4, 4], [5, 5]]]


async def test_a_sequence_longer_than_the_budget_runs_by_itself() -> None:
    engine = FakeEngine()
    async with running(engine, max_batch_tokens=3) as batcher:
        await batcher.score([sequence(1, 1), sequence(*[2] * 9), sequence(3, 3)])
    assert [len(batch) for batch in engine.batches] == [1, 1, 1]


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with running(engine, max_queue_tokens=10) as batcher:
        running_one = asyncio.create_task(batcher.score([sequence(1, 1)]))
        await until(engine.started.is_set)
        waiting = asyncio.create_task(batcher.score([sequence(*[1] * 8)]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await batcher.score([sequence(1, 1, 1)])
        assert refused.value.retry_after > 0
        assert refused.value.details == {"tokens": 3, "limit": 10}
        engine.gate.set()
        await asyncio.gather(running_one, waiting)
        assert rewards(await batcher.score([sequence(1, 1, 1)])) == [3.0]


async def test_a_request_that_the_queue_can_never_hold_is_too_large() -> None:
    async with running(FakeEngine(), max_queue_tokens=10) as batcher:
        with pytest.raises(TooLarge, match="send it in parts"):
            await batcher.score([sequence(*[1] * 11)])


async def test_work_of_a_caller_who_left_is_dropped_and_its_room_given_back() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with running(engine, max_queue_tokens=10) as batcher:
        first = asyncio.create_task(batcher.score([sequence(9, 9)]))
        await until(engine.started.is_set)
        left = asyncio.create_task(batcher.score([sequence(5, 5, 5, 5, 5)]))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        stays = asyncio.create_task(batcher.score([sequence(*[7] * 10)]))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, stays)
    assert engine.batches == [[[9, 9]], [[7] * 10]]


async def test_an_error_reaches_only_the_sequence_that_caused_it() -> None:
    engine = FakeEngine()
    engine.poison = 13
    async with running(engine, max_batch_tokens=100) as batcher:
        results = rewards(await batcher.score([sequence(1, 1), sequence(2, 2), sequence(13, 1), sequence(3, 3)]))
        assert results == [2.0, 4.0, "the engine failed: RuntimeError: poisoned", 6.0]
        assert rewards(await batcher.score([sequence(4, 4)])) == [8.0]


async def test_closing_finishes_what_waits_and_refuses_what_comes() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with running(engine) as batcher:
        waiting = [asyncio.create_task(batcher.score([sequence(i, i)])) for i in range(3)]
        await until(engine.started.is_set)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await batcher.score([sequence(1, 1)])
        engine.gate.set()
        assert [rewards(each) for each in await asyncio.gather(*waiting)] == [[0.0], [2.0], [4.0]]
        await closing
