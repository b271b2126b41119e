"""Each family of reward models in its own layout, against its own reading of a text: one eager pass, its own head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from densereward.capture import AttentionRow, Need, Objectives, PrefixScores, ScoringInput
from densereward.checks.numbers import self_check
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.unpacked import UnpackedEngine
from densereward.errors import ModelError
from densereward.heads import HEADS, head_for
from densereward.heads.base import Checkpoint
from reward_models import FAMILIES, save, selu_layers

IDS = np.random.default_rng(0).integers(3, 320, 40).tolist()


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
def test_a_score_in_the_first_row_of_the_output_embedding_is_read_where_the_head_is_named(
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


def test_a_score_that_is_no_plain_reward_has_a_notice(tmp_path: Path) -> None:
    notices = {}
    for name in ("TRL value head", "GRM, linear", "Beaver cost", "Beaver reward"):
        save(tmp_path / name, FAMILIES[name])
        notices[name] = TorchEngine.load(str(tmp_path / name), device="cpu").facts.notice
    assert notices["GRM, linear"] is notices["Beaver reward"] is None
    assert "not a reward" in str(notices["TRL value head"])
    assert "times -1" in str(notices["Beaver cost"])


def test_what_each_of_urms_attributes_adds_is_told_in_chunks_too(tmp_path: Path) -> None:
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
