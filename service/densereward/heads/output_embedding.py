"""Reward models in the form of a language model: their score is made of rows of the output embedding.

Nothing in the config tells such a model from a language model, so the operator names the head (`--head`).
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
    """A head that reads rows of the output embedding.

    Attributes:
        needed: the output embedding that the model must have, in words.

    Raises:
        ModelError: the model has none, or another one.
    """

    needed: ClassVar[str]

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:  # noqa: ARG003
        """Never: nothing in a checkpoint says so."""
        return False

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:  # noqa: ARG003
        """Transformers' own language model."""
        return AutoModelForCausalLM

    @classmethod
    def suits(cls, layer: Any) -> bool:  # noqa: ARG003
        """Whether an output embedding has the rows that are read."""
        return True

    def __init__(self, model: PreTrainedModel) -> None:
        self._layer = output_embedding(model, self.needed)
        if not self.suits(self._layer):
            raise ModelError(f"{type(model).__name__} has no {self.needed}")
