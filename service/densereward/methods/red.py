"""`red`: differences of prefix scores (Reward rEDistribution, first called R3HF).

Source: Li et al., EMNLP 2025, arXiv 2411.08302, Eq. 6 and 7.

Equation:
    r_t = s_t - s_(t-1)

s_t is the score of the prefix of t response tokens, s_0 the score before the response. Where closing tokens follow
the response, the last token gets the step up to the score at the closing token. The paper treats s_0 in two ways, so
`first_token` chooses: "subtract" is Eq. 6 as written; "zero" gives the first token 0, as in its Fig. 4; "fold" gives
the first token s_1.

Sum: R - s_0, and `baseline` is s_0 ("subtract"); R - s_1 ("zero"); R ("fold").

Use: The default. The steps carry a sign and telescope: potential-based shaping with gamma = 1 and potential s, which
leaves the optimal policy unchanged. The paper's Table 7 has beta = 1 everywhere but for LLaMA3 on TL;DR (0.5). In our
own PPO it learns faster than R on the last token and leaves lengths alone (service/docs/evidence.md).

Traps: A model that reads its score at closing tokens was never trained to score an open prefix; prefix_mode "closed"
scores each prefix as if the response ended there. Never subtract a sequence's baseline (RLOO, GRPO) from token
rewards: add alpha * (r_t - mean r) to the sequence's advantage instead.

Cost: One forward pass. With prefix_mode "closed", the closing tokens once for every token, or for every `stride`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from densereward.capture import Captured, Need, PrefixMode, PrefixScores
from densereward.methods.base import Credit, Method, Params, Response
from densereward.methods.prefixes import scores_at

__all__ = ["Red", "RedParams"]


class RedParams(Params):
    """Parameters of `red`.

    Attributes:
        first_token: how the score before the response is treated.
        prefix_mode: "open" reads the head at each response token as it stands; "closed" scores each prefix as if the
            response ended there, closing tokens included, which is what most reward models were trained to read.
        stride: a score is taken only after every `stride` tokens, and at the end; the whole step is the reward of the
            last token before it. Closed prefixes cost that much less.
    """

    first_token: Literal["subtract", "zero", "fold"] = "subtract"
    prefix_mode: PrefixMode = "open"
    stride: PositiveInt = 1


class Red(Method[RedParams]):
    """Differences of prefix scores, from one forward pass."""

    params_type = RedParams

    def needs(self, params: RedParams) -> frozenset[Need]:
        """The score at every prefix."""
        return frozenset([PrefixScores(params.prefix_mode)])

    def boundaries(self, response: Response, params: RedParams) -> Sequence[int] | None:
        """Every `stride` tokens, and the end."""
        return None if params.stride == 1 else _every(params.stride, response.length)

    def credit(self, captured: Captured, response: Response, params: RedParams) -> Credit:
        """r_t for t = 1..T; Eq. 6."""
        boundaries = _every(params.stride, captured.length)
        scores = scores_at(captured, response, params.prefix_mode, boundaries)
        first = {"subtract": scores.before, "zero": float(scores.after[0]), "fold": 0.0}[params.first_token]
        rewards = np.zeros(captured.length)
        rewards[np.asarray(boundaries) - 1] = np.diff(scores.after, prepend=first)
        warnings = scores.no_prompt if params.first_token == "subtract" else ()
        return Credit(rewards, baseline=first, warnings=warnings + scores.warnings)


def _every(stride: int, length: int) -> list[int]:
    """stride, 2 * stride, ... below `length`, and `length`."""
    return [*range(stride, length, stride), length]
