"""Reward models that are language models to look at: their score is made of rows of the output embedding.

Nothing in the config tells such a model from a language model, so it is named by the operator.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, PositionHead

__all__ = ["OutputEmbeddingHead", "output_embedding"]


def output_embedding(model: PreTrainedModel, needed: str) -> Any:
    """A model's output embedding: `weight` [V, E] and `bias` [V], or None.

    Args:
        model: the model.
        needed: what the caller needs, for the message where there is none.

    Raises:
        ModelError: there is none.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no {needed}")
    return layer


class OutputEmbeddingHead(PositionHead):
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
        self._layer = output_embedding(model, self.wanted)
        if not self.holds(self._layer):
            raise ModelError(f"{type(model).__name__} has no {self.wanted}")
