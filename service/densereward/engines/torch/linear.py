"""A model's float32 layers on the CPU, computed by oneDNN (`heads.products` says why)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densereward.heads.products import by_onednn, onednn_computes

__all__ = ["speed_up"]


class _OneDnnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name is torch's
        if torch.is_grad_enabled():  # oneDNN's product has no derivative
            return super().forward(input)
        return by_onednn(input, self.weight, self.bias)


def speed_up(model: nn.Module) -> None:
    """Let oneDNN compute the float32 linear layers of a model on the CPU; their weights do not change."""
    for module in model.modules():
        if type(module) is nn.Linear and onednn_computes(module.weight):
            module.__class__ = _OneDnnLinear
