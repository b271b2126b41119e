"""INF-ORM and Qwen2.5-Math-RM: Linear, ReLU, Linear with one output, called `score`, read at the last token."""

from __future__ import annotations

from densereward.heads.base import Checkpoint
from densereward.heads.layers import LayersHead

__all__ = ["MlpHead"]


class MlpHead(LayersHead):
    """The two layers."""

    name = "mlp"
    families = "INF-ORM, Qwen2.5-Math-RM"
    layer = "score"
    places = (0, 2)
    bias = True

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """There are layers behind the first."""
        return checkpoint.holds("score.0.weight")
