"""The packed engine against transformers' eager attention, and what it captures of a sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reference
import tiny
from densereward.capture import (
    AttentionRow,
    Captured,
    Prefixes,
    PrefixScores,
    ScoringInput,
)
from densereward.engines.torch.engine import TorchEngine
from sequences import (
    ALL,
    CLOSING,
    LAYERS,
    OPEN,
    assert_prefixes,
    assert_same,
    prepared,
    sequence,
)


def test_scores_prefixes_and_rows_equal_a_padded_eager_run(engine_and_model: tuple[TorchEngine, Any]) -> None:
    engine, model = engine_and_model
    lengths = [(30, 7, 0), (2, 1, 0), (90, 40, 2), (11, 0, 0), (1, 0, 0)]
    batch = [sequence(*each, needs=OPEN) for each in lengths]
    for each, captured, read in zip(
        batch, engine.forward(batch), reference.padded(model, [each.token_ids for each in batch]), strict=True
    ):
        response = slice(each.prompt_length, each.response_stop)
        expected = Captured(
            reward=float(read.scores[-1]),
            length=each.response_length,
            prefixes={
                "open": Prefixes(
                    before=float(read.scores[each.prompt_length - 1]) if each.prompt_length else None,
                    after=read.scores[response].numpy(),
                )
            },
            attention_rows={layer: read.rows[layer, response].numpy() for layer in range(LAYERS)},
        )
        assert_same(captured, expected, 1e-5)


def test_prefix_scores_equal_one_pass_per_prefix(engine_and_model: tuple[TorchEngine, Any]) -> None:
    engine, model = engine_and_model
    each = sequence(28, 9, 2)
    captured = engine.forward([each])[0]
    expected = reference.prefix_scores(model, each.token_ids[:9], each.response_ids)
    assert_prefixes(captured.prefixes["open"], expected)
    closed = reference.prefix_scores(model, each.token_ids[:9], each.response_ids, closing=CLOSING)
    assert_prefixes(captured.prefixes["closed"], closed)
    assert captured.reward == pytest.approx(reference.score(model, each.token_ids), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    "response", [[7, 8, 2], [7, 2, 201], [2, 2, 201, 7], [2], [201, 2, 9], []], ids=lambda ids: " ".join(map(str, ids))
)
@pytest.mark.parametrize("prompt", [[5, 6, 7], []], ids=["prompt", "no prompt"])
def test_a_prefix_that_ends_with_closing_tokens_only_gets_the_rest(
    engine_and_model: tuple[TorchEngine, Any], prompt: list[int], response: list[int]
) -> None:
    engine, model = engine_and_model
    each = ScoringInput(
        [*prompt, *response, 9],
        prompt_length=len(prompt),
        response_length=len(response),
        scored_position=len(prompt) + len(response),
        closing_ids=CLOSING,
        needs=ALL,
    )
    expected = reference.prefix_scores(model, prompt, response, closing=CLOSING)
    assert_prefixes(engine.forward([each])[0].prefixes["closed"], expected)


def test_closed_prefixes_without_closing_tokens_are_the_open_ones(engine_and_model: tuple[TorchEngine, Any]) -> None:
    engine, _ = engine_and_model
    captured = engine.forward([replace(sequence(12, 4), closing_ids=()), replace(sequence(5, 0), closing_ids=())])
    for each in captured:
        np.testing.assert_allclose(each.prefixes["open"].after, each.prefixes["closed"].after, atol=1e-6)
        assert each.prefixes["open"].before == pytest.approx(each.prefixes["closed"].before, abs=1e-6)


def test_closed_prefixes_at_boundaries_are_those_of_all_prefixes(engine_and_model: tuple[TorchEngine, Any]) -> None:
    engine, _ = engine_and_model
    whole = sequence(50, 12, 2, seed=4)
    boundaries = [1, 7, 8, 30, whole.response_length]
    batch = [sequence(9, 3), replace(whole, boundaries=boundaries), sequence(12, 0)]
    some, every = engine.forward(batch)[1], engine.forward([whole])[0]
    closed = some.prefixes["closed"]
    assert closed.before == pytest.approx(every.prefixes["closed"].before, abs=2e-6)
    expected = every.prefixes["closed"].after[np.array(boundaries) - 1]
    np.testing.assert_allclose(closed.after, expected, atol=2e-6 * max(1.0, float(np.abs(expected).max())), rtol=0)
    np.testing.assert_allclose(some.prefixes["open"].after, every.prefixes["open"].after, atol=1e-5, rtol=0)


def test_rows_are_shares_of_one_over_the_whole_sequence_and_its_sinks(
    engine_and_model: tuple[TorchEngine, Any],
) -> None:
    engine, model = engine_and_model
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    for captured in engine.forward([sequence(40, 0), sequence(5, 0)]):
        for row in captured.attention_rows.values():
            assert (row >= 0).all()
            assert row.sum() < 0.9 if sinks else row.sum() == pytest.approx(1, abs=1e-5)


def test_the_head_is_read_at_the_scored_position_and_not_at_the_end() -> None:
    engine = TorchEngine(prepared(tiny.make_model("llama")))
    whole = sequence(12, 4)
    cut = ScoringInput(whole.token_ids, 4, 6, scored_position=9, closing_ids=CLOSING, needs=ALL)
    short = ScoringInput(whole.token_ids[:10], 4, 6, scored_position=9, closing_ids=CLOSING, needs=ALL)
    assert_same(engine.forward([cut])[0], engine.forward([short])[0], 1e-6)


def test_a_pad_token_inside_a_sequence_changes_nothing_about_where_it_is_read() -> None:
    engine = TorchEngine(prepared(tiny.make_model("llama")))
    pad = 2
    ids = [5, 6, 7, pad, 8, pad]
    with torch.no_grad():
        hidden = _eager_llama().base_model(input_ids=torch.tensor([ids])).last_hidden_state
        expected = _eager_llama().score(hidden)[0, -1, 0]
    captured = engine.forward([ScoringInput(ids, 2, 4, 5)])[0]
    assert captured.reward == pytest.approx(float(expected), abs=1e-6)


def test_a_sequence_gets_what_it_needs_and_nothing_else() -> None:
    engine = TorchEngine(prepared(tiny.make_model("llama")))
    plain = sequence(9, 3, needs=frozenset())
    row = sequence(9, 3, needs=frozenset([AttentionRow(-1)]))
    prefixes = sequence(9, 3, needs=frozenset([PrefixScores()]))
    results = engine.forward([plain, row, prefixes])
    assert results[0] == Captured(reward=results[0].reward, length=6)
    assert list(results[1].attention_rows) == [-1]
    assert not results[1].prefixes
    assert list(results[2].prefixes) == ["open"]
    assert results[2].prefixes["open"].after.shape == (6,)
    assert not results[2].attention_rows
    assert len({captured.reward for captured in results}) == 1


def test_a_layer_counted_from_the_end_is_the_layer_itself() -> None:
    engine = TorchEngine(prepared(tiny.make_model("llama")))
    captured = engine.forward([sequence(9, 3, needs=frozenset([AttentionRow(2), AttentionRow(-1)]))])[0]
    np.testing.assert_array_equal(captured.attention_rows[2], captured.attention_rows[-1])
    assert AttentionRow(-LAYERS) in engine.provides
    assert AttentionRow(LAYERS) not in engine.provides
    assert AttentionRow(-LAYERS - 1) not in engine.provides


def test_an_empty_prompt_has_no_score_before_the_response() -> None:
    engine = TorchEngine(prepared(tiny.make_model("llama")))
    captured = engine.forward([sequence(5, 0)])[0]
    assert captured.prefixes["open"].before is None
    assert captured.prefixes["open"].after.shape == (5,)
    assert captured.prefixes["closed"].before is not None


def test_bfloat16_weights_keep_a_float32_head_and_stay_near_float32(tiny_llama: Path) -> None:
    wide = TorchEngine.load(str(tiny_llama), device="cpu")
    narrow = TorchEngine.load(str(tiny_llama), device="cpu", dtype="bfloat16")
    each = sequence(40, 10)
    captured, expected = narrow.forward([each])[0], wide.forward([each])[0]
    assert narrow.facts.dtype == "bfloat16"
    assert captured.reward == pytest.approx(expected.reward, abs=0.05)
    # A bfloat16 head would leave scores on bfloat16's grid.
    assert captured.reward != float(torch.tensor(captured.reward).bfloat16())


def _eager_llama() -> Any:
    model = tiny.make_model("llama")
    model.set_attn_implementation("eager")
    return model
