"""`segment`: segments that begin where the policy was uncertain, each worth the score at its end.

Source: Yin et al., "Segmenting Text and Learning Their Rewards for Improved RLHF", arXiv 2501.02790.

Equation:
    a segment begins at every token whose entropy exceeds `entropy`
    value = s_end - mu(p),  mu(p) = slope * log p + offset,  p = end / T
    r_t   = value / tokens in the segment

Sum: That of the values, which are scores and not steps, so it is not R; `baseline` is the rest.

Use: With the policy's entropies at hand (`token_entropies`, nats). The paper cuts at 1.75 for Phi-3 and 2.0 for Llama,
and trained its reward model on segments; with an off-the-shelf one, give `slope` and `offset` fitted on your own
prefix scores, or take `sentence`, whose rewards are steps and sum up.

Traps: A sample without `token_entropies` is cut at the ends of its sentences instead, and the answer says so.

Cost: One forward pass. With prefix_mode "closed", the closing tokens once for every segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from densereward.capture import Captured, Need, PrefixMode, PrefixScores
from densereward.methods.base import Credit, Finite, Method, Params, Response, Segment
from densereward.methods.prefixes import scores_at, spread_evenly, text_boundaries_of

__all__ = ["SegmentParams", "Segments"]


class SegmentParams(Params):
    """Parameters of `segment`.

    Attributes:
        prefix_mode: "open" reads the head at each segment's last token; "closed" scores the response as if it ended
            there, closing tokens included.
        entropy: a token whose entropy exceeds this (nats) begins a segment.
        slope, offset: of mu, which is subtracted from each score.
    """

    prefix_mode: PrefixMode = "open"
    entropy: Finite = 2.0
    slope: Finite = 0.0
    offset: Finite = 0.0


class Segments(Method[SegmentParams]):
    """A value for every segment."""

    params_type = SegmentParams

    def needs(self, params: SegmentParams) -> frozenset[Need]:
        """The scores of prefixes."""
        return frozenset([PrefixScores(params.prefix_mode)])

    def boundaries(self, response: Response, params: SegmentParams) -> Sequence[int] | None:
        """The ends of segments."""
        return _ends(response, params)

    def check(self, response: Response) -> None:
        """There is something to cut by."""
        if response.entropies is None:
            text_boundaries_of("segment", response)

    def credit(self, captured: Captured, response: Response, params: SegmentParams) -> Credit:
        """Each segment's value, on its tokens."""
        ends = _ends(response, params)
        scores = scores_at(captured, response, params.prefix_mode, ends)
        place = np.asarray(ends) / captured.length
        values = scores.after - (params.slope * np.log(place) + params.offset)
        warnings = scores.warnings
        if response.entropies is None:
            warnings += ("no_entropies: the sample has no token_entropies, so it was cut at the ends of its sentences",)
        spans = zip([0, *ends[:-1]], ends, values.tolist(), strict=True)
        return Credit(
            spread_evenly(values, ends),
            baseline=captured.reward - float(values.sum()),
            segments=tuple(Segment(start, stop, value) for start, stop, value in spans),
            warnings=warnings,
        )


def _ends(response: Response, params: SegmentParams) -> Sequence[int]:
    """Tokens before each segment's end."""
    if response.entropies is None:
        return text_boundaries_of("segment", response).sentences
    begins = np.flatnonzero(response.entropies > params.entropy).tolist()
    tokens = begins if response.text_boundaries is None else response.text_boundaries.before_slots(begins)
    return sorted({*tokens, response.length} - {0})
