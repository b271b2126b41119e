"""`steps`: the model's own score of each step or token, where it was trained to give one.

Source: Process reward models: Math-Shepherd, arXiv 2312.08935; Qwen2.5-Math-PRM, arXiv 2501.07301. For tokens TLCR,
arXiv 2407.16574, with form = "signed". Differences: Setlur et al., "Rewarding Progress", arXiv 2410.08146.

Equation:
    r(step k) = p_k              (form = "score")
    r(step k) = 2 p_k - 1        (form = "signed")
    r(step k) = p_k - p_(k-1)    (form = "difference"; p_0 = 0)
    r_t       = r(step) * [t is its last token]   (place = "last")
    r_t       = r(step) / tokens in it            (place = "spread")

p_k is what the head says where step k ends: the probability that the step is good, or a score without bounds where the
model has a single label. For a model that judges tokens, each token is a step.

Sum: That of r; `baseline` is the rest of R. R is the last step's score for models that judge steps, so that the
differences sum to R; for models that judge tokens it is the mean over the response's tokens.

Use: With process reward models and token classifiers, whose scores are rewards already.

Traps: Probabilities are positive, so "score" pays for every further step, good or bad; "signed" or "difference" do not.
A step that is cut by length is judged as if it had ended.

Cost: One forward pass.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from densereward.capture import Captured, Need, StepScores
from densereward.errors import EngineFailure
from densereward.methods.base import Credit, Method, Params, Response, Segment
from densereward.methods.prefixes import spread_evenly

__all__ = ["StepParams", "StepRewards"]


class StepParams(Params):
    """Parameters of `steps`.

    Attributes:
        form: what of a step's score is its reward.
        place: a step's reward on its last token, or on all its tokens in equal shares.
    """

    form: Literal["score", "signed", "difference"] = "score"
    place: Literal["last", "spread"] = "last"


class StepRewards(Method[StepParams]):
    """Scores of steps as rewards."""

    params_type = StepParams

    def needs(self, params: StepParams) -> frozenset[Need]:
        """The scores of the steps."""
        return frozenset([StepScores()])

    def credit(self, captured: Captured, response: Response, params: StepParams) -> Credit:
        """One reward a step, on its tokens."""
        if captured.step_scores is None:
            raise EngineFailure("the engine gave no step scores")
        scores, stops = captured.step_scores.astype(np.float64), response.steps
        values = {"score": scores, "signed": 2 * scores - 1, "difference": np.diff(scores, prepend=0)}[params.form]
        if params.place == "spread":
            rewards = spread_evenly(values, stops)
        else:
            rewards = np.zeros(captured.length)
            rewards[np.asarray(stops) - 1] = values
        spans = zip([0, *stops[:-1]], stops, scores.tolist(), strict=True)
        return Credit(
            rewards,
            baseline=captured.reward - float(rewards.sum()),
            segments=tuple(Segment(start, stop, score) for start, stop, score in spans),
        )
