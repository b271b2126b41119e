"""Token classifiers in packed passes against transformers' eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

import tiny
from densereward.capture import ScoringInput, StepScores
from densereward.checks.numbers import self_check
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import ModelError
from densereward.heads.base import good_label

STEPS = [20, 33, 47, 89]


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_judge(tmp_path_factory.mktemp(request.param), request.param)


def sequence(seed: int = 0, steps: Any = STEPS) -> ScoringInput:
    ids = np.random.default_rng(seed).integers(3, 320, 90).tolist()
    return ScoringInput(ids, 20, 70, 89, needs=frozenset([StepScores()]), steps=steps)


def own_scores(folder: Path, each: ScoringInput) -> Any:
    model = AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(each.token_ids)])).logits[0]
    return logits.softmax(dim=-1)[list(each.steps), 1].numpy()


@pytest.mark.parametrize("batch_tokens", [None, 25])
def test_steps_are_scored_as_the_model_itself_scores_them(folder: Path, batch_tokens: int | None) -> None:
    engine = TorchEngine.load(str(folder), device="cpu", separator="\n", batch_tokens=batch_tokens)
    self_check(engine)
    batch = [sequence(0), sequence(1), sequence(0, [89])]
    found = engine.forward(batch) if batch_tokens is None else [engine.forward([each])[0] for each in batch]
    for each, captured in zip(batch, found, strict=True):
        expected = own_scores(folder, each)
        assert captured.step_scores is not None
        np.testing.assert_allclose(captured.step_scores, expected, atol=1e-5)
        assert captured.reward == pytest.approx(float(expected[-1]), abs=1e-5)


def test_without_steps_the_reward_is_the_mean_over_the_tokens(folder: Path) -> None:
    engine = TorchEngine.load(str(folder), device="cpu")
    assert engine.facts.unit == "token"
    each = sequence(0, range(20, 90))
    [captured] = engine.forward([each])
    assert captured.reward == pytest.approx(float(own_scores(folder, each).mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "good"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, 1),
        ({0: "False", 1: "True"}, 1),
        ({0: "correct", 1: "incorrect"}, 0),
        ({0: "+", 1: "-"}, 0),
    ],
)
def test_the_good_label_is_found_by_its_name(labels: dict[int, str], good: int) -> None:
    assert good_label(tiny.make_config("llama", num_labels=2, id2label=labels)) == good


@pytest.mark.parametrize("labels", [{0: "a", 1: "b"}, {0: "good", 1: "true"}])
def test_names_that_say_nothing_are_refused(labels: dict[int, str]) -> None:
    with pytest.raises(ModelError, match="which of these is the good one cannot be told"):
        good_label(tiny.make_config("llama", num_labels=2, id2label=labels))
