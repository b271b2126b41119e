"""Process reward models in the form of Qwen2.5-Math-PRM: loading by their own names, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny
from densereward.capture import Steps
from densereward.checks.numbers import self_check
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_process_model(tmp_path)


def test_it_is_loaded_without_its_code_and_steps_are_written_as_the_family_does(folder: Path) -> None:
    engine = TorchEngine.load(str(folder), device="cpu")
    self_check(engine)
    facts = engine.facts
    assert (facts.family, facts.head, facts.unit) == ("Qwen2ForProcessRewardModel", "process", "step")
    assert facts.steps == Steps("\n\n", "<extra_0>")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("score.0.weight", r"score has weights for layers \[2\], not \[0, 2\]"),
        ("score.2.bias", "score: a bias is missing in layer 2"),
        ("model.layers.1.mlp.up_proj.weight", "1 missing keys while loading"),
    ],
)
def test_a_missing_weight_is_not_made_up(folder: Path, name: str, message: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        TorchEngine.load(str(folder), device="cpu")
