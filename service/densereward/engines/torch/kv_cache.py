"""Keys and values that outlive a forward pass: of prompts that come again, and of sequences that run in chunks."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

__all__ = ["KVCache", "Prompt", "PromptCache"]

Prompt = tuple[int, ...]
"""A prompt's ids."""

_REMEMBERED = 65_536
"""Prompts whose hashes are remembered."""


class KVCache:
    """Keys and values of a sequence's first tokens, layer by layer; the tokens after them can be appended."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return next((keys.shape[1] for keys, _ in self._layers.values()), 0)

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return sum(each.numel() * each.element_size() for pair in self._layers.values() for each in pair)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [K, L, D] and values [K, L, E] of a layer."""
        return self._layers[layer]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append copies of a layer's keys and values of the next tokens."""
        before = self._layers.get(layer)
        if before is None:
            self._layers[layer] = keys.clone(), values.clone()
        else:
            self._layers[layer] = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)


class PromptCache:
    """A `KVCache` per prompt, within a budget of bytes; the least recently used prompt is evicted first.

    A prompt is cached when it comes in a second pass. Prompts that come once, or whose responses all come together,
    cost nothing.

    Args:
        capacity: bytes; 0 caches nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._caches: OrderedDict[Prompt, KVCache] = OrderedDict()
        self._size = 0
        self._seen: OrderedDict[int, None] = OrderedDict()

    def get(self, prompt: Prompt) -> KVCache | None:
        """The prompt's cache, if it has one."""
        cache = self._caches.get(prompt)
        if cache is not None:
            self._caches.move_to_end(prompt)
        return cache

    def seen_before(self, prompt: Prompt) -> bool:
        """Whether the prompt came in an earlier pass; from now on it has."""
        if not self._capacity:
            return False
        key = hash(prompt)
        seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return seen

    def store(self, prompt: Prompt, cache: KVCache) -> None:
        """Add a prompt's cache, and evict others until all fit."""
        self._caches[prompt] = cache
        self._size += cache.size
        while self._size > self._capacity:
            _, evicted = self._caches.popitem(last=False)
            self._size -= evicted.size

    def clear(self) -> None:
        """Evict everything."""
        self._caches.clear()
        self._size = 0
