"""Token classifiers: one linear layer, read at every token of the response, or at the end of each step.

TLCR (arXiv 2407.16574) trains one to tell good tokens from bad ones. TRL's PRMTrainer trains one on steps, each judged
at the separator after it (`--step-separator`). A single label is the score itself; of two labels, the score is the
probability of the good one (`good_label`).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, PositionHead, good_label, in_float32

__all__ = ["TokenClassifierHead"]


class TokenClassifierHead(PositionHead):
    """The linear layer of a token classifier with one label or two.

    Raises:
        ModelError: there is no such layer.
    """

    name = "token_classifier"
    families = "Token classifiers with one or two labels: TRL's `PRMTrainer` (with `--step-separator`), TLCR"
    unit = "token"

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The architecture is a token classifier."""
        return checkpoint.architecture.endswith("ForTokenClassification")

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """Transformers' own token classifier."""
        labels = checkpoint.config.num_labels
        if labels not in (1, 2):
            raise ModelError(f"num_labels = {labels}; a reward model that scores tokens has 1 or 2")
        return AutoModelForTokenClassification

    def __init__(self, model: PreTrainedModel) -> None:
        layer = getattr(model, "score", None) or getattr(model, "classifier", None)
        if not isinstance(layer, nn.Linear) or layer.out_features != model.config.num_labels:
            raise ModelError(f"{type(model).__name__} has no linear layer `score` or `classifier` for its labels")
        self._layer = layer
        self._good = good_label(model.config) if layer.out_features == 2 else None

    def scores(self, hidden: Float[Tensor, "M E"]) -> Float32[Tensor, " M"]:
        """The single label's output, or the probability of the good label of two."""
        logits = in_float32(self._layer, hidden)
        return logits[:, 0] if self._good is None else logits.softmax(dim=1)[:, self._good]
