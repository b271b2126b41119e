"""Process reward models in the form of Qwen2.5-Math-PRM: two layers, read at the special token after each step.

`score` is Linear, ReLU, Linear with two labels, and a step's score is the probability of the second, as in the model's
card. Responses are cut into steps at blank lines; `<extra_0>` is written after each. Transformers does not have the
architecture, and its published code is not run: the decoder is transformers' own, and the head is this one.
"""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from densereward.capture import Steps
from densereward.heads.base import Checkpoint, good_label
from densereward.heads.layers import LayersHead

__all__ = ["ProcessHead"]


class ProcessHead(LayersHead):
    """The two layers."""

    name = "process"
    families = "Qwen2.5-Math-PRM"
    unit = "step"
    steps = Steps(cut="\n\n", separator="<extra_0>")
    layer = "score"
    outputs = 2
    places = (0, 2)
    bias = True

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The architecture is a process reward model."""
        return checkpoint.architecture.endswith("ForProcessRewardModel")

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._good = good_label(model.config)

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The probability that the step is good."""
        return self.logits(hidden).softmax(dim=1)[:, self._good]
