"""Fixtures for what trains or evaluates the embedded model: the base's tokenizer, and a small random classifier."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from densereward.default_model.build import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the installed base package."""
    return load_tokenizer()


@pytest.fixture
def classifier(tokenizer: PreTrainedTokenizerBase) -> LlamaForSequenceClassification:
    """A two-layer Llama classifier with random weights over the base's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.num_labels = 1
    model: LlamaForSequenceClassification = LlamaForSequenceClassification(config)
    return model
