"""`abc`: Attention Based Credit. "Dense Reward for Free in RLHF", Chan et al., ICML 2024, arXiv 2402.00782.

    r_t = beta * a_t * R + (1 - beta) * R * [t = T]

a is the attention of the last layer, averaged over heads, of the token the score is read from; the prompt's columns
(and the closing tokens') are dropped and the rest is renormalised to sum 1. The sum of r is R. The paper's
experiments have beta = 0.8.

Two things to know. Where R < 0 the most attended tokens are punished most, whatever they say: the weights carry no
sign (`red` does). And early tokens are attention sinks: `attention_mass` reports how much of the row fell on the
response at all; below `MASS_FLOOR` the weights are noise, and R is shared out evenly with a warning.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from densereward.capture import AttentionRow, Captured, Need
from densereward.methods.base import Beta, Credit, Method, Params, TrainerTokens, proportional

__all__ = ["MASS_FLOOR", "AbcParams", "AttentionBasedCredit"]

MASS_FLOOR = 1e-4


class AbcParams(Params):
    """Parameters of `abc`.

    Attributes:
        layers: "last", or layer numbers whose rows are averaged; negative ones count from the last layer.
    """

    beta: Beta = 0.8
    layers: Literal["last"] | Annotated[list[int], Field(min_length=1)] = "last"

    @property
    def layer_numbers(self) -> list[int]:
        """The layers as numbers."""
        return [-1] if self.layers == "last" else self.layers


class AttentionBasedCredit(Method[AbcParams]):
    """The scoring token's attention on the response, as shares of R."""

    params_type = AbcParams

    def needs(self, params: AbcParams) -> frozenset[Need]:
        """The scored row of each layer asked for."""
        return frozenset(AttentionRow(layer) for layer in params.layer_numbers)

    def credit(self, captured: Captured, tokens: TrainerTokens, params: AbcParams) -> Credit:
        """a_t * R for t = 1..T."""
        rows = [captured.attention_rows[layer] for layer in params.layer_numbers]
        row = np.stack(rows).astype(np.float64).mean(axis=0)
        mass = float(row.sum())
        if mass >= MASS_FLOOR:
            return Credit(proportional(row, captured.reward), attention_mass=mass)
        warning = f"low_attention_mass: {mass:.1e} of the scoring token's attention fell on the response; R is uniform"
        return Credit(
            np.full(captured.length, captured.reward / captured.length), attention_mass=mass, warnings=(warning,)
        )
