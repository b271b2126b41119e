"""UltraRM and Eurus-RM: one linear layer without a bias, called `regression_head`, read at the last token."""

from __future__ import annotations

from densereward.heads.layers import LayersHead

__all__ = ["RegressionHead"]


class RegressionHead(LayersHead):
    """The layer."""

    name = "regression"
    families = "UltraRM, Eurus-RM"
    layer = "regression_head"
    bias = False
