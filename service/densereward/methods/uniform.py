"""`uniform`: the same reward on each of the trainer's tokens.

Source: The control of Chan et al., arXiv 2402.00782.

Equation:
    r_t = R / L

Sum: R.

Use: As the control: on long responses it is said to bring much of the gain of any dense reward, so every comparison
carries it. In our own PPO on short texts it is worse than R on the last token (service/docs/evidence.md).

Traps: It says nothing about which tokens earned the reward. In PPO the token that ends a text is left with a small
share, so that policies learn to go on: watch how many end by themselves.

Cost: One forward pass, of which only the score is kept.
"""

from __future__ import annotations

import numpy as np

from densereward.capture import Captured
from densereward.methods.base import Credit, Method, Params, Response

__all__ = ["Uniform"]


class Uniform(Method[Params]):
    """The same reward for every token."""

    def credit(self, captured: Captured, response: Response, params: Params) -> Credit:
        """R / L, L times."""
        return Credit(np.full(response.count, captured.reward / response.count), on="slots")
