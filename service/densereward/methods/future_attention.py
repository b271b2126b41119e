"""`future_attention`: the attention that a token receives from the response's later tokens, as its share of R.

Source: Li et al., "Attention Illuminates LLM Reasoning", arXiv 2510.13554 (future attention influence), where the
policy's own attention is read; here it is the reward model's.

Equation:
    w_t = mean over i = t+1..T of a_(i,t)
    r_t = w_t / sum(w) * R

a is the attention averaged over the heads of a layer, and over `layers`.

Sum: R.

Use: To find tokens that later ones build on. To compare with `abc`, which asks the scoring token alone.

Traps: The weights carry no sign, so where R < 0 the tokens with the most attention are punished most. The last token
has no later one and gets nothing. Early tokens are seen by more queries; the mean, not the sum, is taken for that.

Cost: One forward pass, and the attention of each such layer written out once more, some 256 rows at a time.
"""

from __future__ import annotations

import numpy as np

from densereward.capture import Captured, Need, ReceivedAttention
from densereward.methods.abc import MASS_FLOOR
from densereward.methods.base import Credit, Layers, Method, Params, Response, layer_numbers, proportional

__all__ = ["FutureAttention", "FutureAttentionParams"]


class FutureAttentionParams(Params):
    """Parameters of `future_attention`.

    Attributes:
        layers: "last", or layer numbers whose attention is averaged; negative ones count from the last layer.
    """

    layers: Layers = "last"


class FutureAttention(Method[FutureAttentionParams]):
    """Received attention, as shares of R."""

    params_type = FutureAttentionParams

    def needs(self, params: FutureAttentionParams) -> frozenset[Need]:
        """What each token receives in each layer asked for."""
        return frozenset(ReceivedAttention(layer) for layer in layer_numbers(params.layers))

    def credit(self, captured: Captured, response: Response, params: FutureAttentionParams) -> Credit:
        """w_t / sum(w) * R for t = 1..T."""
        received = [captured.received_attention[layer] for layer in layer_numbers(params.layers)]
        later = np.arange(captured.length - 1, -1, -1)
        weights = np.stack(received).astype(np.float64).mean(axis=0) / np.maximum(later, 1)
        if weights.sum() >= MASS_FLOOR:
            return Credit(proportional(weights, captured.reward))
        warning = "low_attention: no response token receives attention from a later one; R is uniform"
        return Credit(np.full(captured.length, captured.reward / captured.length), warnings=(warning,))
