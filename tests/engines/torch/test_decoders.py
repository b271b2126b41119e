"""Every decoder that goes through transformers' attention registry: packed against eager, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import reference
from densereward.capture import AttentionRow, Contributions, Need, PrefixScores, ScoringInput
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import ModelError
from densereward.selfcheck import self_check

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "num_labels": 1,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SERVED: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4},
    "gemma": {},
    "gemma2": {"sliding_window": 9, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 16},
    "gpt_neox": {},
    "phi": {},
    "phi3": {"sliding_window": 9},
    "smollm3": {},
    "starcoder2": {"sliding_window": 9},
    "mistral": {"sliding_window": 9},
    "exaone4": {"sliding_window": 9},
    "hunyuan_v1_dense": {},
    "glm": {},
    "persimmon": {},
    "ministral": {"sliding_window": 9},
    "gpt_oss": {"sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "did not run its attention in all the layers"),
    "stablelm": ({}, "does not hand the packed batch to its attention"),
    "nemotron": ({}, "does not hand the packed batch to its attention"),
    "jamba": ({}, "did not run its attention in all the layers"),
    "qwen3_next": ({}, "cannot be packed"),
}


def save(folder: Path, kind: str, **special: Any) -> Path:
    config = AutoConfig.for_model(kind, **SIZES | special)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            elif name.endswith("sinks"):
                parameter.normal_(mean=2.0)
    model.eval().save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_decoder_that_cannot_be_packed_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    special, message = REFUSED[kind]
    save(tmp_path, kind, **special)
    with pytest.raises(ModelError, match=message):
        TorchEngine.load(str(tmp_path), device="cpu", longest=512)
