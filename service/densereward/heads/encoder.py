"""Bidirectional sequence classifiers with one label, which read prompt and response as a pair of texts.

OpenAssistant's DeBERTa and others. The model itself computes its label from the whole text, so there is nothing here to
read at a position. Every token attends to all later ones, so a prefix is another text, scored in a pass of its own.
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
    """The model's own label of a whole text."""

    name = "encoder"
    families = (
        "OpenAssistant DeBERTa, and other encoders (BERT, RoBERTa, XLM-RoBERTa, ELECTRA, ALBERT, DistilBERT, "
        "ModernBERT) with one label"
    )
    pooling = "text"

    @classmethod
    def fits(cls, checkpoint: Checkpoint) -> bool:
        """A sequence classifier on a model of a kind that is trained on masked words."""
        config = checkpoint.config
        is_masked_model = type(config) in MODEL_FOR_MASKED_LM_MAPPING
        return is_masked_model and checkpoint.architecture.endswith("ForSequenceClassification")

    @classmethod
    def model_class(cls, checkpoint: Checkpoint) -> Any:
        """Transformers' own sequence classifier."""
        kind = checkpoint.config.model_type
        if kind not in _TRIED:  # some attend to parts of the text alone, or switch their attention with its length
            raise ModelError(f"{kind} was not tried as an encoder of pairs; {', '.join(_TRIED)} were")
        refuse_several_labels(checkpoint.config)
        return AutoModelForSequenceClassification

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is taken from the model, which computes its score itself."""
