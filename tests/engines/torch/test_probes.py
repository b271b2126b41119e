"""What a model gives, found by trying it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tiny
from densereward.capture import ScoringInput
from densereward.engines.torch.probes import gives_rows, has_fused, is_causal
from densereward.engines.torch.transformers_pass import TransformersPass


def tried(folder: Path, **config: Any) -> TransformersPass:
    model = AutoModelForSequenceClassification.from_pretrained(folder, **config)
    model.requires_grad_(False)
    return TransformersPass(model, reads_texts=True, fused=has_fused(model))


def test_scores_that_change_with_the_tokens_behind_them_look_ahead() -> None:
    def so_far(sequence: ScoringInput) -> Any:
        return np.cumsum(sequence.token_ids).astype(np.float32)

    def ahead(sequence: ScoringInput) -> Any:
        return so_far(sequence)[::-1].copy()

    assert is_causal(so_far, 1e-4)
    assert not is_causal(ahead, 1e-4)


def test_a_model_is_left_in_eager_attention_that_can_run_in_the_fused_one(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny.save_encoder(tmp_path, "bert"))
    assert has_fused(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "config", "found"),
    [
        ("bert", {}, True),
        ("modernbert", {"classifier_pooling": "cls"}, True),
        ("modernbert", {"classifier_pooling": "mean"}, False),
    ],
)
def test_rows_are_given_where_the_score_is_read_at_the_first_position(
    kind: str, config: dict[str, Any], found: bool, tmp_path: Path
) -> None:
    attention = tried(tiny.save_encoder(tmp_path, kind, **config))
    layers = attention.model.config.num_hidden_layers
    assert gives_rows(attention, layers) is found
    assert not gives_rows(attention, layers + 1)
    assert not any(parameter.grad is not None for parameter in attention.model.parameters())
    assert not torch.is_inference_mode_enabled()
