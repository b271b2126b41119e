"""URM: a mean and a deviation of each attribute, and weights of the attributes from the same hidden state.

    score(t) = sum_k weights(h_t)_k * mean_k(h_t)

`score` gives mean and deviation of each attribute side by side; `weights` is Linear, SELU, Linear, SELU, Linear. The
deviation has no part in the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, PositionHead, in_float32
from densereward.heads.layers import decoder_with

__all__ = ["UrmHead"]


class UrmHead(PositionHead):
    """Attributes and the layers that give their weights.

    Raises:
        ModelError: there are not as many weights as means.
    """

    name = "urm"
    families = "URM"
    objectives = True

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The checkpoint has layers for the weights of what `score` gives."""
        return checkpoint.holds("weights.fc.0.weight") and checkpoint.holds("score.weight")

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """The decoder with attributes and weights on it."""
        return decoder_with(checkpoint, "score", "weights.fc")

    def __init__(self, model: PreTrainedModel) -> None:
        parts: Any = model
        self._attributes: nn.Linear = parts.score
        self._weights = [each for each in parts.weights.fc if isinstance(each, nn.Linear)]
        if self._attributes.out_features != 2 * self._weights[-1].out_features:
            raise ModelError(
                f"{self._weights[-1].out_features} weights do not fit the means and deviations of "
                f"{self._attributes.out_features / 2:g} attributes"
            )

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The sum of the weighted means."""
        return self.parts(hidden, hidden[:0], ()).sum(dim=0)

    def parts(
        self,
        hidden: Float[Tensor, "M E"],
        gates: Float[Tensor, "B E"],  # noqa: ARG002
        owner: Int64[Tensor, " M"] | Sequence[int],  # noqa: ARG002
    ) -> Float32[Tensor, "K M"]:
        """The weighted means."""
        means = in_float32(self._attributes, hidden)[:, ::2]
        weights: Tensor = hidden.float()
        for each in self._weights[:-1]:
            weights = torch.selu(in_float32(each, weights))
        parts: Float32[Tensor, "M K"] = means * in_float32(self._weights[-1], weights)
        return parts.T
