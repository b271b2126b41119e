"""`uniform`: R / L on each of the trainer's L tokens.

The control of Chan et al. (arXiv 2402.00782): on long responses it brings much of the gain of any dense reward, so
every comparison should carry it.
"""

from __future__ import annotations

import numpy as np

from densereward.capture import Captured
from densereward.methods.base import Credit, Method, Params, TrainerTokens

__all__ = ["Uniform"]


class Uniform(Method[Params]):
    """The same reward for every token."""

    def credit(self, captured: Captured, tokens: TrainerTokens, params: Params) -> Credit:
        """R / L, L times."""
        return Credit(np.full(tokens.count, captured.reward / tokens.count), on="slots")
