"""The mean of two adapters merges to the mean of what each merges to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from densereward.default_model.average import average_adapters
from densereward.default_model.build import merge_adapter
from densereward.default_model.data import Rated
from densereward.default_model.train import Recipe, Trainer

RATED = [Rated("movie", "a", "A calm and sunny day.", 2.0), Rated("movie", "b", "A cold and rainy day.", -2.0)]


def copy_of(model: LlamaForSequenceClassification) -> LlamaForSequenceClassification:
    other: LlamaForSequenceClassification = LlamaForSequenceClassification(model.config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture
def adapters(
    classifier: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> tuple[Path, Path]:
    """Two adapters of one base, after two and after five updates."""
    folders = []
    for steps in (2, 5):
        recipe = replace(Recipe(), steps=steps, rank=2, texts=2, learning_rate=1e-2)
        trainer = Trainer(recipe, copy_of(classifier), tokenizer, (RATED, []), tmp_path / str(steps))
        while trainer.progress() < 1:
            trainer.update()
        folders.append(trainer.export())
    return folders[0], folders[1]


def test_the_mean_adapter_merges_to_the_mean(
    adapters: tuple[Path, Path], classifier: LlamaForSequenceClassification, tmp_path: Path
) -> None:
    average_adapters(*adapters, tmp_path / "mean")
    first, second, mean = (
        merge_adapter(copy_of(classifier), folder).state_dict() for folder in (*adapters, tmp_path / "mean")
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2, atol=1e-7, rtol=1e-5)


def test_another_scale_is_refused(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    file = adapters[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 64}))
    with pytest.raises(ValueError, match="one scale"):
        average_adapters(*adapters, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
