"""Log-probabilities on CUDA against float32 on the CPU, and the checks before a model is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from densereward.capture import LogProbabilities
from densereward.checks.loading import load
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.language_model import LanguageModel
from densereward.heads.products import product
from densereward.settings import ModelSettings
from tests.gpu.test_engine_on_gpu import HEAD, batch, folder_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_products_of_half_precision_are_not_rounded() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 256), torch.randn(512, 256)
    halves = [each.to("cuda", torch.bfloat16) for each in (hidden, weight)]
    expected = halves[0].double() @ halves[1].double().T
    found = product(*halves)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.2)])
def test_log_probabilities_are_those_of_the_cpu(dtype: str, tolerance: float, tmp_path: Path) -> None:
    folder = str(tiny.save_language_model(tmp_path, "llama", **HEAD))
    asked = [replace(each, needs=frozenset([LogProbabilities()])) for each in batch()]
    expected = LanguageModel.load(folder, device="cpu").forward(asked)
    found = LanguageModel.load(folder, device="cuda", dtype=dtype).forward(asked)  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probabilities is not None
        assert other.log_probabilities is not None
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=tolerance)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_sound_model_passes_every_check(architecture: str, tmp_path: Path) -> None:
    engine, _ = load(ModelSettings(model=[folder_of(architecture, tmp_path)], device="cuda"))
    assert isinstance(engine, TorchEngine)
    assert engine.facts.dtype == "bfloat16"
