"""`sparse`: the whole reward on the last token, which is what a trainer does with a scalar reward by itself.

Source: The other control of Chan et al., arXiv 2402.00782.

Equation:
    r_t = R * [t = L]

Sum: R.

Use: As the baseline of every comparison, on the same route and the same alignment.

Traps: With a masked last token, the reward goes to the last one that is kept.

Cost: One forward pass, of which only the score is kept.
"""

from __future__ import annotations

import numpy as np

from densereward.capture import Captured
from densereward.methods.base import Credit, Method, Params, Response

__all__ = ["Sparse"]


class Sparse(Method[Params]):
    """Everything at the end."""

    def credit(self, captured: Captured, response: Response, params: Params) -> Credit:
        """0, ..., 0, R."""
        rewards = np.zeros(response.count)
        rewards[-1] = captured.reward
        return Credit(rewards, on="slots")
