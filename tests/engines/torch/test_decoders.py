"""Every decoder that goes through transformers' attention registry: packed against eager."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reference
from decoder_kinds import SERVED, save
from densereward.capture import AttentionRow, Contributions, Need, PrefixScores, ScoringInput
from densereward.checks.numbers import self_check
from densereward.engines.torch.engine import TorchEngine


@pytest.mark.parametrize("kind", list(SERVED))
def test_a_decoder_gives_packed_what_it_gives_padded_and_eager(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind, **SERVED[kind])
    engine = TorchEngine.load(str(tmp_path), device="cpu")
    self_check(engine)
    random = np.random.default_rng(0)
    layers = range(engine.facts.layers)
    needs: frozenset[Need] = frozenset([PrefixScores(), *(AttentionRow(layer) for layer in layers), Contributions()])
    prompt = random.integers(3, 320, 20).tolist()
    batch = [
        ScoringInput([*prompt, *random.integers(3, 320, length).tolist()], 20, length, 19 + length, needs=needs)
        for length in (30, 5, 60)
    ]
    reads = reference.padded(reference.eager(tmp_path), [each.token_ids for each in batch])
    for each, captured, read in zip(batch, engine.forward(batch), reads, strict=True):
        response = slice(each.prompt_length, each.response_stop)
        largest = max(1.0, float(read.scores.abs().max()))
        assert captured.reward == pytest.approx(float(read.scores[-1]), abs=1e-5 * largest)
        np.testing.assert_allclose(captured.prefixes["open"].after, read.scores[response], atol=1e-5 * largest)
        for layer in layers:
            np.testing.assert_allclose(captured.attention_rows[layer], read.rows[layer, response], atol=1e-5)
