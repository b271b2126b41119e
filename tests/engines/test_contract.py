"""What every engine promises, with the queue in front of it: the same tests for all of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
from densereward.capture import AttentionRow, Captured, Gradients, Need, PrefixScores, ScoringInput
from densereward.checks.examine import examine
from densereward.checks.numbers import self_check
from densereward.engines.base import Engine
from densereward.errors import EngineFailure, Overloaded, TooLarge
from densereward.metrics import Metrics
from densereward.scheduling.batcher import Batcher, Scored
from densereward.scheduling.handover import batcher_for

SCORES = 5e-5
ROWS = 1e-5
ALL: frozenset[Need] = frozenset([PrefixScores(), AttentionRow(0), AttentionRow(-1)])


@pytest.fixture(scope="module")
def eager(model_folder: Path) -> Any:
    return reference.eager(model_folder)


def sequence(length: int, prompt: int, seed: int = 0, needs: frozenset[Need] = ALL) -> ScoringInput:
    ids = random.Random(seed * 1000 + length).choices(range(3, 320), k=length)
    return ScoringInput(ids, prompt, length - prompt, length - 1, needs=needs)


def mixed(count: int) -> list[ScoringInput]:
    """Many lengths; a third want nothing but their score, a third prefix scores, a third rows as well."""
    generator = random.Random(count)
    kinds = [frozenset[Need](), frozenset[Need]([PrefixScores()]), ALL]
    batch = []
    for seed in range(count):
        length = generator.choice([1, 2, 5, 17, 40, 90, 200])
        batch.append(sequence(length, generator.randrange(length), seed, kinds[seed % 3]))
    return batch


def assert_right(captured: Captured, asked: ScoringInput, eager: Any) -> None:
    """Against transformers' eager attention, in a pass of the sequence's own."""
    read = reference.padded(eager, [asked.token_ids])[0]
    start, stop = asked.prompt_length, asked.response_stop
    assert captured.reward == pytest.approx(float(read.scores[-1]), abs=SCORES)
    assert captured.length == asked.response_length
    assert set(captured.prefixes) == ({"open"} if PrefixScores() in asked.needs else set())
    for prefixes in captured.prefixes.values():
        np.testing.assert_allclose(prefixes.after, read.scores[start:stop], atol=SCORES)
        assert (prefixes.before is None) == (start == 0)
        if prefixes.before is not None:
            assert prefixes.before == pytest.approx(float(read.scores[start - 1]), abs=SCORES)
    assert set(captured.attention_rows) == {need.layer for need in asked.needs if isinstance(need, AttentionRow)}
    for layer, row in captured.attention_rows.items():
        np.testing.assert_allclose(row, read.rows[layer][start:stop], atol=ROWS)


@asynccontextmanager
async def queue_before(engine: Engine, *, max_queue_tokens: int = 10**6) -> AsyncIterator[Batcher]:
    queue = batcher_for(engine, max_batch_tokens=256, max_queue_tokens=max_queue_tokens, metrics=Metrics())
    try:
        yield queue
    finally:
        await queue.close()


def test_a_batch_keeps_its_order_and_gives_what_eager_attention_gives(engine: Engine, eager: Any) -> None:
    batch = mixed(24)
    for captured, asked in zip(engine.forward(batch), batch, strict=True):
        assert_right(captured, asked, eager)


def test_numbers_do_not_depend_on_the_batch(engine: Engine) -> None:
    batch = mixed(64)
    order = random.Random(1).sample(range(64), 64)
    together = engine.forward(batch)
    shuffled = engine.forward([batch[i] for i in order])
    alone = [engine.forward([each])[0] for each in batch[:12]]
    for one, other in [*zip([together[i] for i in order], shuffled, strict=True), *zip(together, alone, strict=False)]:
        assert one.reward == pytest.approx(other.reward, abs=SCORES)
        for mine, others in zip(one.arrays, other.arrays, strict=True):
            np.testing.assert_allclose(mine, others, atol=SCORES)


def test_a_layer_may_be_counted_from_either_end(engine: Engine) -> None:
    layers = engine.facts.layers
    needs: frozenset[Need] = frozenset([AttentionRow(layers - 1), AttentionRow(-1)])
    rows = engine.forward([sequence(30, 10, needs=needs)])[0].attention_rows
    np.testing.assert_array_equal(rows[layers - 1], rows[-1])


def test_the_longest_sequence_is_read_and_so_is_the_shortest(engine: Engine, eager: Any) -> None:
    batch = [sequence(engine.facts.max_length, 3), sequence(1, 0)]
    for captured, asked in zip(engine.forward(batch), batch, strict=True):
        assert_right(captured, asked, eager)


def test_an_engine_claims_only_what_it_provides(engine: Engine) -> None:
    assert engine.provides >= ALL
    if engine.facts.engine != "torch":
        assert Gradients() not in engine.provides


def test_the_checks_before_serving_pass(engine: Engine, model_folder: Path) -> None:
    self_check(engine)
    from transformers import AutoTokenizer

    from densereward.tokenization.align import Aligner

    aligner = Aligner(AutoTokenizer.from_pretrained(model_folder), engine.facts.max_length, 320)
    assert [each.text for each in examine(engine, aligner) if each.status == "fail"] == []


async def test_64_callers_at_once_each_get_their_own_results_though_some_of_them_cancel(
    engine: Engine, eager: Any
) -> None:
    generator = random.Random(5)
    batch = mixed(64)
    async with queue_before(engine) as queue:
        callers = [asyncio.create_task(queue.score([each, replace(each, needs=ALL)])) for each in batch]
        leaving = set(generator.sample(range(64), 12))
        await asyncio.sleep(0.05)
        for i in leaving:
            callers[i].cancel()
        results = await asyncio.gather(*callers, return_exceptions=True)
    for i, (result, asked) in enumerate(zip(results, batch, strict=True)):
        if i in leaving and isinstance(result, asyncio.CancelledError):
            continue
        assert isinstance(result, list)
        for scored, wanted in zip(result, [asked, replace(asked, needs=ALL)], strict=True):
            assert isinstance(scored, Scored)
            assert scored.forward_seconds > 0
            if i % 8 == 0:
                assert_right(scored.captured, wanted, eager)


async def test_a_sequence_that_cannot_be_scored_fails_by_itself(engine: Engine, eager: Any) -> None:
    good, bad = sequence(20, 5), sequence(20, 5, seed=1)
    bad = replace(bad, token_ids=[*bad.token_ids[:-1], 320])  # an id that the model has no row for
    async with queue_before(engine) as queue:
        first, failed, last = await queue.score([good, bad, good])
        (again,) = await queue.score([good])
    assert isinstance(failed, EngineFailure)
    for scored in (first, last, again):
        assert isinstance(scored, Scored)
        assert_right(scored.captured, good, eager)


async def test_more_than_may_wait_is_refused_and_the_rest_is_served(engine: Engine) -> None:
    async with queue_before(engine, max_queue_tokens=300) as queue:
        with pytest.raises(TooLarge):
            await queue.score([sequence(200, 5), sequence(200, 5, seed=1)])
        callers = [asyncio.create_task(queue.score([sequence(200, 5, seed)])) for seed in range(2, 12)]
        results = await asyncio.gather(*callers, return_exceptions=True)
    refused = [each for each in results if isinstance(each, Overloaded)]
    assert refused
    assert all(each.retry_after > 0 for each in refused)
    assert sum(isinstance(each, list) for each in results) == 10 - len(refused) > 0
