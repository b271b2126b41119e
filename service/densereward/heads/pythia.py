"""OpenAssistant's Pythia: one linear layer called `out_proj` on GPT-NeoX, read at the last token.

`pooling` in the config is `last` or `mean`. A mean over all positions is no score at one, so `mean` is refused.
"""

from __future__ import annotations

from typing import Any

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, LayersHead

__all__ = ["PythiaHead"]


class PythiaHead(LayersHead):
    """The layer."""

    name = "pythia"
    families = "OpenAssistant Pythia (`pooling` = `last`)"
    layer = "out_proj"

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """The architecture says so; other decoders have layers of that name, too."""
        return checkpoint.architecture == "GPTNeoXRewardModel"

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """GPT-NeoX with the layer on it."""
        pooling = getattr(checkpoint.config, "pooling", None) or "last"
        if pooling != "last":
            raise ModelError(f"pooling = {pooling!r} makes one score of all positions; only `last` is served")
        return super().model_class(checkpoint)
