"""Run a half-precision model in float32 arithmetic, to see what its dtype costs, without a second copy of it.

Each module's weights are widened while it runs and narrowed again after it, which loses nothing. What goes from one
module to the next stays float32. This takes the memory of the model's largest module, beside the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["all_in_float32", "in_float32_arithmetic"]


@contextmanager
def all_in_float32(model: nn.Module) -> Iterator[None]:
    """As `in_float32_arithmetic`, for models whose modules use each other's weights: all are widened at once."""
    swaps = [(_Widened(), module) for module in model.modules()]
    for swap, module in swaps:
        swap.widen(module, ())
    try:
        yield
    finally:
        for swap, module in swaps:
            swap.narrow(module, (), None)


@contextmanager
def in_float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """All that runs within is computed in float32, on the weights as they are."""
    owners = [module for module in model.modules() if any(True for _ in _narrow(module))]
    handles = []
    for module in owners:
        swap = _Widened()
        handles += [
            module.register_forward_pre_hook(swap.widen),
            module.register_forward_hook(swap.narrow, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Widened:
    """One module's own half-precision tensors, while it has wide ones in their place."""

    def __init__(self) -> None:
        self._originals: list[tuple[dict[str, Any], str, Tensor]] = []

    def widen(self, module: nn.Module, _given: Any) -> None:
        self._originals = list(_narrow(module))
        for owner, name, tensor in self._originals:
            wide = tensor.detach().float()
            owner[name] = nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide

    def narrow(self, _module: nn.Module, _given: Any, _output: Any) -> None:
        for owner, name, tensor in self._originals:
            owner[name] = tensor
        self._originals = []


def _narrow(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """A module's own tensors of half precision, and where they are held."""
    holders: list[dict[str, Any]] = [module._parameters, module._buffers]  # there is no other way in
    for holder in holders:
        for name, tensor in holder.items():
            if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                yield holder, name, tensor
