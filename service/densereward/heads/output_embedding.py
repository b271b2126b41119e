"""Reward models that are language models to look at: their score is made of rows of the output embedding.

Nothing in the config tells such a model from a language model, so it is named by the operator.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, ScoreHead

__all__ = ["OutputEmbeddingHead"]


class OutputEmbeddingHead(ScoreHead):
    """Finds the output embedding.

    Attributes:
        wanted: the output embedding it must have, in words.

    Raises:
        ModelError: the model has none, or none of that kind.
    """

    wanted: ClassVar[str]

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:  # noqa: ARG003
        """Never: it looks like a language model."""
        return False

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:  # noqa: ARG003
        """Transformers' own."""
        return AutoModelForCausalLM

    @classmethod
    def holds(cls, layer: Any) -> bool:  # noqa: ARG003
        """Whether an output embedding is of the kind that is wanted."""
        return True

    def __init__(self, model: PreTrainedModel) -> None:
        layer: Any = model.get_output_embeddings()
        if layer is None or not self.holds(layer):
            raise ModelError(f"{type(model).__name__} has no {self.wanted}")
        self._layer = layer
