"""`implicit`: what a policy says more of each token than its reference does.

Source: "From r to Q*", arXiv 2404.12358; as a dense reward RTO, arXiv 2404.18922, and PRIME, arXiv 2502.01456.

Equation:
    r_t = clip(ratio_scale * (log p(y_t) - log p_ref(y_t)), +-ratio_clip)

p is a policy trained on preferences, p_ref what it was trained from; the server has them from --pair. The ratios of
the closing tokens, each scaled and clipped by itself, go to the last token. Asked of a reward model that is served
beside the pair, R is added on the last token as well, as RTO does; `beta` then is the share of the ratios alone.

Sum: With the pair as the model, ratio_scale * R where nothing is clipped, R being the sum of all log-ratios. Beside a
reward model, R and the ratios. `baseline` is what is missing to R.

Use: With a pair trained by DPO or the like on the preferences that matter: each token has its own reward, without a
reward model that was trained for it. RTO's script has ratio_scale = 0.05 and ratio_clip = 0.05.

Traps: The ratio of a policy that is being trained to its own reference is the KL penalty with its sign turned round:
take a pair of its own. A long text has a large sum; compare R between texts of one length. Log-probabilities of
half-precision models are noisy, and the ratio is a small difference of two.

Cost: One forward pass of the policy and one of the reference, logits over the vocabulary a part at a time.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64

from densereward.capture import Captured, LogRatios, Need
from densereward.methods.base import Credit, Method, Params, Positive, Response

__all__ = ["Implicit", "ImplicitParams", "closing_on_last"]


class ImplicitParams(Params):
    """Parameters of `implicit`.

    Attributes:
        ratio_scale: times the log-ratios: the factor that DPO calls beta.
        ratio_clip: no token's scaled ratio goes beyond this, up or down.
    """

    ratio_scale: Positive = 0.05
    ratio_clip: Positive | None = None


class Implicit(Method[ImplicitParams]):
    """Scaled log-ratios of two language models."""

    params_type = ImplicitParams
    by_pair = True

    def needs(self, params: ImplicitParams) -> frozenset[Need]:
        """The log-ratios."""
        return frozenset([LogRatios()])

    def credit(self, captured: Captured, response: Response, params: ImplicitParams) -> Credit:
        """Scaled, then clipped, as in RTO's code."""
        values = params.ratio_scale * np.asarray(captured.log_ratios, dtype=np.float64)
        if params.ratio_clip is not None:
            values = values.clip(-params.ratio_clip, params.ratio_clip)
        rewards = closing_on_last(values, captured.length)
        return Credit(rewards, baseline=captured.reward - float(rewards.sum()))


def closing_on_last(
    values: Float64[np.ndarray, " _"] | Float32[np.ndarray, " _"], length: int
) -> Float64[np.ndarray, " T"]:
    """Values of a response's T tokens and the closing tokens after them; those of the latter go to the last one."""
    rewards = values[:length].astype(np.float64)
    rewards[-1] += values[length:].sum()
    return rewards
