"""PKU-Alignment's Beaver: one linear layer called `score_head`, read at the last token; costs are negated.

A cost model's score says how harmful a response is, so the reward is the score times -1. Where the config asks to
normalise, rewards are (r - mean) / sqrt(var) and costs r / sqrt(var), by the config's figures.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import normaliser
from densereward.heads.layers import LayersHead

__all__ = ["BeaverHead"]

_COST = "the model gives costs, so the reward is its score times -1"


class BeaverHead(LayersHead):
    """The layer, the normaliser, the sign.

    Raises:
        ModelError: a critic, or a normaliser without its figures.
    """

    name = "beaver"
    families = "PKU Beaver, reward and cost"
    layer = "score_head"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config: Any = model.config
        kind = getattr(config, "score_type", "reward")
        if kind not in ("reward", "cost"):
            raise ModelError(f"score_type = {kind!r}; a reward model is of type `reward` or `cost`")
        self._sign = -1.0 if kind == "cost" else 1.0
        if kind == "cost":
            self.notice = _COST
        self._mean, self._deviation = 0.0, 1.0
        if figures := normaliser(config, "do_normalize", "mean", "var"):
            mean, variance = figures
            self._mean = 0.0 if kind == "cost" else float(mean[0])
            self._deviation = float(variance[0]) ** 0.5

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Normalised rewards, or negated costs."""
        return self._sign * (self.logits(hidden)[:, 0] - self._mean) / self._deviation
