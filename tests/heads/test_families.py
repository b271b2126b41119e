"""Each family of reward models in its own layout, against its own reading of a text: one eager pass, its own head."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import tiny
from densereward.capture import AttentionRow, Need, Objectives, PrefixScores, ScoringInput
from densereward.checks.numbers import self_check
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.unpacked import UnpackedEngine
from densereward.errors import ModelError
from densereward.heads import HEADS, head_for
from densereward.heads.base import Checkpoint

HIDDEN = 64
IDS = np.random.default_rng(0).integers(3, 320, 40).tolist()
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


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_is_read_as_it_reads_itself(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    decoder = save(tmp_path, family)
    with torch.no_grad():
        output = decoder(input_ids=torch.tensor([IDS]), output_attentions=True)
        expected = family.reads(family.layers, output.last_hidden_state[0]).numpy()
        row = output.attentions[-1][0, :, -1].mean(dim=0).numpy()
    engine = TorchEngine.load(str(tmp_path), device="cpu")
    self_check(engine)
    assert (engine.facts.head, engine.facts.unit) == (family.head, "sequence")
    needs: frozenset[Need] = frozenset([PrefixScores("open"), AttentionRow(-1)])
    [captured] = engine.forward([ScoringInput(IDS, 10, 30, 39, needs=needs)])
    assert captured.reward == pytest.approx(float(expected[-1]), abs=1e-5)
    np.testing.assert_allclose(captured.prefixes["open"].after, expected[10:], atol=1e-5)
    np.testing.assert_allclose(captured.attention_rows[-1], row[10:], atol=1e-6)


def test_a_mean_over_all_positions_is_read_unpacked_and_a_prefixs_is_the_mean_over_the_prefix(tmp_path: Path) -> None:
    family = FAMILIES["OpenAssistant Pythia"]
    decoder = save(tmp_path, family, pooling="mean")
    engine = UnpackedEngine.load(str(tmp_path), "its score is a mean", device="cpu")
    self_check(engine)
    with torch.no_grad():
        hidden = decoder(input_ids=torch.tensor([IDS])).last_hidden_state[0]
        means = [float(family.layers["out_proj"](hidden[:t].mean(dim=0))) for t in range(1, len(IDS) + 1)]
    [captured] = engine.forward([ScoringInput(IDS, 10, 30, 39, needs=frozenset([PrefixScores("open")]))])
    assert captured.reward == pytest.approx(means[-1], abs=1e-5)
    assert captured.prefixes["open"].before == pytest.approx(means[9], abs=1e-5)
    assert captured.prefixes["open"].after == pytest.approx(np.array(means[10:]), abs=1e-5)
    assert AttentionRow(-1) not in engine.provides


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("OpenRLHF", {"mean": None}, "normalize_reward is set, and the config has no `mean` and `std`"),
        ("OpenRLHF", {"std": 0.0}, "normalize_reward is set, and the config has no `mean` and `std`"),
        ("Beaver reward", {"var": None}, "do_normalize is set, and the config has no `mean` and `var`"),
        ("Beaver reward", {"score_type": "critic"}, "score_type = 'critic'; a reward model is of type"),
        ("OpenAssistant Pythia", {"pooling": "max"}, "pooling = 'max'; this family has `last` and `mean`"),
        ("OpenAssistant Pythia", {"pooling": "mean"}, "cannot be packed: its score is a mean over all positions"),
        ("UltraRM", {"num_hidden_layers": 2}, "9 unexpected keys while loading"),
        ("UltraRM", {"num_hidden_layers": 4}, "9 missing keys while loading"),
        ("UltraRM", {"model_type": "unheard_of"}, "cannot load"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path, FAMILIES[name], **changes)
    with pytest.raises(ModelError, match=message):
        TorchEngine.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
def test_a_score_in_the_first_row_of_a_language_models_head_is_read_where_it_is_named(
    architecture: str, tmp_path: Path
) -> None:
    folder = tiny.save_language_model(tmp_path, architecture)
    with pytest.raises(ModelError, match="is a language model without a score head"):
        TorchEngine.load(str(folder), device="cpu")
    engine = TorchEngine.load(str(folder), device="cpu", head="nemotron")
    self_check(engine)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS])).logits[0, :, 0].numpy()
    [captured] = engine.forward([ScoringInput(IDS, 10, 30, 39, needs=frozenset([PrefixScores("open")]))])
    assert captured.reward == pytest.approx(float(expected[-1]), abs=1e-5)
    np.testing.assert_allclose(captured.prefixes["open"].after, expected[10:], atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("LlamaForCausalLM", "is a language model without a score head; two of them are a reward model as --pair"),
        ("GPT2LMHeadModel", "is a language model without a score head"),
        ("DebertaV2PairRM", "DebertaV2PairRM compares two responses and has no score for one"),
        ("DebertaForRanking", "DebertaForRanking is of no family that is known here"),
        ("", "a config without architectures is of no family that is known here"),
    ],
)
def test_what_is_of_no_family_is_refused_by_name(architecture: str, message: str) -> None:
    config = tiny.make_config("llama", architectures=[architecture] if architecture else None)
    with pytest.raises(ModelError, match=message):
        head_for(Checkpoint(config, {}))


def test_every_head_says_which_families_have_it_and_is_tried_here() -> None:
    assert all(HEADS[name].families for name in HEADS)
    elsewhere = {"bradley_terry", "gated", "nemotron", "token_classifier", "process", "internlm2"}
    elsewhere |= {"step_value", "math_shepherd", "encoder"}  # these have tests of their own
    assert {family.head for family in FAMILIES.values()} | elsewhere == set(HEADS)


def test_what_an_operator_must_know_of_a_score_is_said(tmp_path: Path) -> None:
    notices = {}
    for name in ("TRL value head", "GRM, linear", "Beaver cost", "Beaver reward"):
        save(tmp_path / name, FAMILIES[name])
        notices[name] = TorchEngine.load(str(tmp_path / name), device="cpu").facts.notice
    assert notices["GRM, linear"] is notices["Beaver reward"] is None
    assert "not a reward" in str(notices["TRL value head"])
    assert "times -1" in str(notices["Beaver cost"])


def test_what_each_of_urms_attributes_adds_is_told_in_pieces_too(tmp_path: Path) -> None:
    family = FAMILIES["URM"]
    decoder = save(tmp_path, family)
    with torch.no_grad():
        hidden = decoder(input_ids=torch.tensor([IDS])).last_hidden_state[0]
        means = family.layers["score"](hidden).view(-1, 5, 2)[:, :, 0]
        expected = (means * selu_layers("weights.fc", family.layers, hidden)).T.numpy()
    needs: frozenset[Need] = frozenset([PrefixScores("open"), Objectives()])
    for tokens in (4096, 16):
        engine = TorchEngine.load(str(tmp_path), device="cpu", batch_tokens=tokens)
        [captured] = engine.forward([ScoringInput(IDS, 10, 30, 39, needs=needs)])
        assert captured.objectives == pytest.approx(expected[:, [39, *range(10, 40)]], abs=1e-5)
