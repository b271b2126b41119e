"""Keys and values that outlive a forward pass: of prompts that come again, and of sequences run in pieces."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

__all__ = ["KeptKeys", "Prompt", "PromptKeys"]

Prompt = tuple[int, ...]
"""A prompt's ids."""

_REMEMBERED = 65_536


class KeptKeys:
    """Keys and values of a sequence's first tokens, layer by layer; grows by what follows them."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens kept."""
        return next((keys.shape[1] for keys, _ in self._layers.values()), 0)

    @property
    def size(self) -> int:
        """Bytes they take."""
        return sum(each.numel() * each.element_size() for pair in self._layers.values() for each in pair)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [K, L, D] and values [K, L, E] of a layer."""
        return self._layers[layer]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep copies of a layer's keys and values of the tokens that come next."""
        before = self._layers.get(layer)
        if before is None:
            self._layers[layer] = keys.clone(), values.clone()
        else:
            self._layers[layer] = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)


class PromptKeys:
    """Kept keys by prompt, within a budget of bytes; the prompt that was used longest ago goes first.

    A prompt is kept when it comes a second time: prompts that come once, or whose responses all come together, cost
    nothing.

    Args:
        capacity: bytes; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Prompt, KeptKeys] = OrderedDict()
        self._size = 0
        self._seen: OrderedDict[int, None] = OrderedDict()

    def recall(self, prompt: Prompt) -> KeptKeys | None:
        """What is kept of a prompt."""
        kept = self._kept.get(prompt)
        if kept is not None:
            self._kept.move_to_end(prompt)
        return kept

    def comes_again(self, prompt: Prompt) -> bool:
        """Whether the prompt came before, in an earlier pass; now it has."""
        if not self._capacity:
            return False
        key = hash(prompt)
        again = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return again

    def store(self, prompt: Prompt, kept: KeptKeys) -> None:
        """Keep a prompt's keys, and let others go for them."""
        self._kept[prompt] = kept
        self._size += kept.size
        while self._size > self._capacity:
            _, gone = self._kept.popitem(last=False)
            self._size -= gone.size

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()
        self._size = 0
