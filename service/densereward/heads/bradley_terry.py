"""Sequence classifiers with one label: one linear layer, read at the last token of the sequence.

Skywork-Reward, FsfairX, TRL's RewardTrainer, the embedded default model: `*ForSequenceClassification` on a decoder,
whose layer is called `score`. The head applies to any position, so a prefix's score is the score at its last token.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, PositionHead, in_float32, refuse_several_labels

__all__ = ["BradleyTerryHead"]


class BradleyTerryHead(PositionHead):
    """The linear score layer.

    Raises:
        ModelError: the model has no single-label score layer.
    """

    name = "bradley_terry"
    families = "Sequence classifiers with one label: Skywork-Reward (V2), FsfairX, TRL's `RewardTrainer`"

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The architecture is a sequence classifier."""
        return checkpoint.architecture.endswith("ForSequenceClassification")

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """Transformers' own sequence classifier."""
        refuse_several_labels(checkpoint.config)
        return AutoModelForSequenceClassification

    def __init__(self, model: PreTrainedModel) -> None:
        layer = getattr(model, "score", None)
        if not isinstance(layer, nn.Linear) or layer.out_features != 1:
            raise ModelError(
                f"{type(model).__name__} has no linear layer `score` with one output (num_labels = "
                f"{model.config.num_labels}); only single-label sequence classifiers on decoder models are served"
            )
        self._layer = layer

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """Rewards at M positions."""
        return in_float32(self._layer, hidden)[:, 0]
