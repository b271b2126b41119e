"""The budget of a batch: what is chosen on fast, slow, small and strange machines, by a clock that only passes move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from densereward.capture import AttentionRow, Captured, PrefixScores, ScoringInput
from densereward.engines.base import EngineFacts
from densereward.errors import EngineFailure
from densereward.scheduling.batch_size import measure_batch_size
from fakes import FACTS, FakeEngine


class TimedEngine(FakeEngine):
    """A pass of n tokens takes `seconds(n)`, and fails beyond `memory` tokens."""

    def __init__(self, seconds: Callable[[int], float], memory: int = 10**9, **facts: object) -> None:
        super().__init__()
        self.facts: EngineFacts = replace(FACTS, **facts)  # type: ignore[arg-type]
        self.seconds = seconds
        self.memory = memory
        self.now = 0.0
        self.sizes: list[int] = []
        self.seen: list[ScoringInput] = []

    def clock(self) -> float:
        return self.now

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        tokens = sum(len(each.token_ids) for each in batch)
        self.sizes.append(tokens)
        self.seen += batch
        self.now += self.seconds(tokens)
        if tokens > self.memory:
            raise EngineFailure("out of memory", code="out_of_memory")
        return super().forward(batch)


def always(seconds: float) -> Callable[[int], float]:
    return lambda _: seconds


def budget(engine: TimedEngine) -> int:
    return measure_batch_size(engine, engine.clock)


def test_the_smallest_size_near_the_best_throughput_is_chosen() -> None:
    engine = TimedEngine(lambda tokens: 1e-6 * max(tokens, 8000), device="cuda:0")  # busy from 8000 tokens on
    assert budget(engine) == 8192


def test_a_machine_that_only_slows_down_gets_the_smallest_budget() -> None:
    engine = TimedEngine(lambda tokens: 1e-5 * tokens**1.2)
    assert budget(engine) == 2048


def test_it_ends_where_two_doublings_gain_nothing() -> None:
    engine = TimedEngine(lambda tokens: 1e-7 * tokens, device="cuda")
    assert budget(engine) == 2048
    assert max(engine.sizes) <= 8192


@pytest.mark.parametrize(("device", "largest"), [("cpu", 4096), ("cuda:1", 65_536)])
def test_where_more_always_pays_it_ends_at_what_a_device_is_tried_with(device: str, largest: int) -> None:
    engine = TimedEngine(always(0.01), device=device)
    assert budget(engine) == largest
    assert largest - 170 < max(engine.sizes) <= largest


def test_a_slow_model_is_not_measured_for_long() -> None:
    engine = TimedEngine(lambda tokens: 0.1 * tokens)
    assert budget(engine) == 2048
    assert engine.sizes == [128]


@pytest.mark.parametrize("rate", [200, 500, 1000, 2000, 5000, 20_000, 10**6])
def test_measuring_takes_about_three_seconds_at_most(rate: int) -> None:
    engine = TimedEngine(lambda tokens: 0.05 + tokens / rate)
    budget(engine)
    assert engine.now < 3.5


def test_a_pass_that_fails_ends_it_with_what_did_not() -> None:
    engine = TimedEngine(always(0.001), memory=5000, device="cuda")
    assert budget(engine) == 4096


def test_a_device_that_holds_little_gets_less_than_would_be_chosen_for_speed() -> None:
    assert budget(TimedEngine(always(0.001), memory=600)) == 512


def test_a_device_that_holds_next_to_nothing_still_gets_a_budget() -> None:
    assert budget(TimedEngine(always(0.001), memory=1)) == 128


def test_a_clock_that_stands_still_is_survived() -> None:
    assert budget(TimedEngine(always(0.0))) >= 2048


def test_made_up_sequences_are_what_the_model_reads_and_share_nothing() -> None:
    engine = TimedEngine(always(0.001), max_length=100, vocabulary_size=7)
    budget(engine)
    assert max(len(each.token_ids) for each in engine.seen) == 100
    assert max(max(each.token_ids) for each in engine.seen) < 7
    assert all(each.response_stop == len(each.token_ids) == each.scored_position + 1 for each in engine.seen)
    assert all(each.needs == {PrefixScores("open"), AttentionRow(-1)} for each in engine.seen)
    last = [tuple(each.token_ids[: each.prompt_length]) for each in engine.seen[-40:]]
    assert len(set(last)) == len(last)


def test_a_model_of_one_token_is_measured_too() -> None:
    assert budget(TimedEngine(always(0.01), memory=1500, max_length=1)) == 1024
