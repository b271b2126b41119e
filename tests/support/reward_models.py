"""Families of reward models in the layouts in which they are published, each with its own reading of hidden states."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel

import tiny

HIDDEN = 64
Layers = dict[str, nn.Linear]


def linear(outputs: int, inputs: int = HIDDEN, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def mlp(first: nn.Linear, last: nn.Linear, hidden: Tensor) -> Tensor:
    result: Tensor = last(torch.relu(first(hidden)))
    return result


@dataclass(frozen=True)
class Family:
    """One family as it is published.

    Attributes:
        head: the row of the table that must read it.
        architecture: what its config names.
        decoder: of transformers.
        layers: its own weights.
        reads: its own reading of the hidden states at some positions, one number each.
        prefix: of the decoder's weights.
        written: what else its config holds.
        language_model: whether its files carry a language model's head, which nothing reads.
    """

    head: str
    architecture: str
    decoder: str
    layers: Layers
    reads: Callable[[Layers, Tensor], Tensor]
    prefix: str = "model."
    written: dict[str, Any] = field(default_factory=dict)
    language_model: bool = False


def first(name: str) -> Callable[[Layers, Tensor], Tensor]:
    return lambda layers, hidden: layers[name](hidden)[:, 0]


def two(name: str) -> Callable[[Layers, Tensor], Tensor]:
    return lambda layers, hidden: mlp(layers[f"{name}.0"], layers[f"{name}.2"], hidden)[:, 0]


def selu_layers(name: str, layers: Layers, hidden: Tensor) -> Tensor:
    result: Tensor = layers[f"{name}.4"](torch.selu(layers[f"{name}.2"](torch.selu(layers[f"{name}.0"](hidden)))))
    return result


torch.manual_seed(0)
TWO = {"0": linear(HIDDEN), "2": linear(1)}
FAMILIES = {
    "UltraRM": Family(
        "regression",
        "LlamaRewardModel",
        "llama",
        {"regression_head": linear(1, bias=False)},
        first("regression_head"),
    ),
    "Eurus-RM": Family(
        "regression",
        "EurusRewardModel",
        "mistral",
        {"regression_head": linear(1, bias=False)},
        first("regression_head"),
    ),
    "Starling-RM": Family(
        "v_head",
        "LlamaForCausalLM",
        "llama",
        {"v_head": linear(1, bias=False)},
        first("v_head"),
        prefix="transformer.",
        language_model=True,
    ),
    "OpenRLHF": Family(
        "openrlhf",
        "LlamaForSequenceClassification",
        "llama",
        {"score": linear(1, bias=False)},
        lambda layers, hidden: (layers["score"](hidden)[:, 0] - 0.5) / 2.0,
        written={"normalize_reward": True, "mean": 0.5, "std": 2.0},
    ),
    "OpenRLHF, head of another name": Family(
        "openrlhf",
        "RewardModel",
        "qwen3",
        {"value_head": linear(1, bias=False)},
        first("value_head"),
        written={"value_head_prefix": "value_head", "normalize_reward": False, "mean": 0.5, "std": 2.0},
    ),
    "GRM": Family(
        "value_head",
        "LlamaForCausalLM",
        "llama",
        {"v_head.summary.0": linear(1024), "v_head.summary.2": linear(1, 1024)},
        two("v_head.summary"),
        written={"vhead_layer_type": "mlp", "vhead_num_neurons": 1024, "vhead_num_layers": 1},
        language_model=True,
    ),
    "GRM, linear": Family(
        "value_head",
        "Gemma2ForCausalLM",
        "gemma2",
        {"v_head.summary": linear(1)},
        first("v_head.summary"),
        written={"vhead_layer_type": "linear"},
        language_model=True,
    ),
    "TRL value head": Family(
        "value_head",
        "GPT2LMHeadModel",
        "gpt2",
        {"v_head.summary": linear(1)},
        first("v_head.summary"),
        prefix="transformer.",
        language_model=True,
    ),
    "INF-ORM": Family(
        "mlp",
        "INFORMForSequenceClassification",
        "llama",
        {f"score.{name}": layer for name, layer in TWO.items()},
        two("score"),
    ),
    "Qwen2.5-Math-RM": Family(
        "mlp",
        "Qwen2ForRewardModel",
        "qwen2",
        {f"score.{name}": layer for name, layer in TWO.items()},
        two("score"),
    ),
    "URM": Family(
        "urm",
        "LlamaForSequenceClassificationWithNormal_Weights",
        "llama",
        {"score": linear(10, bias=False)} | {f"weights.fc.{i}": linear(out) for i, out in ((0, 64), (2, 64), (4, 5))},
        lambda layers, hidden: (
            layers["score"](hidden).view(-1, 5, 2)[:, :, 0] * selu_layers("weights.fc", layers, hidden)
        ).sum(dim=-1),
    ),
    "Beaver reward": Family(
        "beaver",
        "LlamaForScore",
        "llama",
        {"score_head": linear(1, bias=False)},
        lambda layers, hidden: (layers["score_head"](hidden)[:, 0] - 1.5) / 2.0,
        written={"score_type": "reward", "do_normalize": True, "mean": [1.5], "var": [4.0]},
    ),
    "Beaver cost": Family(
        "beaver",
        "LlamaModelForScore",
        "llama",
        {"score_head": linear(1)},
        lambda layers, hidden: -layers["score_head"](hidden)[:, 0],
        written={"score_type": "cost", "do_normalize": False, "mean": [1.5], "var": [4.0]},
    ),
    "OpenAssistant Pythia": Family(
        "pythia",
        "GPTNeoXRewardModel",
        "gpt_neox",
        {"out_proj": linear(1)},
        first("out_proj"),
        prefix="gpt_neox.",
        written={"model_type": "gpt_neox_reward_model", "pooling": "last"},
    ),
}


def save(folder: Path, family: Family, **changes: Any) -> Any:
    """A folder as the family publishes it; the decoder, eager, to read it by."""
    config = tiny.make_config(family.decoder)
    torch.manual_seed(1)
    decoder = AutoModel.from_config(config, attn_implementation="eager").eval()
    weights = {family.prefix + name: tensor for name, tensor in decoder.state_dict().items()}
    for name, layer in family.layers.items():
        weights |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    if family.language_model:
        weights["lm_head.weight"] = torch.zeros(320, HIDDEN)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    written = config.to_dict() | {"architectures": [family.architecture]} | family.written | changes
    (folder / "config.json").write_text(json.dumps(written))
    return decoder
