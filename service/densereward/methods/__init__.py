"""Methods by name: how a sequence's reward is given to its tokens. One file each; see `base.Method`."""

from __future__ import annotations

from densereward.registry import Table

METHODS = Table(
    "method",
    {
        "red": "densereward.methods.red:Red",
        "abc": "densereward.methods.abc:AttentionBasedCredit",
        "uniform": "densereward.methods.uniform:Uniform",
        "sparse": "densereward.methods.sparse:Sparse",
        "weights": "densereward.methods.weights:Weights",
    },
)
