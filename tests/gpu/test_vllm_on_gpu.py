"""The vLLM engine on a GPU against the torch engine in float32 on the CPU: CUDA graphs between attentions, bfloat16."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from densereward.capture import AttentionRow, Need, PrefixScores, ScoringInput
from densereward.engines import ENGINES
from densereward.engines.torch.engine import TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NEEDS: frozenset[Need] = frozenset([PrefixScores(), *(AttentionRow(layer) for layer in range(3))])
HEAD: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def batch() -> list[ScoringInput]:
    generator = random.Random(0)
    lengths = [1, 2, 33, 150, 300, 300, 900]
    return [
        ScoringInput(generator.choices(range(3, 320), k=n), n // 3, n - n // 3, n - 1, needs=NEEDS) for n in lengths
    ]


@pytest.mark.parametrize("eagerly", [False, True], ids=["pieces of graphs", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma2"])
def test_bfloat16_on_vllm_stays_near_float32_on_the_cpu(architecture: str, eagerly: bool, tmp_path: Path) -> None:
    folder = str(tiny.save(tmp_path, architecture, **HEAD))
    arguments: dict[str, Any] = {"enforce_eager": True} if eagerly else {}
    arguments |= {"gpu_memory_utilization": 0.2, "max_num_seqs": 8}
    engine = ENGINES["vllm"].load(folder, arguments=arguments, longest=1024, batch_tokens=256)
    expected = TorchEngine.load(folder, device="cpu").forward(batch())
    try:
        found = engine.forward(batch())
    finally:
        engine.close()
    scale = max(1.0, *(abs(each.reward) for each in expected))
    for one, other in zip(found, expected, strict=True):
        assert abs(one.reward - other.reward) <= 5e-2 * scale
        np.testing.assert_allclose(one.prefixes["open"].after, other.prefixes["open"].after, atol=5e-2 * scale)
        for layer, row in one.attention_rows.items():
            np.testing.assert_allclose(row, other.attention_rows[layer], atol=2e-2)
