"""Float32 arithmetic on half-precision weights, against a copy of the model that is widened as a whole."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from densereward.capture import ScoringInput
from densereward.engines.torch import attention
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.float32 import in_float32_arithmetic
from densereward.engines.torch.language_model import LanguageModel

IDS = np.random.default_rng(0).integers(3, 320, 40).tolist()
SEQUENCE = ScoringInput(IDS, 10, 30, 39)


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "mixtral", "phi", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_arithmetic_is_what_a_widened_copy_computes(architecture: str, dtype: torch.dtype) -> None:
    attention.register()
    narrow: Any = tiny.make_model(architecture, kind=AutoModelForSequenceClassification)
    narrow.to(dtype)
    narrow.set_attn_implementation(attention.IMPLEMENTATION)
    wide = copy.deepcopy(narrow).float()
    engine, exact = TorchEngine(narrow), TorchEngine(wide)
    [expected] = exact.forward([SEQUENCE])
    [computed] = engine.exactly([SEQUENCE])
    [rounded] = engine.forward([SEQUENCE])
    assert computed.reward == pytest.approx(expected.reward, rel=1e-4, abs=1e-5)
    assert rounded.reward != pytest.approx(expected.reward, rel=1e-6)
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}


def test_the_same_for_a_language_model() -> None:
    attention.register()
    narrow: Any = tiny.make_model("llama", kind=AutoModelForCausalLM)
    narrow.to(torch.bfloat16)
    narrow.set_attn_implementation(attention.IMPLEMENTATION)
    wide = copy.deepcopy(narrow).float()
    engine, exact = LanguageModel(narrow), LanguageModel(wide)
    [expected], [computed] = exact.forward([SEQUENCE]), engine.exactly([SEQUENCE])
    assert computed.reward == pytest.approx(expected.reward, rel=1e-4)


def test_weights_are_as_they_were_after_a_failure_too() -> None:
    model: Any = tiny.make_model("llama")
    model.to(torch.bfloat16)
    with pytest.raises(IndexError), in_float32_arithmetic(model):
        model(input_ids=torch.tensor([[400]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
