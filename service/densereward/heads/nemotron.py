"""Llama-3.1-Nemotron-70B-Reward-HF: a score folded into the first row of a language model's output embedding.

The score is the logit of token 0 where the sequence ends. Nothing in the config tells such a model from a language
model, so it is named by the operator: `--head nemotron`.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Float32
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, ScoreHead

__all__ = ["NemotronHead"]


class NemotronHead(ScoreHead):
    """The first row.

    Raises:
        ModelError: the model has no output embedding.
    """

    name = "nemotron"
    families = "Llama-3.1-Nemotron-70B-Reward-HF (with `--head nemotron`)"

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
        if layer is None:
            raise ModelError(f"{type(model).__name__} has no output embedding whose first row could be a score")
        self._layer = layer

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Logits of token 0."""
        scores: Float32[Tensor, " M"] = hidden.float() @ self._layer.weight[0].float()
        return scores if self._layer.bias is None else scores + self._layer.bias[0].float()
