"""`occlusion`: what the score loses when a word, a sentence or a token is left out.

Source: leave-one-out; as a baseline in most of the attribution literature, e.g. SCAR, arXiv 2505.20417.

Equation:
    v_u = R - R(without u)
    r_t = v_u / tokens in u

Sum: That of v; `baseline` is the rest of R. The two need not be equal: the joint effect of two words is
in both values or in neither.

Use: to check the cheap methods against a counterfactual, on a few samples; to see what a reward model reads.

Traps: a text without a word may be a text that no one writes, which the model never saw. Tokens are taken out as they
are; the rest is not tokenised again.

Cost: one forward pass for the response and one for each unit, in packed batches that share the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from densereward.capture import Captured, Need, Variants
from densereward.methods.base import Credit, Method, Response, Segment
from densereward.methods.units import UnitParams, Units

__all__ = ["Occlusion"]


class Occlusion(Method[UnitParams]):
    """One unit left out at a time."""

    params_type = UnitParams
    passes = None

    def needs(self, params: UnitParams) -> frozenset[Need]:
        """The scores of other responses."""
        return frozenset([Variants()])

    def variants(self, response: Response, params: UnitParams) -> Sequence[Sequence[int]]:
        """The response without each of its units."""
        units = Units.of(response, params)
        return [units.without(each) for each in ~np.eye(len(units.stops), dtype=bool)]

    def credit(self, captured: Captured, response: Response, params: UnitParams) -> Credit:
        """R - R(without u), on the tokens of each u."""
        units = Units.of(response, params)
        values = captured.reward - np.asarray([each.reward for each in captured.variants])
        spans = zip(units.spans(), values.tolist(), strict=True)
        return Credit(
            units.spread(values),
            baseline=captured.reward - float(values.sum()),
            segments=tuple(Segment(start, stop, value) for (start, stop), value in spans),
        )
