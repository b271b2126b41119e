"""Skywork-o1-Open-PRM: one linear layer called `v_head.summary`, read at the line break after each step.

A step's score is the sigmoid of the layer's output. Steps are lines; the line break of an empty line ends a step, too.
"""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor

from densereward.capture import Steps
from densereward.heads.base import Checkpoint
from densereward.heads.layers import LayersHead

__all__ = ["StepValueHead"]


class StepValueHead(LayersHead):
    """The layer."""

    name = "step_value"
    families = "Skywork-o1-Open-PRM"
    unit = "step"
    steps = Steps(cut="\n", separator="\n", blank=True, joint="\n")
    layer = "v_head.summary"
    renamed = ((r"^pretrained_model\.", ""),)

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The architecture is a process reward model of this family."""
        return checkpoint.architecture.endswith("ForPrmModel")

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The probability that the step is good."""
        return super().scores(hidden).sigmoid()
