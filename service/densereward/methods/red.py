"""`red`: Reward rEDistribution. Li et al., EMNLP 2025, arXiv 2411.08302 (first version: R3HF).

    d_t = s_t - s_(t-1)                                (Eq. 6)
    r_t = beta * d_t + (1 - beta) * R * [t = T]        (Eq. 7; the second part is common to all methods)

s_t is the score of the prefix of t response tokens, s_0 the score before the response. Where closing tokens follow
the response, the last token takes the step up to the score at the closing token, so the steps telescope to R - s_0:
potential-based shaping with gamma = 1 and potential s, which leaves the optimal policy unchanged.

The paper is not of one mind about s_0, so `first_token` says what becomes of it:

    subtract   Eq. 6 as it stands: the sum is R - s_0 and `baseline` is s_0
    zero       Fig. 4: the first token gets 0; `baseline` is s_1
    fold       the first token gets s_1: the sum is R

Table 7 has beta = 1 everywhere but LLaMA3 on TL;DR (0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from densereward.capture import Captured, Need, PrefixMode, PrefixScores
from densereward.methods.base import Credit, Method, Params, TrainerTokens

__all__ = ["Red", "RedParams"]


class RedParams(Params):
    """Parameters of `red`.

    Attributes:
        first_token: what becomes of the score before the response.
        prefix_mode: "open" reads the head at each response token as it stands; "closed" scores each prefix as if the
            response ended there, closing tokens included, which is what most reward models were trained to read.
        stride: only every so many tokens, and at the end, is a score taken; the step since the last one is on the
            stretch's last token. Closed prefixes cost that much less.
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

    def boundaries(self, length: int, params: RedParams) -> Sequence[int] | None:
        """Every `stride` tokens, and the end."""
        return None if params.stride == 1 else _every(params.stride, length)

    def credit(self, captured: Captured, tokens: TrainerTokens, params: RedParams) -> Credit:
        """r_t for t = 1..T; Eq. 6."""
        warnings: list[str] = []
        prefixes = captured.prefixes[params.prefix_mode]
        before = prefixes.before
        if before is None and params.first_token == "subtract":
            warnings.append("no_prompt_score: the prompt is empty and has no score to subtract; s_0 = 0 was used")
        if params.prefix_mode == "closed" and not tokens.finished:
            warnings.append("unfinished: the response's own score is read open, as it was cut, its prefixes' closed")
        boundaries = _every(params.stride, captured.length)
        scores = prefixes.at(boundaries).astype(np.float64)
        scores[-1] = captured.reward  # the last prefix is the whole response, whose score is read at the closing token
        first = {"subtract": before or 0.0, "zero": float(scores[0]), "fold": 0.0}[params.first_token]
        rewards = np.zeros(captured.length)
        rewards[np.asarray(boundaries) - 1] = np.diff(scores, prepend=first)
        return Credit(rewards, baseline=first, warnings=tuple(warnings))


def _every(stride: int, length: int) -> list[int]:
    """stride, 2 * stride, ... below `length`, and `length`."""
    return [*range(stride, length, stride), length]
