"""The queue in front of an engine that schedules by itself: what that holds, who is refused, who leaves, its death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from densereward.errors import EngineDied, NotReady, Overloaded, TooLarge
from densereward.metrics import Metrics
from densereward.scheduling.batcher import Batcher
from densereward.scheduling.handover import HandoverBatcher, batcher_for
from fakes import FakeEngine, FakeStream, rewards, sequence, until

DEAD = EngineDied("it ended", retry_after=30.0)


@asynccontextmanager
async def running(
    engine: FakeStream, *, on_death: Callable[[EngineDied], None] = lambda _: None, max_queue_tokens: int = 100
) -> AsyncIterator[Batcher]:
    queue = batcher_for(
        engine, max_batch_tokens=4, max_queue_tokens=max_queue_tokens, metrics=Metrics(), on_death=on_death
    )
    try:
        yield queue
    finally:
        closing = asyncio.create_task(queue.close())
        while not closing.done():
            if engine.held:
                engine.give_back()
            await asyncio.sleep(0)
        await closing


async def test_an_engine_that_streams_gets_the_queue_that_streams() -> None:
    async with running(FakeStream()) as queue:
        assert isinstance(queue, HandoverBatcher)
    batcher = batcher_for(FakeEngine(), max_batch_tokens=4, max_queue_tokens=9, metrics=Metrics())
    assert type(batcher) is Batcher
    await batcher.close()


async def test_answers_keep_the_order_of_the_call_whatever_comes_back_first() -> None:
    engine = FakeStream()
    async with running(engine) as queue:
        scoring = asyncio.create_task(queue.score([sequence(1, 2), sequence(5, 5), sequence(7, 1)]))
        await until(lambda: len(engine.held) == 3)
        for place in (2, 0, 0):
            engine.give_back(place)
        assert rewards(await scoring) == [3.0, 10.0, 8.0]


async def test_the_engine_holds_two_passes_worth_and_gets_more_as_it_gives_back() -> None:
    engine = FakeStream()
    async with running(engine) as queue:
        scoring = asyncio.create_task(queue.score([sequence(i, i) for i in range(8)]))
        await until(lambda: len(engine.held) == 4)
        await asyncio.sleep(0.02)
        assert len(engine.held) == 4  # of two tokens each, where a pass holds four
        for _ in range(2):
            engine.give_back()
        await until(lambda: len(engine.held) == 4)
        while engine.held or not scoring.done():
            if engine.held:
                engine.give_back()
            await asyncio.sleep(0)
        assert rewards(await scoring) == [2.0 * i for i in range(8)]


async def test_a_failure_reaches_only_its_own_sequence() -> None:
    engine = FakeStream()
    engine.poison = 9
    async with running(engine) as queue:
        scoring = asyncio.create_task(queue.score([sequence(1, 2), sequence(9, 9), sequence(3, 4)]))
        await until(lambda: len(engine.held) == 3)
        for _ in range(3):
            engine.give_back()
        assert rewards(await scoring) == [3.0, "the engine failed: RuntimeError: poisoned", 7.0]


async def test_who_leaves_takes_along_what_waits_and_what_the_engine_holds() -> None:
    engine = FakeStream()
    async with running(engine) as queue:
        leaving = asyncio.create_task(queue.score([sequence(1, 1, 1, 1)] * 4))
        await until(lambda: len(engine.held) == 2)
        staying = asyncio.create_task(queue.score([sequence(2, 2)]))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await until(lambda: len(engine.held) == 3)  # room for who stayed, without anything given back
        assert [given.cancelled() for _, given in engine.held] == [True, True, False]
        engine.give_back(2)
        assert rewards(await staying) == [4.0]


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    engine = FakeStream()
    async with running(engine, max_queue_tokens=6) as queue:
        scoring = []
        for held in (1, 2, 2):
            scoring.append(asyncio.create_task(queue.score([sequence(1, 1, 1, 1)])))
            await asyncio.sleep(0.01)
            assert len(engine.held) == held
        with pytest.raises(Overloaded) as refused:
            await queue.score([sequence(1, 1, 1)])
        assert refused.value.retry_after > 0
        with pytest.raises(TooLarge):
            await queue.score([sequence(*range(7))])
        for task in scoring:
            await until(lambda: bool(engine.held))
            engine.give_back()
            assert rewards(await task) == [4.0]


async def test_a_death_fails_all_who_wait_and_all_who_come_and_is_told_once() -> None:
    engine = FakeStream()
    told: list[EngineDied] = []
    async with running(engine, on_death=told.append) as queue:
        scoring = [asyncio.create_task(queue.score([sequence(1, 1, 1, 1)] * 2)) for _ in range(3)]
        await until(lambda: len(engine.held) == 2)
        engine.death.set_result(DEAD)
        for task in scoring:
            with pytest.raises(EngineDied, match="it ended"):
                await task
        with pytest.raises(EngineDied):
            await queue.score([sequence(1, 2)])
        assert told == [DEAD]


async def test_closing_finishes_what_waits_and_takes_nothing_new() -> None:
    engine = FakeStream()
    async with running(engine) as queue:
        scoring = asyncio.create_task(queue.score([sequence(1, 1, 1, 1)] * 5))
        await until(lambda: len(engine.held) == 2)
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await queue.score([sequence(1, 2)])
        while not closing.done():
            if engine.held:
                engine.give_back()
            await asyncio.sleep(0)
        assert rewards(await scoring) == [4.0] * 5
