"""Bidirectional sequence classifiers with one label, which read prompt and response as a pair of texts.

OpenAssistant's DeBERTa and its like: whatever the model does between its encoder and its label is its own. A prefix of
a response is another text to them, since every token looks at all that follow; so each is scored in a pass of its own.
"""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForSequenceClassification, PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.base import Checkpoint, ScoreHead, refuse_several_labels

__all__ = ["EncoderHead"]


_TRIED = (
    "albert",
    "bert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "roberta",
    "xlm-roberta",
)


class EncoderHead(ScoreHead):
    """The model's own, whole texts at a time."""

    name = "encoder"
    families = (
        "OpenAssistant DeBERTa, and other encoders (BERT, RoBERTa, XLM-RoBERTa, ELECTRA, ALBERT, DistilBERT, "
        "ModernBERT) with one label"
    )
    pooling = "text"

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """A sequence classifier on what is otherwise trained to fill in masked words."""
        config = checkpoint.config
        fills_in = type(config) in MODEL_FOR_MASKED_LM_MAPPING
        return fills_in and checkpoint.architecture.endswith("ForSequenceClassification")

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """Transformers' own."""
        kind = checkpoint.config.model_type
        if kind not in _TRIED:  # some attend to a part of the text alone, or change their ways with its length
            raise ModelError(f"{kind} was not tried as an encoder of pairs; {', '.join(_TRIED)} were")
        refuse_several_labels(checkpoint.config)
        return AutoModelForSequenceClassification

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is taken from the model, which computes its score itself."""
