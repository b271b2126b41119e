"""The CUDA path against float32 on the CPU: variable-length attention, bfloat16 weights, a float32 head."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from densereward.capture import AttentionRow, Captured, Need, PrefixScores, ScoringInput
from densereward.engines.torch.engine import TorchEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NEEDS: frozenset[Need] = frozenset([PrefixScores("open"), PrefixScores("closed"), AttentionRow(0), AttentionRow(-1)])
# Head sizes that flash attention takes; windows and caps short enough to matter.
HEAD = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def sequence(generator: random.Random, length: int) -> ScoringInput:
    """Prompts of one length are the same, so that some are shared."""
    prompt = random.Random(length // 3).choices(range(3, 320), k=length // 3)
    response = generator.choices(range(3, 320), k=length - len(prompt))
    closing = (2, 201)
    return ScoringInput([*prompt, *response, *closing], len(prompt), len(response), length + 1, closing, NEEDS)


def batch() -> list[ScoringInput]:
    generator = random.Random(0)
    lengths = [1, 2, 7, 33, 33, 64, 150, 300, 300, 300, 700]
    return [sequence(generator, n) for n in lengths]


def folder_of(architecture: str, tmp_path: Path) -> str:
    sizes: dict[str, Any] = {"n_embd": 256} if architecture == "gpt2" else HEAD
    if architecture in ("qwen3", "gemma2", "gpt_oss"):
        sizes = sizes | {"head_dim": 64}
    if architecture == "gpt_oss":  # rounding may choose other experts, so all of them are used
        sizes = sizes | {"num_experts_per_tok": 4}
    return str(tiny.save(tmp_path, architecture, **sizes))


def assert_near(first: list[Captured], second: list[Captured], score: float, row: float) -> None:
    scale = max(1.0, *(abs(each.reward) for each in second))
    for one, other in zip(first, second, strict=True):
        assert abs(one.reward - other.reward) <= score * scale
        for mode, prefixes in other.prefixes.items():
            np.testing.assert_allclose(one.prefixes[mode].after, prefixes.after, atol=score * scale, rtol=0)
        for layer in one.attention_rows:
            np.testing.assert_allclose(one.attention_rows[layer], other.attention_rows[layer], atol=row, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_float32_on_the_gpu_equals_float32_on_the_cpu(architecture: str, tmp_path: Path) -> None:
    folder = folder_of(architecture, tmp_path)
    expected = TorchEngine.load(folder, device="cpu").forward(batch())
    assert_near(TorchEngine.load(folder, device="cuda", dtype="float32").forward(batch()), expected, 1e-3, 1e-3)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_bfloat16_on_the_gpu_is_near_float32_and_does_not_depend_on_the_batch(
    architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture, tmp_path)
    expected = TorchEngine.load(folder, device="cpu").forward(batch())
    engine = TorchEngine.load(folder, device="cuda")
    together = engine.forward(batch())
    assert engine.facts.dtype == "bfloat16"
    assert_near(together, expected, 0.1, 0.05)
    alone = [engine.forward([each])[0] for each in batch()]
    assert_near(together, alone, 0.05, 0.02)
