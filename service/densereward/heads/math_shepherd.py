"""Math-Shepherd: a language model that says `+` or `-` at the tag after each step.

A step's score is the probability of ` +`, of the two, at the tag ` ки`; steps are lines, and the line breaks stay in
the text, which is read as one with the prompt. The ids are those of the published model's tokenizer. Nothing in the
config tells it from a language model, so it is named by the operator: `--head math_shepherd`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Float32
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from densereward.capture import Steps
from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, ScoreHead

__all__ = ["MathShepherdHead"]

_GOOD, _BAD = 648, 387


class MathShepherdHead(ScoreHead):
    """The output embeddings of the two tokens.

    Raises:
        ModelError: the model has no such rows.
    """

    name = "math_shepherd"
    families = "Math-Shepherd (with `--head math_shepherd`)"
    unit = "step"
    steps = Steps(cut="\n", separator=" ки", whole=True, joint=" ")
    tokens: ClassVar[Mapping[str, int]] = {"▁+": _GOOD, "▁-": _BAD, "▁ки": 12902}

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:  # noqa: ARG003
        """Never: it looks like a language model."""
        return False

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:  # noqa: ARG003
        """Transformers' own."""
        return AutoModelForCausalLM

    def __init__(self, model: PreTrainedModel) -> None:
        layer: Any = model.get_output_embeddings()
        if layer is None or layer.bias is not None or len(layer.weight) <= _GOOD:
            raise ModelError(f"{type(model).__name__} has no output embeddings of the tokens {_GOOD} and {_BAD}")
        self._layer = layer

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The probability that the step is good."""
        good, bad = self._layer.weight[[_GOOD, _BAD]].float()
        logits: Float32[Tensor, " M"] = hidden.float() @ (good - bad)
        return logits.sigmoid()
