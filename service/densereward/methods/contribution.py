"""`contribution`: what each token added to the score through the scoring token's attention, with its sign.

Source: Ours. The attention of `abc` (arXiv 2402.00782) says how much attention a token got, but not what it
contributed. This method reads the same attention as direct logit attribution: weight times value, carried on to the
score.

Equation:
    c_t = sum over heads h of a_(h,t) * v_(h,t) . W_O,h . g,     g = dR / d(attention's output at the scored token)
    r_t = c_t                                                    (rescale = false)
    r_t = c_t + (R - sum(c)) * |c_t| / sum(|c|)                  (rescale = true)

g is the gradient at the scored token alone, through everything that follows there (the last layer's MLP, the final
norm, the score head), with every attention output held fixed. With several `layers` their contributions add up.

Sum: That of c; `baseline` holds what came through the prompt, the closing tokens and the scored token's own residual
stream. With `rescale`, R, unless every c is 0.

Use: Where the reward is about what is said and not about how the response ends. On human annotations of offensive
spans it finds the words better than every other method here (see the evaluation of the embedded model), in one pass.

Traps: It is first order in the last steps and fixed in the attention, an explanation and not a counterfactual (that is
`occlusion`). The values of the last layer are of tokens that have read their context, so credit lands where the model
gathers a word's meaning, often its last token. In PPO the token that ends a text is left with a small share, so that
policies learn to go on (service/docs/evidence.md, where it learns fastest with `rescale`): watch how many end by
themselves.

Cost: One forward pass, and the scored tokens, one a sample, forward and backward once more: below a hundredth of it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from densereward.capture import Captured, Contributions, Need
from densereward.methods.base import Credit, Layers, Method, Params, Response, layer_numbers

__all__ = ["Contribution", "ContributionParams"]


class ContributionParams(Params):
    """Parameters of `contribution`.

    Attributes:
        layers: "all", "last", or layer numbers whose contributions are added up; negative ones count from the last.
        rescale: divide what came by other paths in proportion to |c_t|, so that the sum is R.
    """

    layers: Literal["all"] | Layers = "all"
    rescale: bool = False


class Contribution(Method[ContributionParams]):
    """Signed, value-weighted attention."""

    params_type = ContributionParams

    def needs(self, params: ContributionParams) -> frozenset[Need]:
        """The contributions in each layer asked for."""
        return frozenset(Contributions(layer) for layer in _layers(params))

    def credit(self, captured: Captured, response: Response, params: ContributionParams) -> Credit:
        """c_t for t = 1..T."""
        parts = [captured.contributions[layer] for layer in _layers(params)]
        rewards = np.stack(parts).astype(np.float64).sum(axis=0)
        rest = captured.reward - float(rewards.sum())
        size = np.abs(rewards)
        if params.rescale and size.sum() > 0:
            return Credit(rewards + rest * size / size.sum())
        return Credit(rewards, baseline=rest)


def _layers(params: ContributionParams) -> list[int] | list[None]:
    """The layers as numbers; None is all of them."""
    return [None] if params.layers == "all" else layer_numbers(params.layers)
