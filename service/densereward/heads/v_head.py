"""Starling-RM: one linear layer without a bias, called `v_head`, on a decoder whose weights are under `transformer`.

Starling reads its score at the token before the first padding token: the last token of the sequence.
"""

from __future__ import annotations

from densereward.heads.layers import LayersHead

__all__ = ["VHead"]


class VHead(LayersHead):
    """The layer."""

    name = "v_head"
    families = "Starling-RM"
    layer = "v_head"
    renamed = ((r"^transformer\.(?=embed_tokens|layers|norm)", "model."),)
