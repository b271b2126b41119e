"""Models that the packed engine refuses, and how weights are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen2MoeConfig

import tiny
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import EngineFailure, ModelError
from sequences import (
    packed_row,
    prepared,
    sequence,
)


def test_an_attention_variant_that_is_not_computed_is_refused() -> None:
    from densereward.engines.torch.attention import packed_attention

    packed = packed_row([sequence(4, 1)])
    heads = torch.zeros(1, 2, packed.token_ids.shape[1], 8)
    module = torch.nn.Module()
    with pytest.raises(EngineFailure, match="position_bias"):
        packed_attention(module, heads, heads, heads, None, scaling=1.0, packed=packed, position_bias=torch.zeros(2))
    with pytest.raises(EngineFailure, match="does not pass the packed batch"):
        packed_attention(module, heads, heads, heads, None, scaling=1.0)
    module.is_causal = False  # type: ignore[assignment]
    with pytest.raises(EngineFailure, match="not plainly causal"):
        packed_attention(module, heads, heads, heads, None, scaling=1.0, packed=packed)


def test_a_window_that_is_only_in_the_mask_is_refused() -> None:
    config: Any = Qwen2MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        pad_token_id=2,
    )
    config.num_labels = 1
    assert "sliding_attention" in config.layer_types
    with pytest.raises(ModelError, match="hides its sliding_attention"):
        TorchEngine(prepared(AutoModelForSequenceClassification.from_config(config)))


def test_a_model_with_several_labels_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, num_labels=2)
    with pytest.raises(ModelError, match="num_labels = 2"):
        TorchEngine.load(str(folder), device="cpu")


def test_files_that_cannot_be_read_are_a_model_error(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="cannot load"):
        TorchEngine.load(str(folder), device="cpu")
    with pytest.raises(ModelError, match="cannot load"):
        TorchEngine.load(str(tmp_path / "nowhere"), device="cpu")


def test_a_model_whose_head_is_not_in_its_files_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.save(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["scores.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys .*score\.weight"):
        TorchEngine.load(str(folder), device="cpu")


def test_the_weights_fingerprint_changes_with_one_weight(tiny_llama: Path) -> None:
    model: Any = tiny.make_model("llama")
    first = TorchEngine(prepared(model)).facts.weights_fingerprint
    assert TorchEngine(prepared(model)).facts.weights_fingerprint == first
    with torch.no_grad():
        model.score.weight[0, 0] += 1e-3
    assert TorchEngine(prepared(model)).facts.weights_fingerprint != first
