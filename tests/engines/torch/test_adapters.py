"""LoRA adapters, merged, against peft's own unmerged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import tiny
from densereward.capture import PrefixScores, ScoringInput, StepScores
from densereward.checks.examine import examine, refuse
from densereward.checks.loading import load_unchecked
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import ModelError
from densereward.settings import ModelSettings

IDS = [5 + i * 7 % 300 for i in range(40)]
KINDS = {"SEQ_CLS": (AutoModelForSequenceClassification, 1), "TOKEN_CLS": (AutoModelForTokenClassification, 2)}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, about its own code


def save(folder: Path, task: str = "SEQ_CLS", architecture: str = "llama", **changes: Any) -> Path:
    """A language model and, beside it, an adapter that makes a reward model of it."""
    base = tiny.save_language_model(folder / "base", architecture)
    kind, labels = KINDS[task]
    torch.manual_seed(3)
    model = kind.from_pretrained(base, num_labels=labels)
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    wrapped = get_peft_model(model, LoraConfig(task_type=task, r=4, target_modules=targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)  # peft begins with zeros, which change nothing
    wrapped.save_pretrained(str(folder / "adapter"))
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(written | changes))
    return folder / "adapter"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_an_adapter_scores_merged_as_it_does_beside_its_base(architecture: str, tmp_path: Path) -> None:
    adapter = save(tmp_path, architecture=architecture)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    own: Any = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        hidden = own.base_model.model.base_model(input_ids=torch.tensor([IDS])).last_hidden_state
        expected = own.base_model.model.score(hidden)[0, :, 0].numpy()
    engine, aligner = load_unchecked(ModelSettings(model=[str(adapter)], device="cpu"))
    assert {each.status for each in refuse(examine(engine, aligner))} == {"ok"}
    [captured] = engine.forward([ScoringInput(IDS, 10, 30, 39, needs=frozenset([PrefixScores()]))])
    assert captured.reward == pytest.approx(float(expected[-1]), abs=1e-5)
    assert captured.prefixes["open"].after == pytest.approx(expected[10:], abs=1e-5)


def test_an_adapter_for_tokens_judges_tokens(tmp_path: Path) -> None:
    adapter = save(tmp_path, "TOKEN_CLS")
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "base", num_labels=2)
    own: Any = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        expected = own(input_ids=torch.tensor([IDS])).logits[0, 10:].softmax(dim=-1)[:, 1].numpy()
    engine = TorchEngine.load(str(adapter), device="cpu")
    [captured] = engine.forward([ScoringInput(IDS, 10, 30, 39, needs=frozenset([StepScores()]), steps=range(10, 40))])
    assert captured.step_scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, "is an adapter for the task CAUSAL_LM"),
        ({"peft_type": "IA3"}, "is an adapter of type IA3; only LORA is merged"),
        ({"base_model_name_or_path": ""}, "does not name the base model"),
        ({"base_model_name_or_path": "/no/where"}, "cannot load"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        TorchEngine.load(str(save(tmp_path, **changes)), device="cpu")


@pytest.mark.parametrize("lost", ["score", "lora_A", "lora_B"])
def test_an_adapter_that_lacks_a_weight_is_refused(lost: str, tmp_path: Path) -> None:
    adapter = save(tmp_path)
    held = load_file(adapter / "adapter_model.safetensors")
    del held[next(name for name in held if lost in name)]
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"missing keys while loading \(score|do not fit together"):
        TorchEngine.load(str(adapter), device="cpu")
