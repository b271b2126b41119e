"""OpenAssistant's Pythia: one linear layer called `out_proj` on GPT-NeoX, read at the last token.

`pooling` in the config is `last` or `mean`. A mean over all positions cannot be packed: `engines.torch.unpacked` reads
it, and a prefix's score is the mean over the prefix.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint
from densereward.heads.layers import LayersHead

__all__ = ["PythiaHead"]


class PythiaHead(LayersHead):
    """The layer."""

    name = "pythia"
    families = "OpenAssistant Pythia"
    layer = "out_proj"

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """By the architecture, since other decoders have layers of that name, too."""
        return checkpoint.architecture == "GPTNeoXRewardModel"

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """GPT-NeoX with the layer on it."""
        if _pooling(checkpoint.config) not in ("last", "mean"):
            raise ModelError(f"pooling = {_pooling(checkpoint.config)!r}; this family has `last` and `mean`")
        return super().model_class(checkpoint)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if _pooling(model.config) == "mean":
            self.pooling = "mean"


def _pooling(config: Any) -> str:
    return getattr(config, "pooling", None) or "last"
