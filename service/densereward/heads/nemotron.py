"""Llama-3.1-Nemotron-70B-Reward-HF: a score folded into the first row of a language model's output embedding.

The score is the logit of token 0 where the sequence ends.
"""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor

from densereward.heads.output_embedding import OutputEmbeddingHead

__all__ = ["NemotronHead"]


class NemotronHead(OutputEmbeddingHead):
    """The first row.

    Raises:
        ModelError: the model has no output embedding.
    """

    name = "nemotron"
    families = "Llama-3.1-Nemotron-70B-Reward-HF (with `--head nemotron`)"
    needed = "output embedding whose first row could be a score"

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Logits of token 0."""
        scores: Float32[Tensor, " M"] = hidden.float() @ self._layer.weight[0].float()
        return scores if self._layer.bias is None else scores + self._layer.bias[0].float()
