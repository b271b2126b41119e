"""The queue: who runs with whom, who is refused, and what happens to those who leave or break."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densereward.capture import ScoringInput
from densereward.errors import NotReady, Overloaded, TooLarge
from densereward.metrics import Metrics
from densereward.scheduling.batcher import Batcher, Scored, _Speed
from densereward.scheduling.cost import BatchCost, SequenceCost, cost_of
from densereward.scheduling.queue import Queue, Waiting
from fakes import FACTS, FakeEngine, rewards, sequence, until


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


async def test_very_many_sequences_keep_their_order_and_leave_the_loop_alone() -> None:
    engine = FakeEngine()
    async with running(engine, max_batch_tokens=4000, max_queue_tokens=10**6) as batcher, asyncio.timeout(20):
        scoring = asyncio.create_task(batcher.score([sequence(i % 50, i) for i in range(2000)]))
        turns = 0
        while not engine.started.is_set():
            await asyncio.sleep(0)
            turns += 1
        assert rewards(await scoring) == [i % 50 + i for i in range(2000)]
    assert turns > 2  # the loop had its turns while they were priced


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


def answers(*prompts_and_answers: tuple[tuple[int, ...], int]) -> list[ScoringInput]:
    """Answers of one token, each to its prompt."""
    return [ScoringInput((*prompt, answer), len(prompt), 1, len(prompt)) for prompt, answer in prompts_and_answers]


async def waiting_together(
    engine: FakeEngine, calls: list[list[ScoringInput]], max_batch_tokens: int = 10
) -> list[list[list[int]]]:
    """The batches that calls are run in which all wait, in their order, while the engine is busy."""
    engine.gate.clear()
    async with running(engine, max_batch_tokens=max_batch_tokens, max_queue_tokens=10**6) as batcher:
        first = asyncio.create_task(batcher.score([sequence(0, 0)]))
        await until(engine.started.is_set)
        tasks = [asyncio.create_task(batcher.score(call)) for call in calls]
        await asyncio.sleep(0)
        engine.gate.set()
        results = await asyncio.gather(first, *tasks)
    expected = [[float(sum(each.token_ids)) for each in call] for call in calls]
    assert [rewards(each) for each in results[1:]] == expected
    return engine.batches[1:]


async def test_a_call_of_many_sequences_does_not_keep_a_later_call_of_one_waiting() -> None:
    many = [sequence(i, i) for i in range(1, 101)]
    batches = await waiting_together(FakeEngine(), [many, [sequence(200, 200)]])
    assert [200, 200] in batches[0]


async def test_a_call_of_many_answers_to_one_prompt_does_not_keep_it_waiting_either() -> None:
    many = answers(*(((7, 7), i) for i in range(100)))
    batches = await waiting_together(FakeEngine(), [many, [sequence(200, 200)]])
    assert [200, 200] in batches[0]


async def test_calls_take_turns() -> None:
    calls = [[sequence(100 * call + i, i) for i in range(1, 5)] for call in range(3)]
    batches = await waiting_together(FakeEngine(), calls, max_batch_tokens=6)
    assert [sorted(ids[0] // 100 for ids in batch) for batch in batches] == [[0, 1, 2]] * 4


async def test_a_long_sequence_does_not_wait_for_a_stream_of_short_ones_to_end() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with running(engine, max_queue_tokens=1000) as batcher:
        short = [asyncio.create_task(batcher.score([sequence(i, i)])) for i in range(1, 4)]
        await until(engine.started.is_set)
        long = asyncio.create_task(batcher.score([sequence(*[9] * 10)]))
        steady = [asyncio.create_task(batcher.score([sequence(i, i) for i in range(50)])) for _ in range(3)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(long, *short, *steady)
    assert [9] * 10 in [ids for batch in engine.batches[:3] for ids in batch]


async def test_a_long_sequence_at_the_head_of_its_call_runs_although_its_neighbours_fit_better() -> None:
    mixed = [sequence(*[9] * 10), *(sequence(i, i) for i in range(50, 70))]
    others = [sequence(i, i) for i in range(100, 200)]
    batches = await waiting_together(FakeEngine(), [others, mixed])
    assert [[9] * 10] in batches[:3]


async def test_what_does_not_fit_does_not_block_what_does() -> None:
    calls = [[sequence(1, 1)], [sequence(*[2] * 9)], [sequence(3, 3)], [sequence(4, 4)]]
    batches = await waiting_together(FakeEngine(), calls)
    assert batches == [[[1, 1], [3, 3], [4, 4]], [[2] * 9]]


async def test_within_a_call_too_what_does_not_fit_is_passed_over() -> None:
    batches = await waiting_together(FakeEngine(), [[sequence(1, 1), sequence(*[2] * 9), sequence(3, 3)]])
    assert batches == [[[1, 1], [3, 3]], [[2] * 9]]


async def test_answers_to_one_prompt_run_together_within_a_call_and_the_prompt_counts_once() -> None:
    ours, other = (7, 7, 7, 7), (8, 8, 8, 8)
    batches = await waiting_together(
        FakeEngine(), [answers((ours, 1), (other, 1), (ours, 2), (other, 2), (ours, 3))], max_batch_tokens=7
    )
    assert batches == [[[*ours, 1], [*ours, 2], [*ours, 3]], [[*other, 1], [*other, 2]]]


async def test_answers_to_one_prompt_run_together_across_calls() -> None:
    ours, other = (7,) * 6, (8,) * 6
    calls = [answers((ours, 1)), answers((other, 1)), answers((ours, 2)), answers((other, 2))]
    batches = await waiting_together(FakeEngine(), calls, max_batch_tokens=8)
    assert batches == [[[*ours, 1], [*ours, 2]], [[*other, 1], [*other, 2]]]


async def test_a_prompt_that_a_call_repeats_takes_its_room_in_the_queue_once() -> None:
    engine = FakeEngine()
    async with running(engine, max_queue_tokens=10) as batcher:
        assert len(await batcher.score(answers(*(((7,) * 6, i) for i in range(4))))) == 4
        with pytest.raises(TooLarge, match="11 tokens"):
            await batcher.score(answers(*(((7,) * 6, i) for i in range(5))))


async def test_long_sequences_count_for_what_their_attention_costs() -> None:
    class Attentive(FakeEngine):
        facts = replace(FACTS, pair_cost=1.0)

    batches = await waiting_together(Attentive(), [[sequence(i, i) for i in range(4)]], max_batch_tokens=10)
    assert [len(batch) for batch in batches] == [2, 2]  # 2 tokens and 3 pairs each


async def test_what_ran_and_what_sharing_saved_is_counted() -> None:
    metrics = Metrics()
    batcher = Batcher(FakeEngine(), max_batch_tokens=20, max_queue_tokens=100, metrics=metrics)
    await batcher.score(answers(((7,) * 6, 1), ((7,) * 6, 2)))
    await batcher.close()
    text = metrics.render().decode()
    for line in ("batch_tokens_sum 8.0", "shared_tokens_total 6.0", "batch_fill_sum 0.4", "queue_tokens 0.0"):
        assert f"densereward_{line}\n" in text


async def test_the_time_to_come_back_is_what_the_last_passes_make_likely() -> None:
    speed = _Speed()
    assert speed.seconds(100) == 1.0
    speed.add(100, 1.0)
    assert speed.seconds(100) == pytest.approx(1.0)
    speed.add(1, 0.001)  # a small pass says little
    assert speed.seconds(100) == pytest.approx(1.0, rel=0.02)


async def test_a_hundred_thousand_waiting_sequences_are_no_burden() -> None:
    """The work of choosing batches grows with what is chosen, not with what waits: tries are counted, not seconds."""
    tries = 0

    class Counted(BatchCost):
        def fits(self, item: SequenceCost, limit: float) -> bool:
            nonlocal tries
            tries += 1
            return super().fits(item, limit)

    calls: list[list[tuple[ScoringInput, SequenceCost, int]]] = []
    for prompt in range(50):
        inputs = [ScoringInput((prompt, i, *[1] * (i % 90)), 1, 1 + i % 90, 1 + i % 90) for i in range(100)]
        calls.append([(one, cost_of(one), one.forward_tokens) for one in inputs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densereward.scheduling.queue.BatchCost", Counted)
        queue = Queue(100, 0.0, Metrics())
        future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        for call in range(1000):
            queue.join([Waiting(*each, future, 0.0) for each in calls[call % 50]])
        for _ in range(100):
            assert queue.next_batch()
    assert tries < 100 * 3000


Work = tuple[int, int, int]  # which prompt, tokens of the prompt, tokens of the answer


@settings(max_examples=60)
@given(
    calls=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 12)), max_size=8), max_size=6
    ),
    leaving=st.sets(st.integers(0, 5)),
    budget=st.integers(1, 25),
    poison=st.sampled_from([None, 1003]),
)
def test_every_sequence_is_answered_once_with_its_own_number_within_the_budget(
    calls: list[list[Work]], leaving: set[int], budget: int, poison: int | None
) -> None:
    asyncio.run(_check_answers(calls, leaving, budget, poison))


async def _check_answers(calls: list[list[Work]], leaving: set[int], budget: int, poison: int | None) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    number = iter(range(1000, 10_000))
    made = [
        [ScoringInput((*[p] * n, *[next(number)] * t), n, t, n + t - 1) for p, n, t in call] for call in calls
    ]  # every answer's token is its own
    async with running(engine, max_batch_tokens=budget, max_queue_tokens=10**6) as batcher:
        first = asyncio.create_task(batcher.score([sequence(0, 0)]))
        await until(engine.started.is_set)
        engine.poison = poison
        tasks = [asyncio.create_task(batcher.score(call)) for call in made]
        await asyncio.sleep(0)
        gone = [index for index in leaving if index < len(tasks) and made[index]]
        for index in gone:
            tasks[index].cancel()
        engine.gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
    for index, (call, result) in enumerate(zip(made, results[1:], strict=True)):
        if index in gone:
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert not isinstance(result, BaseException)
            assert rewards(result) == [_expected(each, poison) for each in call]
    ran = {tuple(each.token_ids): each for call in made for each in call}
    for batch in engine.batches[1:]:
        cost = BatchCost(0.0)
        for ids in batch:
            cost.add(cost_of(ran[tuple(ids)]))
        assert cost.work <= budget or len(batch) == 1
    if poison is None:
        times = Counter(tuple(ids) for batch in engine.batches[1:] for ids in batch)
        stayed = {tuple(each.token_ids) for index, call in enumerate(made) if index not in gone for each in call}
        assert set(times) == stayed
        assert set(times.values()) <= {1}


def _expected(each: ScoringInput, poison: int | None) -> float | str:
    broken = poison in each.token_ids
    return "the engine failed: RuntimeError: poisoned" if broken else float(sum(each.token_ids))
