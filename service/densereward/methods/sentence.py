"""`sentence`: differences of prefix scores, taken at the ends of sentences.

Source: Sentence-level rewards, arXiv 2503.04793; the same differences as `red` (arXiv 2411.08302), only coarser.

Equation:
    r(sentence) = s_end - s_start
    r_t         = r(sentence) / tokens in it            (place = "spread")
    r_t         = r(sentence) * [t is its last token]   (place = "last")

Sum: R - s_0; `baseline` is s_0. Over any sentence the sum is that of `red`.

Use: Responses of several sentences, where single tokens' steps are noise and a sentence says one thing.

Traps: Sentences are cut by sentencex, which knows the marks of many languages and rather joins two sentences than
splits one; text without such marks (code, verse) is one sentence, which is `uniform` with s_0 taken off.

Cost: One forward pass. With prefix_mode "closed", the closing tokens once for every sentence, far less than for every
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from densereward.capture import Captured, Need, PrefixMode, PrefixScores
from densereward.methods.base import Credit, Method, Params, Response, Segment
from densereward.methods.prefixes import scores_at, spread_evenly, text_boundaries_of

__all__ = ["Sentence", "SentenceParams"]


class SentenceParams(Params):
    """Parameters of `sentence`.

    Attributes:
        prefix_mode: "open" reads the head at each sentence's last token; "closed" scores the response as if it ended
            there, closing tokens included.
        place: a sentence's reward on all its tokens in equal shares, or on its last one.
    """

    prefix_mode: PrefixMode = "open"
    place: Literal["spread", "last"] = "spread"


class Sentence(Method[SentenceParams]):
    """A reward for every sentence."""

    params_type = SentenceParams

    def needs(self, params: SentenceParams) -> frozenset[Need]:
        """The scores of prefixes."""
        return frozenset([PrefixScores(params.prefix_mode)])

    def boundaries(self, response: Response, params: SentenceParams) -> Sequence[int] | None:
        """The ends of sentences."""
        return _ends(response)

    def check(self, response: Response) -> None:
        """The text is known."""
        _ends(response)

    def credit(self, captured: Captured, response: Response, params: SentenceParams) -> Credit:
        """The step over each sentence, on its tokens."""
        ends = _ends(response)
        scores = scores_at(captured, response, params.prefix_mode, ends)
        if params.place == "spread":
            rewards = spread_evenly(scores.steps, ends)
        else:
            rewards = np.zeros(captured.length)
            rewards[np.asarray(ends) - 1] = scores.steps
        spans = zip([0, *ends[:-1]], ends, scores.steps.tolist(), strict=True)
        return Credit(
            rewards,
            baseline=scores.before,
            segments=tuple(Segment(start, stop, step) for start, stop, step in spans),
            warnings=scores.warnings + scores.no_prompt,
        )


def _ends(response: Response) -> Sequence[int]:
    return text_boundaries_of("sentence", response).sentences
