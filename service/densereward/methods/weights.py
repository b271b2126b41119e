"""`weights`: R shared out in proportion to the trainer's own weights, one for each of its tokens.

The policy's attention, for one, which makes it ABC-D of Chan et al. (arXiv 2402.00782): a reward model cannot see it.

    r_t = beta * w_t / sum(w) * R + (1 - beta) * R * [t = T]
"""

from __future__ import annotations

from densereward.capture import Captured
from densereward.errors import InvalidRequest
from densereward.methods.base import Credit, Method, Params, TrainerTokens, proportional

__all__ = ["Weights"]


class Weights(Method[Params]):
    """The trainer's weights, normalised."""

    def check(self, tokens: TrainerTokens) -> None:
        """The sample brings weights that can be normalised."""
        if tokens.weights is None:
            raise InvalidRequest(
                "the method weights needs the sample's `weights`, one per token", code="missing_weights"
            )
        proportional(tokens.weights, 1.0)

    def credit(self, captured: Captured, tokens: TrainerTokens, params: Params) -> Credit:
        """w_t / sum(w) * R."""
        if tokens.weights is None:
            raise ValueError("weights were not checked")
        return Credit(proportional(tokens.weights, captured.reward), on="slots")
