"""Random sequences for the packed engine, the batches that they make, and comparisons of what is captured of them."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from densereward.capture import (
    AttentionRow,
    Captured,
    Contributions,
    Gradients,
    Need,
    Prefixes,
    PrefixScores,
    ReceivedAttention,
    ScoringInput,
)
from densereward.engines.torch.chunks import Chunk, expand
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.packed_batch import PackedBatch
from densereward.engines.torch.packing import pack

LAYERS = 3
CLOSING = (2, 201)
ROWS = [AttentionRow(layer) for layer in range(LAYERS)]
OPEN: frozenset[Need] = frozenset([PrefixScores(), *ROWS])
SIGNED = [kind(layer) for kind in (Contributions, ReceivedAttention) for layer in range(LAYERS)]
ALL: frozenset[Need] = frozenset([PrefixScores(), PrefixScores("closed"), *ROWS, *SIGNED, Gradients()])


def sequence(
    length: int, prompt: int, closing: int = 0, *, seed: int = 0, needs: Any = ALL, prompt_seed: int | None = None
) -> ScoringInput:
    """`length` random ids, the last of them closing tokens; prompts of one `prompt_seed` begin alike."""
    before = random.Random(seed if prompt_seed is None else prompt_seed).choices(range(3, 320), k=prompt)
    after = random.Random(seed * 1000 + length).choices(range(3, 320), k=length - prompt - closing)
    return ScoringInput([*before, *after, *CLOSING[:closing]], prompt, len(after), length - 1, CLOSING, needs)


def mixed_batch(size: int) -> list[ScoringInput]:
    generator = random.Random(size)
    batch = []
    for seed in range(size):
        length = generator.choice([1, 2, 5, 9, 10, 17, 40, 90])
        closing = int(length > 3 and seed % 2)
        prompt = generator.randrange(length - closing)
        batch.append(sequence(length, prompt, closing, seed=seed, prompt_seed=generator.choice([0, 1, seed])))
    return batch


def packed_row(batch: list[ScoringInput]) -> PackedBatch:
    return pack([Chunk.after(expand(each), None) for each in batch], torch.device("cpu"), LAYERS)


def assert_prefixes(prefixes: Prefixes, expected: list[float]) -> None:
    """`expected` begins with s_0 wherever there is one."""
    scores = [*([] if prefixes.before is None else [prefixes.before]), *prefixes.after]
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)


def assert_same(first: Captured, second: Captured, tolerance: float) -> None:
    assert first.prefixes.keys() == second.prefixes.keys()
    largest = [float(np.abs(prefixes.after).max(initial=0)) for prefixes in second.prefixes.values()]
    scale = max(1.0, abs(second.reward), *largest)
    assert abs(first.reward - second.reward) <= tolerance * scale
    for mode, prefixes in second.prefixes.items():
        np.testing.assert_allclose(first.prefixes[mode].after, prefixes.after, atol=tolerance * scale, rtol=0)
        assert first.prefixes[mode].before == pytest.approx(prefixes.before, abs=tolerance * scale)
    if second.gradients is not None:
        assert first.gradients is not None
        size = max(1.0, float(np.abs(second.gradients).max(initial=0)))
        np.testing.assert_allclose(first.gradients, second.gradients, atol=tolerance * size, rtol=0)
    for kind in ("attention_rows", "contributions", "received_attention"):
        mine, others = getattr(first, kind), getattr(second, kind)
        assert mine.keys() == others.keys()
        for layer, row in mine.items():
            size = max(1.0, float(np.abs(others[layer]).max(initial=0)))
            np.testing.assert_allclose(row, others[layer], atol=tolerance * size, rtol=0)


def prepared(model: Any) -> Any:
    """A model in memory, switched to packed attention."""
    from densereward.engines.torch import attention

    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return model


@cache
def shared_engine() -> TorchEngine:
    """One engine on a random Llama."""
    return TorchEngine(prepared(tiny.make_model("llama")))
