"""ArmoRM and QRM: several objectives, weighted by a gate that reads the prompt at one fixed position.

    score(t) = sum_k gate_k * (objectives(h_t) M)_k          gate = scale * softmax(layers(h_g) / temperature)

h_g is the hidden state where the prompt's last message ends, five tokens before the response, and M mixes objectives.
The gate is the same for all prefixes of a response and does not depend on its tokens, so contributions and gradients
take it as a constant. QRM predicts quantiles of each objective and takes their mean; it also has a batch normalisation
after each layer of the gate but the last. ArmoRM has neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, DecoderHead, in_float32
from densereward.heads.layers import decoder_class

__all__ = ["GatedHead"]

_GATE = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class GatedHead(DecoderHead):
    """Objectives and the gate over them.

    Raises:
        ModelError: the checkpoint's gate has another form.
    """

    name = "gated"
    families = "ArmoRM, QRM (Llama 3)"
    gate = _GATE
    objectives = True

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The checkpoint has a gate and a layer of objectives."""
        return checkpoint.holds("regression_layer.weight") and checkpoint.holds("gating.logit_scale")

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """The decoder with the gate's modules under the names that checkpoints have."""
        decoder = decoder_class(checkpoint)
        family: Any = decoder.__bases__[0]
        shapes = checkpoint.shapes

        class DecoderWithGate(family):  # type: ignore[misc]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.model = decoder(config)
                outputs, inputs = shapes["regression_layer.weight"]
                self.regression_layer = nn.Linear(inputs, outputs, bias=False)
                mixing = torch.zeros(shapes["reward_transform_matrix"])
                self.reward_transform_matrix = nn.Parameter(mixing, requires_grad=False)
                self.gating = nn.Module()
                self.gating.logit_scale = nn.Parameter(torch.ones(1))
                self.gating.layers = _gate_layers(checkpoint)
                self.post_init()

        DecoderWithGate.__name__ = checkpoint.architecture or "DecoderWithGate"
        return DecoderWithGate

    def __init__(self, model: PreTrainedModel) -> None:
        parts: Any = model
        self._objectives: nn.Linear = parts.regression_layer
        self._mixing: Tensor = parts.reward_transform_matrix
        self._gating: Any = parts.gating
        self._temperature = float(getattr(model.config, "gating_temperature", None) or 10.0)
        size = len(self._mixing)
        if self._mixing.shape != (size, size) or self._objectives.out_features % size:
            raise ModelError(f"{self._objectives.out_features} outputs cannot be divided among {size} objectives")

    def parts(
        self,
        hidden: Float[Tensor, "M E"],
        gates: Float[Tensor, "B E"],
        owner: Int64[Tensor, " M"] | Sequence[int],
    ) -> Float32[Tensor, "K M"]:
        """The objectives, weighted by the gate of each position's sequence."""
        quantiles = in_float32(self._objectives, hidden).unflatten(1, (len(self._mixing), -1))
        objectives = quantiles.mean(dim=2) @ self._mixing.float()
        parts: Float32[Tensor, "M K"] = self._weights(gates)[owner] * objectives
        return parts.T

    def _weights(self, hidden: Float[Tensor, "B E"]) -> Float32[Tensor, "B K"]:
        values: Tensor = hidden.float()
        linear = [each for each in self._gating.layers if isinstance(each, nn.Linear)]
        normalised = len(linear) < len(self._gating.layers)
        for each in self._gating.layers:
            if isinstance(each, nn.Linear):
                values = in_float32(each, values)
                if not normalised and each is not linear[-1]:
                    values = values.relu()
            elif isinstance(each, nn.BatchNorm1d):
                values = _batch_norm(each, values)
            else:
                values = values.relu()
        scale: Tensor = self._gating.logit_scale.float()
        return torch.softmax(values / self._temperature, dim=1) * scale


def _batch_norm(layer: nn.BatchNorm1d, values: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        None if each is None else each.float()
        for each in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    output: Tensor = nn.functional.batch_norm(values, mean, variance, weight, bias, training=False, eps=layer.eps)
    return output


def _gate_layers(checkpoint: Checkpoint) -> nn.ModuleList:
    """Linear layers and batch normalisations at their indices, ReLU at the indices that have no weights."""
    found: dict[int, nn.Module] = {}
    for name, shape in checkpoint.shapes.items():
        match = re.fullmatch(r"gating\.layers\.(\d+)\.weight", name)
        if match and len(shape) == 2:
            bias = f"gating.layers.{match[1]}.bias" in checkpoint.shapes
            found[int(match[1])] = nn.Linear(shape[1], shape[0], bias=bias)
        elif match:
            found[int(match[1])] = nn.BatchNorm1d(shape[0])
    if not found:
        raise ModelError("the gate has no layers")
    return nn.ModuleList([found.get(place, nn.ReLU()) for place in range(max(found) + 1)])
