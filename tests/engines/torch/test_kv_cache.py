"""Prompts that come again: what is cached of them, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tiny
from densereward.engines.torch.chunks import expand
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.kv_cache import KVCache, PromptCache
from densereward.engines.torch.packed_batch import PackedBatch
from sequences import (
    assert_same,
    sequence,
)


def test_a_prompt_that_comes_again_is_cached_and_gives_the_same_numbers(tmp_path: Path) -> None:
    for architecture in tiny.ARCHITECTURES:
        folder = str(tiny.save(tmp_path / architecture, architecture))
        plain, caching = TorchEngine.load(folder), TorchEngine.load(folder, prompt_cache=2**24)
        ran: list[int] = []
        count_tokens(caching, ran)
        group = [sequence(70 + length, 70, 2 * (length > 3), seed=length, prompt_seed=7) for length in (1, 9, 30)]
        alone = sequence(80, 75, seed=5, prompt_seed=8)
        for batch in ([group[0], alone], group[1:], [group[2], alone], [*group, sequence(9, 2)], [alone]):
            for captured, each in zip(caching.forward(batch), batch, strict=True):
                assert_same(captured, plain.forward([each])[0], 4e-6)
        own = len(expand(group[2]).ids) - 70
        # Seen once, seen twice (cached from here on), then only what comes after the prompt's last token but one.
        assert ran[2] == 1 + own + len(expand(alone).ids)
        assert ran[4] == len(expand(alone).ids) - 74


def count_tokens(engine: TorchEngine, counts: list[int]) -> None:
    """Append the tokens of every pass; the scored tokens that run again for contributions are no pass."""

    def count(_: object, __: object, inputs: Any) -> None:
        if isinstance(inputs["packed"], PackedBatch):
            counts.append(inputs["input_ids"].shape[1])

    backbone: Any = engine._passes.backbone
    backbone.register_forward_pre_hook(count, with_kwargs=True)


def test_cached_prompts_stay_within_their_bytes_and_the_least_recently_used_goes_first() -> None:
    caches = [KVCache() for _ in range(3)]
    for each in caches:
        each.extend(0, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))
    assert caches[0].size == 64
    prompts = PromptCache(128)
    prompts.store((0,), caches[0])
    prompts.store((1,), caches[1])
    assert prompts.get((0,)) is caches[0]
    prompts.store((2,), caches[2])
    assert [prompts.get((i,)) for i in range(3)] == [caches[0], None, caches[2]]


def test_without_bytes_no_prompt_is_cached() -> None:
    prompts = PromptCache(0)
    assert [prompts.seen_before((1,)) for _ in range(3)] == [False] * 3
