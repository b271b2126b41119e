"""Sequence classifiers with one label: one linear layer, read at the last token of the sequence.

Skywork-Reward, FsfairX, TRL's RewardTrainer, the embedded default model: `*ForSequenceClassification` on a decoder,
whose layer is called `score`. The head applies to any position, so a prefix's score is the score at its last token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import ScoreHead

__all__ = ["BradleyTerryHead"]


class BradleyTerryHead(ScoreHead):
    """The linear score layer.

    Raises:
        ModelError: the model has no single-label score layer.
    """

    name = "bradley_terry"

    def __init__(self, model: PreTrainedModel) -> None:
        layer = getattr(model, "score", None)
        if not isinstance(layer, nn.Linear) or layer.out_features != 1:
            raise ModelError(
                f"{type(model).__name__} has no linear layer `score` with one output (num_labels = "
                f"{model.config.num_labels}); only single-label sequence classifiers on decoder models are served"
            )
        self._weight = layer.weight.detach().float()
        self._bias = None if layer.bias is None else layer.bias.detach().float()

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Rewards read at M positions."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self._weight, self._bias)[:, 0]
