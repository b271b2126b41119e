"""From what the engine kept of a sample to token rewards: each method's credit, moved to the trainer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from densereward.capture import Captured
from densereward.methods.base import Credit
from densereward.scoring.placement import Placed, place
from densereward.scoring.plans import Plan
from densereward.scoring.preparation import PreparedSample

__all__ = ["Redistributed", "redistribute"]


@dataclass(frozen=True, slots=True)
class Redistributed:
    """One sample's reward by one method.

    Attributes:
        plan: the method.
        credit: what it gave, on the model's tokens or on slots.
        placed: the same on the trainer's tokens.
        passes: forward passes of this sample that the method used.
    """

    plan: Plan
    credit: Credit
    placed: Placed
    passes: int


def redistribute(
    prepared: PreparedSample, captured: Captured, variants: Sequence[Sequence[Captured]], plans: Sequence[Plan]
) -> list[Redistributed]:
    """One sample's token rewards by every method of its request.

    Args:
        prepared: the sample.
        captured: what the engine kept of it.
        variants: per method, what the engine kept of its variants.
        plans: the methods, their parameters settled.

    Raises:
        EngineFailure: rewards that are not finite or do not sum to the sequence's.
    """
    redistributed = []
    for plan, own in zip(plans, variants, strict=True):
        credit = _credit(plan, prepared, replace(captured, variants=own))
        placed = place(credit, captured.reward, plan.params, prepared.slots, prepared.aligned.spans)
        redistributed.append(Redistributed(plan, credit, placed, passes=1 + len(own)))
    return redistributed


def _credit(plan: Plan, prepared: PreparedSample, captured: Captured) -> Credit:
    """The method's credit; without a response token, all of R on the last slot."""
    if captured.length:
        return plan.method.credit(captured, prepared.response, plan.params)
    rewards = np.zeros(prepared.slots.count)
    rewards[-1:] = captured.reward
    return Credit(
        rewards,
        on="slots",
        warnings=("empty_response: the response holds no token, so no method could redistribute the reward",),
    )
