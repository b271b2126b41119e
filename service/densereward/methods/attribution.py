"""`attribution`: the score's gradient at a token's embedding, times the embedding, as its share of R.

Source: P2T, CVPR 2026 (prompts to tokens by gradients); gradient times input against a baseline embedding.

Equation:
    a_t = dR/de_t . (e_t - e_pad)
    r_t = softmax(a)_t * R        (weights = "softmax")
    r_t = a_t                     (weights = "signed")

e_t is the token's embedding, e_pad that of the padding token; for a model without one e_pad is 0.

Sum: R ("softmax"); that of a ("signed"), and `baseline` is the rest.

Use: to compare with methods that read the forward pass alone. "signed" keeps which tokens lowered the score.

Traps: the softmax makes shares of R without a sign, and nearly even ones where the a_t are small. A gradient at one
point is a poor guide through many layers: expect noise in deep models.

Cost: one forward pass, and for each sample one more forward and backward by itself, some three passes' work; memory
for all layers' activations of one sample.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from densereward.capture import Captured, Gradients, Need
from densereward.methods.base import Credit, Method, Params, Response, proportional

__all__ = ["Attribution", "AttributionParams"]


class AttributionParams(Params):
    """Parameters of `attribution`.

    Attributes:
        weights: "softmax" divides R; "signed" gives each token its own first-order part.
    """

    weights: Literal["softmax", "signed"] = "softmax"


class Attribution(Method[AttributionParams]):
    """Gradient times embedding."""

    params_type = AttributionParams
    passes = 3

    def needs(self, params: AttributionParams) -> frozenset[Need]:
        """The gradients at the response's embeddings."""
        return frozenset([Gradients()])

    def credit(self, captured: Captured, response: Response, params: AttributionParams) -> Credit:
        """Shares of R, or a_t."""
        if captured.gradients is None:
            raise ValueError("the engine kept no gradients")
        values = captured.gradients.astype(np.float64)
        if params.weights == "softmax":
            return Credit(proportional(np.exp(values - values.max()), captured.reward))
        return Credit(values, baseline=captured.reward - float(values.sum()))
