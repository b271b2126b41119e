"""Methods by name: how a sequence's reward is given to its tokens. One file each; see `base.Method`."""

from __future__ import annotations

from densereward.registry import Table

METHODS = Table(
    "method",
    {
        "red": "densereward.methods.red:Red",
        "sentence": "densereward.methods.sentence:Sentence",
        "message": "densereward.methods.message:Message",
        "segment": "densereward.methods.segment:Segments",
        "abc": "densereward.methods.abc:AttentionBasedCredit",
        "contribution": "densereward.methods.contribution:Contribution",
        "future_attention": "densereward.methods.future_attention:FutureAttention",
        "attribution": "densereward.methods.attribution:Attribution",
        "occlusion": "densereward.methods.occlusion:Occlusion",
        "shapley": "densereward.methods.shapley:Shapley",
        "steps": "densereward.methods.steps:StepRewards",
        "implicit": "densereward.methods.implicit:Implicit",
        "contrastive": "densereward.methods.contrastive:Contrastive",
        "uniform": "densereward.methods.uniform:Uniform",
        "sparse": "densereward.methods.sparse:Sparse",
        "weights": "densereward.methods.weights:Weights",
    },
)
