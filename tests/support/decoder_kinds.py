"""Random classifiers of the transformers decoders that are tested here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

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
UNPACKED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "did not run its attention in all the layers"),
    "stablelm": ({}, "does not pass the packed batch to its attention"),
    "nemotron": ({}, "does not pass the packed batch to its attention"),
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
