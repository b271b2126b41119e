"""Heads by reward-model family: how a checkpoint is recognised, what is loaded, and how hidden states become scores.

What a checkpoint goes through:

    head_for           the first head in the table that fits the checkpoint's config and weight names
    base               what a head is: ScoreHead (recognised, loaded, described), DecoderHead (read from hidden states),
                       PositionHead (read from one position's hidden state)
    layers             heads of linear layers on a decoder, and the model class that loads them
    output_embedding   heads that read rows of a language model's output embedding
    products           float32 matrix products, also for the engines

    bradley_terry, openrlhf, beaver, regression, pythia, value_head, v_head, mlp, internlm2, nemotron
                                                        one score of a sequence
    urm, gated                                          a weighted sum of objectives
    process, step_value, math_shepherd, token_classifier    a score of a step or a token
    encoder                                             the model's own label of a pair of texts
    language_model                                      log-probabilities; in no table, since it is no reward model

A new family is one file here and one row of the table.
"""

from __future__ import annotations

from typing import Any

from densereward.errors import ModelError
from densereward.registry import Table

__all__ = ["HEADS", "head_for"]

HEADS = Table(
    "head",
    {
        "internlm2": "densereward.heads.internlm2:InternLM2Head",
        "urm": "densereward.heads.urm:UrmHead",
        "step_value": "densereward.heads.step_value:StepValueHead",
        "process": "densereward.heads.process:ProcessHead",
        "token_classifier": "densereward.heads.token_classifier:TokenClassifierHead",
        "gated": "densereward.heads.gated:GatedHead",
        "openrlhf": "densereward.heads.openrlhf:OpenRlhfHead",
        "beaver": "densereward.heads.beaver:BeaverHead",
        "regression": "densereward.heads.regression:RegressionHead",
        "pythia": "densereward.heads.pythia:PythiaHead",
        "value_head": "densereward.heads.value_head:ValueHead",
        "v_head": "densereward.heads.v_head:VHead",
        "mlp": "densereward.heads.mlp:MlpHead",
        "math_shepherd": "densereward.heads.math_shepherd:MathShepherdHead",
        "nemotron": "densereward.heads.nemotron:NemotronHead",
        "encoder": "densereward.heads.encoder:EncoderHead",
        "bradley_terry": "densereward.heads.bradley_terry:BradleyTerryHead",
    },
)
"""Heads of reward models. The first that fits a checkpoint reads it, so the most specific come first."""


def head_for(checkpoint: Any, named: str | None = None) -> Any:
    """The class of the first head that fits a checkpoint (`heads.base.Checkpoint`).

    Args:
        checkpoint: what is known of the model.
        named: the head to take where none fits.

    Raises:
        ModelError: there is none.
    """
    for name in HEADS:
        if HEADS[name].fits(checkpoint):
            return HEADS[name]
    if named is not None:
        return HEADS[named]
    if "Pair" in checkpoint.architecture:
        raise ModelError(f"{checkpoint.architecture} compares two responses and has no score for one")
    if checkpoint.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{checkpoint.architecture} is a language model without a score head; two of them are a reward model as "
            "--pair policy=SOURCE,reference=SOURCE (one that writes its judgement as text cannot be served)"
        )
    raise ModelError(
        f"{checkpoint.architecture or 'a config without architectures'} is of no family that is known here"
    )
