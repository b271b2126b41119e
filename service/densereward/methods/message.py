"""`message`: messages between pivots of the prefix scores, and a mask of those that agree with the response's score.

Source: Li et al., "Adaptive Message-wise RLHF" (later "Adaptive Segment-level Reward"), arXiv 2411.00809. This is a
reconstruction: the exact rule for pivots and its thresholds were not published.

Equation:
    d_t     = s_t - s_(t-1)
    pivot t : s_t crosses b, or |d_t| > tau           (a message begins at token t)
    score   = mean of s_t over the message
    keep    = (R >= b and score > b) or (R < b and score < b)
    r_t     = (s_end - s_start) / tokens in the message

Sum: R - s_0; `baseline` is s_0. Over any message the sum is that of `red`.

Use: To learn only from the parts of a response that agree with its label. `include: ["segments"]` gives the messages
and the mask; multiply your loss by the mask.

Traps: B is the mean prefix score over all samples of the request, so a sample's messages depend on its batch unless
`threshold` says what b is. Open prefixes of a model that was trained at closing tokens wander: prefer "closed".

Cost: One forward pass; with prefix_mode "closed", the closing tokens once for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from densereward.capture import Captured, Need, PrefixMode, PrefixScores
from densereward.methods.base import Credit, Finite, Method, Params, Positive, Response, Segment
from densereward.methods.prefixes import scores_at, spread_evenly

__all__ = ["Message", "MessageParams"]


class MessageParams(Params):
    """Parameters of `message`.

    Attributes:
        prefix_mode: "open" reads the head at each response token as it stands; "closed" scores each prefix as if the
            response ended there, closing tokens included.
        threshold: b; by default the mean prefix score over all samples of the request.
        tau: a step of more than this begins a message too; by default only crossings of b do.
    """

    prefix_mode: PrefixMode = "open"
    threshold: Finite | None = None
    tau: Positive | None = None


class Message(Method[MessageParams]):
    """A reward and a verdict for every message."""

    params_type = MessageParams

    def needs(self, params: MessageParams) -> frozenset[Need]:
        """The score at every prefix."""
        return frozenset([PrefixScores(params.prefix_mode)])

    def settle(self, captured: Sequence[Captured], params: MessageParams) -> MessageParams:
        """b, where the request left it open."""
        scores = [each.prefixes[params.prefix_mode].at(range(1, each.length + 1)) for each in captured if each.length]
        if params.threshold is not None or not scores:
            return params
        return params.model_copy(update={"threshold": float(np.concatenate(scores).mean(dtype=np.float64))})

    def credit(self, captured: Captured, response: Response, params: MessageParams) -> Credit:
        """The step over each message, on its tokens."""
        if params.threshold is None:
            raise ValueError("the parameters were not settled")
        scores = scores_at(captured, response, params.prefix_mode, range(1, captured.length + 1))
        starts = _pivots(scores.after, params.threshold, params.tau)
        stops = [*starts[1:], captured.length]
        steps = np.diff(scores.after[np.asarray(stops) - 1], prepend=scores.before)
        good = captured.reward >= params.threshold
        segments = []
        for start, stop in zip(starts, stops, strict=True):
            score = float(scores.after[start:stop].mean())
            segments.append(
                Segment(start, stop, score, keep=score > params.threshold if good else score < params.threshold)
            )
        return Credit(
            spread_evenly(steps, stops),
            baseline=scores.before,
            segments=tuple(segments),
            warnings=scores.warnings + scores.no_prompt,
        )


def _pivots(scores: Float64[np.ndarray, " T"], threshold: float, tau: float | None) -> list[int]:
    """Where messages begin, token 0 among them."""
    crosses = np.diff(scores >= threshold)
    jumps = np.abs(np.diff(scores)) > (np.inf if tau is None else tau)
    return [0, *(np.flatnonzero(crosses | jumps) + 1).tolist()]
