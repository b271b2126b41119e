"""The packed engine against itself: the numbers of a sequence do not depend on the batch around it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import tiny
from densereward.capture import (
    Gradients,
    ScoringInput,
)
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import EngineFailure
from sequences import (
    ALL,
    CLOSING,
    OPEN,
    assert_same,
    mixed_batch,
    packed_row,
    prepared,
    sequence,
    shared_engine,
)


def test_responses_that_share_a_prompt_have_the_numbers_they_have_alone(
    engine_and_model: tuple[TorchEngine, Any],
) -> None:
    engine, _ = engine_and_model
    group = [sequence(40 + length, 40, 2 * (length > 4), seed=length, prompt_seed=7) for length in (1, 3, 9, 30, 55)]
    other = [sequence(12 + length, 12, seed=length, prompt_seed=8) for length in (2, 20)]
    batch = [group[0], other[0], *group[1:3], sequence(9, 3), *group[3:], other[1], replace(group[1], needs=OPEN)]
    packed = packed_row(batch)
    assert [len(prompt) for prompt, _ in packed.groups] == [40, 12]
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        assert_same(captured, engine.forward([each])[0], 2e-6)


def test_a_shared_prompt_is_in_the_row_once() -> None:
    batch = [sequence(44, 40, seed=seed, prompt_seed=7, needs=OPEN) for seed in range(8)]
    assert packed_row(batch).token_ids.shape == (1, 40 + 8 * 4)


def test_a_sequence_that_is_all_prompt_is_read_at_its_end_beside_others_that_go_on(
    engine_and_model: tuple[TorchEngine, Any],
) -> None:
    engine, model = engine_and_model
    longer = sequence(12, 8, prompt_seed=7)
    ends = ScoringInput(longer.token_ids[:8], 8, 0, 7, CLOSING, ALL)
    captured = engine.forward([longer, ends, longer])
    assert captured[1].reward == pytest.approx(reference.score(model, ends.token_ids), abs=1e-5)
    assert captured[1].prefixes["open"].after.shape == (0,)


def test_a_sample_has_the_same_numbers_alone_in_a_batch_of_64_and_in_any_order(
    engine_and_model: tuple[TorchEngine, Any],
) -> None:
    engine, _ = engine_and_model
    batch = mixed_batch(64)
    together = engine.forward(batch)
    order = random.Random(1).sample(range(64), 64)
    shuffled = engine.forward([batch[i] for i in order])
    for place, i in enumerate(order):
        assert_same(shuffled[place], together[i], 1e-6)
    for i in range(0, 64, 7):
        assert_same(engine.forward([batch[i]])[0], together[i], 1e-6)


@pytest.mark.parametrize("tokens", [7, 16, 50])
def test_a_sequence_too_long_for_one_pass_has_the_same_numbers_in_chunks(
    engine_and_model: tuple[TorchEngine, Any], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    engine, _ = engine_and_model
    batch = [sequence(90, 20, 2, seed=1), sequence(60, 0, 1, seed=2), sequence(61, 59, seed=3, needs=OPEN)]
    expected = [engine.forward([each])[0] for each in batch]
    monkeypatch.setattr(engine._passes, "_batch_tokens", tokens)
    for each, captured in zip(batch, expected, strict=True):
        assert_same(engine.forward([each])[0], captured, 4e-6)


@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_packing_of_any_lengths_gives_each_sequence_its_own_numbers(lengths: list[int], seed: int) -> None:
    engine = shared_engine()
    batch = [
        sequence(length, min(length, seed % 5), seed=seed + i, prompt_seed=i % 2) for i, length in enumerate(lengths)
    ]
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        assert_same(captured, engine.forward([each])[0], 2e-6)


def test_memory_of_explicit_attention_grows_with_length_and_not_with_its_square() -> None:
    from densereward.engines.torch import attention, kernels

    seen: list[int] = []
    original = kernels.explicit

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(q.shape[1] * k.shape[1])
        return original(q, k, *rest)

    engine = TorchEngine(prepared(tiny.make_model("gemma2")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "explicit", watched)
        engine.forward([sequence(1500, 10, needs=ALL - {Gradients()})])
    assert max(seen) <= kernels.QUERY_BLOCK * (1500 + kernels.QUERY_BLOCK)


def test_running_out_of_memory_is_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = shared_engine()

    def too_much(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine._passes, "backbone", too_much)
    with pytest.raises(EngineFailure, match="--max-batch-tokens") as failure:
        engine.forward([sequence(9, 3)])
    assert failure.value.error_code == "out_of_memory"
