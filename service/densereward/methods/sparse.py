"""`sparse`: R on the last token and 0 elsewhere, which is what a trainer does with a scalar reward by itself.

The other control of Chan et al. (arXiv 2402.00782).
"""

from __future__ import annotations

import numpy as np

from densereward.capture import Captured
from densereward.methods.base import Credit, Method, Params, TrainerTokens

__all__ = ["Sparse"]


class Sparse(Method[Params]):
    """Everything at the end."""

    def credit(self, captured: Captured, tokens: TrainerTokens, params: Params) -> Credit:
        """0, ..., 0, R."""
        rewards = np.zeros(tokens.count)
        rewards[-1] = captured.reward
        return Credit(rewards, on="slots")
