"""`abc`: the scoring token's attention on each response token, as its share of R (Attention Based Credit).

Source: Chan et al., "Dense Reward for Free in RLHF", ICML 2024, arXiv 2402.00782.

Equation:
    r_t = a_t / sum(a) * R

a is the attention of the last layer, averaged over heads, of the token the score is read from; the prompt's columns
and the closing tokens' are dropped.

Sum: R.

Use: Long responses, where the paper finds a gain; compare with `uniform`, which gets much of it there. Its experiments
have beta = 0.8, the default here. In our own PPO on short texts it gained nothing (service/docs/evidence.md).

Traps: The weights carry no sign, so where R < 0 the most attended tokens are punished most, whatever they say (`red`
and `contribution` are signed). Early tokens are attention sinks: `attention_mass` reports how much of the row fell on
the response at all; below 1e-4 the weights are noise, and R is divided evenly with a warning. In PPO the token that
ends a text is left with a small share, so that policies learn to go on: watch how many end by themselves.

Cost: One forward pass; the row itself is not measurable.
"""

from __future__ import annotations

import numpy as np

from densereward.capture import AttentionRow, Captured, Need
from densereward.methods.base import Beta, Credit, Layers, Method, Params, Response, layer_numbers, proportional

__all__ = ["MASS_FLOOR", "AbcParams", "AttentionBasedCredit"]

MASS_FLOOR = 1e-4


class AbcParams(Params):
    """Parameters of `abc`.

    Attributes:
        layers: "last", or layer numbers whose rows are averaged; negative ones count from the last layer.
    """

    beta: Beta = 0.8
    layers: Layers = "last"


class AttentionBasedCredit(Method[AbcParams]):
    """The scoring token's attention on the response, as shares of R."""

    params_type = AbcParams

    def needs(self, params: AbcParams) -> frozenset[Need]:
        """The scored row of each layer asked for."""
        return frozenset(AttentionRow(layer) for layer in layer_numbers(params.layers))

    def credit(self, captured: Captured, response: Response, params: AbcParams) -> Credit:
        """a_t * R for t = 1..T."""
        rows = [captured.attention_rows[layer] for layer in layer_numbers(params.layers)]
        row = np.stack(rows).astype(np.float64).mean(axis=0)
        mass = float(row.sum())
        if mass >= MASS_FLOOR:
            return Credit(proportional(row, captured.reward), attention_mass=mass)
        warning = f"low_attention_mass: {mass:.1e} of the scoring token's attention fell on the response; R is uniform"
        return Credit(
            np.full(captured.length, captured.reward / captured.length), attention_mass=mass, warnings=(warning,)
        )
