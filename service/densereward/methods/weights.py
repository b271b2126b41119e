"""`weights`: R in proportion to the trainer's own weights, one for each of its tokens.

Source: ABC-D of Chan et al., arXiv 2402.00782, where the weights are the policy's attention.

Equation:
    r_t = w_t / sum(w) * R

Sum: R.

Use: With weights that the reward model cannot see: the policy's attention, its entropies, an annotator's marks.

Traps: Weights must be finite and not negative, and not all zero; they are the trainer's own tokens', one each.

Cost: One forward pass, of which only the score is kept.
"""

from __future__ import annotations

from densereward.capture import Captured
from densereward.errors import InvalidRequest
from densereward.methods.base import Credit, Method, Params, Response, proportional

__all__ = ["Weights"]


class Weights(Method[Params]):
    """The trainer's weights, normalised."""

    def check(self, response: Response) -> None:
        """The sample brings weights that can be normalised."""
        if response.weights is None:
            raise InvalidRequest(
                "the method weights needs the sample's `weights`, one per token", code="missing_weights"
            )
        proportional(response.weights, 1.0)

    def credit(self, captured: Captured, response: Response, params: Params) -> Credit:
        """w_t / sum(w) * R."""
        if response.weights is None:
            raise ValueError("weights were not checked")
        return Credit(proportional(response.weights, captured.reward), on="slots")
