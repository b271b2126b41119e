"""Math-Shepherd: a language model that says `+` or `-` at the tag after each step.

A step's score is the probability of ` +` against ` -` at the tag ` ки`. Steps are lines; the line breaks stay in the
text, which is tokenised together with the prompt. The ids are those of the published model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Float32
from torch import Tensor

from densereward.capture import Steps
from densereward.heads.output_embedding import OutputEmbeddingHead

__all__ = ["MathShepherdHead"]

_GOOD, _BAD = 648, 387


class MathShepherdHead(OutputEmbeddingHead):
    """The output embeddings of the two tokens.

    Raises:
        ModelError: the model has no such rows.
    """

    name = "math_shepherd"
    families = "Math-Shepherd (with `--head math_shepherd`)"
    unit = "step"
    steps = Steps(cut="\n", separator=" ки", whole=True, joint=" ")
    tokens: ClassVar[Mapping[str, int]] = {"▁+": _GOOD, "▁-": _BAD, "▁ки": 12902}
    needed = f"output embeddings of the tokens {_GOOD} and {_BAD}"

    @classmethod
    def suits(cls, layer: Any) -> bool:
        """It has the two rows and no bias."""
        return layer.bias is None and len(layer.weight) > _GOOD

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The probability that the step is good."""
        good, bad = self._layer.weight[[_GOOD, _BAD]].float()
        logits: Float32[Tensor, " M"] = hidden.float() @ (good - bad)
        return logits.sigmoid()
