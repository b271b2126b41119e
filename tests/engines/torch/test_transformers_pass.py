"""A pass in transformers' own attention, and what is kept of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tiny
from densereward.capture import ScoringInput
from densereward.engines.torch.transformers_pass import TransformersPass, failures
from densereward.errors import EngineFailure


def test_of_each_layers_weights_one_query_is_kept(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny.save_encoder(tmp_path, "bert"))
    attention = TransformersPass(model, reads_texts=True, fused=False)
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        weights = attention.run([ScoringInput([3] * 100, 5, 94, 99)], rows=True).attentions
    assert {tuple(each.shape) for each in weights} == {(1, 4, 1, 100)}


def test_what_torch_raises_is_an_engines_failure_with_a_code() -> None:
    with pytest.raises(EngineFailure, match="set --max-length lower") as small, failures():
        raise torch.OutOfMemoryError("no more")
    assert small.value.error_code == "out_of_memory"
    with pytest.raises(EngineFailure, match="the forward pass failed: shapes"), failures():
        raise RuntimeError("shapes")
