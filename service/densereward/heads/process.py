"""Process reward models in the form of Qwen2.5-Math-PRM: two layers, read at the special token after each step.

`score` is Linear, ReLU, Linear with two labels, and a step's score the probability of the second, as the model's card
reads it. Responses are cut into steps at blank lines; `<extra_0>` is written after each. The architecture is not one
of transformers', and its published code is not run: the decoder is transformers' own and the head is this one.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import ScoreHead, Steps, good_label, in_float32

__all__ = ["ProcessHead"]


class ProcessHead(ScoreHead):
    """The two layers."""

    name = "process"
    unit = "step"
    steps = Steps(cut="\n\n", separator="<extra_0>")

    @classmethod
    def model_class(cls, config: PretrainedConfig) -> Any:
        """The decoder of the config's family with the head on it, under the names that checkpoints have."""
        if config.num_labels != 2:
            raise ModelError(f"num_labels = {config.num_labels}; a process reward model of this form has 2")
        decoder: Any = MODEL_MAPPING[type(config)]
        family: Any = decoder.__bases__[0]

        class ProcessRewardModel(family):  # type: ignore[misc]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                size = config.hidden_size
                self.model = decoder(config)
                self.score = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.num_labels))
                self.post_init()

        ProcessRewardModel.__name__ = decoder.__name__.replace("Model", "ForProcessRewardModel")
        return ProcessRewardModel

    def __init__(self, model: PreTrainedModel) -> None:
        score: Any = model.score
        self._first, self._last = score[0], score[2]
        self._good = good_label(model.config)

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The probability that the step is good."""
        inner = in_float32(self._first, hidden).relu()
        return in_float32(self._last, inner).softmax(dim=1)[:, self._good]
