"""Heads by reward-model family: how hidden states become rewards, where they are read, and what is loaded for that."""

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
"""Of reward models, in the order in which they are asked whether they fit: what marks a family most comes first."""


def head_for(checkpoint: Any, named: str | None = None) -> Any:
    """The class of the first head that fits a checkpoint (`heads.base.Checkpoint`).

    Args:
        checkpoint: what is known of the model.
        named: the head of models that none fits.

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
