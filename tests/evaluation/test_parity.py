"""The embedded model as it ships: the packed engine against transformers, and what it says of plain sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
from densereward.capture import AttentionRow, Need, PrefixScores
from densereward.checks.loading import load
from densereward.evaluation.scoring import Scorer
from densereward.settings import ModelSettings
from densereward_client.wire import Sample

TEXTS = ["The food was great, but the music was awful.", "Ok", "Rain again: 東京 😀", " ".join(["a long day"] * 40)]
NEEDS: frozenset[Need] = frozenset([PrefixScores("open"), PrefixScores("closed"), AttentionRow(-1), AttentionRow(0)])


def test_scores_prefixes_and_rows_equal_eager_attention(embedded_model: Path) -> None:
    engine, aligner = load(ModelSettings(model=str(embedded_model), device="cpu"))
    model: Any = reference.eager(embedded_model)
    turn = [{"role": "user", "content": ""}]
    batch = [
        aligner.align(Sample.model_validate({"messages": turn, "response": text}), NEEDS).sequence for text in TEXTS
    ]
    for sequence, captured in zip(batch, engine.forward(batch), strict=True):
        (read,) = reference.padded(model, [sequence.token_ids])
        largest = float(read.scores.abs().max())
        response = slice(sequence.prompt_length, sequence.response_stop)
        assert captured.reward == pytest.approx(float(read.scores[-1]), abs=1e-5 * largest)
        np.testing.assert_allclose(captured.prefixes["open"].after, read.scores[response], atol=1e-5 * largest)
        for layer in (0, -1):
            np.testing.assert_allclose(captured.attention_rows[layer], read.rows[layer, response], atol=1e-5)
        sample = slice(None, None, 9)
        prompt = sequence.token_ids[: sequence.prompt_length]
        for t in range(1, sequence.response_length + 1)[sample]:
            prefix = [*prompt, *sequence.response_ids[:t], *sequence.closing_ids]
            assert captured.prefixes["closed"].after[t - 1] == pytest.approx(
                reference.score(model, prefix), abs=1e-5 * largest
            )


def test_it_likes_kindness_and_finds_the_word_that_is_not(embedded_model: Path) -> None:
    with Scorer(embedded_model) as scorer:
        kind, unkind = scorer.answers(["I would be glad to help you.", "I hate this awful, stupid idea."])
        (mixed,) = scorer.texts([TEXTS[0]])
    assert kind > unkind
    start, stop = mixed.spans[int(np.argmin(mixed.rewards["red closed"]))]
    assert TEXTS[0][start:stop].strip() in ("awful", "but")
