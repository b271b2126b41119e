"""What is decided about a model before its first forward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig

from densereward.engines.torch.loading import choose_device, choose_dtype, max_length
from densereward.errors import ModelError


def test_the_cpu_runs_in_float32_and_a_gpu_in_bfloat16_unless_told_otherwise() -> None:
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("float16", torch.device("cuda")) is torch.float16
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_length_served_is_what_the_config_gives() -> None:
    assert max_length(LlamaConfig(max_position_embeddings=777)) == 777


def test_rotary_factors_that_follow_the_longest_sequence_in_a_batch_limit_the_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    assert max_length(LlamaConfig(max_position_embeddings=2048, rope_parameters=rope)) == 512
    half = Phi3Config().hidden_size // Phi3Config().num_attention_heads // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 1024, **factors}
    config = Phi3Config(max_position_embeddings=8192, original_max_position_embeddings=1024, rope_parameters=rope)
    assert max_length(config) == 1024


def test_a_config_that_names_no_length_is_refused_until_one_is_given() -> None:
    with pytest.raises(ModelError, match="set --max-length"):
        max_length(PreTrainedConfig())
    assert max_length(PreTrainedConfig(), requested=100) == 100


def test_less_than_the_config_gives_may_be_asked_for_and_no_more() -> None:
    assert max_length(LlamaConfig(max_position_embeddings=777), requested=100) == 100
    assert max_length(LlamaConfig(max_position_embeddings=777), requested=1000) == 777
