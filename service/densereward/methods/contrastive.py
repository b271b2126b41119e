"""`contrastive`: how much likelier each token is to one asked for a good answer than to one asked for a bad one.

Source: T-REG, ACL 2025, arXiv 2412.02685. The wording of the two instructions is this project's.

Equation:
    r_t = sigmoid(log p(y_t | better, x) - log p(y_t | worse, x)) - 1/2

p is the policy of the server's --pair; better and worse are instructions put before the dialogue's first message, or
before `prompt` where the model has no chat template. The closing tokens' rewards go to the last token. Asked of a
reward model that is served beside the pair, R is added on the last token as well; `beta` then is the share of the
contrast alone.

Sum: Of the equation's values; beside a reward model, R and those. `baseline` is what is missing to R.

Use: Token rewards from an instruction-tuned model alone, with no reward model and no reference. T-REG takes them as a
weak guide for how a sequence's reward is divided: give them a small `beta`.

Traps: A model that follows no instructions gives noise around 0. The values are bounded by 1/2 a token, so a long
response outweighs R. Word `better` and `worse` for the task at hand, and alike but for what they ask for.

Cost: Three forward passes of the policy, and one of the reference where the pair is the model; logits over the
vocabulary a part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from densereward.capture import Captured, LogProbabilities, Need
from densereward.errors import EngineFailure
from densereward.methods.base import Credit, Instruction, Method, Params, Response
from densereward.methods.implicit import closing_on_last

__all__ = ["Contrastive", "ContrastiveParams"]


class ContrastiveParams(Params):
    """Parameters of `contrastive`.

    Attributes:
        better: what the model is told first where the response should be likely if it is good.
        worse: the same where it should be likely if it is bad.
    """

    better: Instruction = "Answer as helpfully, correctly and clearly as you can."
    worse: Instruction = "Answer unhelpfully, incorrectly and unclearly."


class Contrastive(Method[ContrastiveParams]):
    """One language model, told two things."""

    params_type = ContrastiveParams
    by_pair = True
    passes = 3

    def needs(self, params: ContrastiveParams) -> frozenset[Need]:
        """A language model's log-probabilities."""
        return frozenset([LogProbabilities()])

    def instructions(self, params: ContrastiveParams) -> Sequence[str]:
        """The two."""
        return params.better, params.worse

    def credit(self, captured: Captured, response: Response, params: ContrastiveParams) -> Credit:
        """The sigmoid of the difference, centred on 0."""
        better, worse = (_log_probabilities(each) for each in captured.variants)
        values = np.tanh((better - worse) / 2) / 2  # the same, which cannot overflow
        rewards = closing_on_last(values, captured.length)
        return Credit(rewards, baseline=captured.reward - float(rewards.sum()))


def _log_probabilities(captured: Captured) -> Float64[np.ndarray, " _"]:
    if captured.log_probabilities is None:
        raise EngineFailure("the engine gave no log-probabilities under an instruction")
    return captured.log_probabilities.astype(np.float64)
