"""Heads by reward-model family: how hidden states become rewards, where they are read, and what is loaded for that."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from densereward.registry import Table

__all__ = ["ARCHITECTURES", "HEADS", "head_for"]

HEADS = Table(
    "head",
    {
        "bradley_terry": "densereward.heads.bradley_terry:BradleyTerryHead",
        "token_classifier": "densereward.heads.token_classifier:TokenClassifierHead",
        "process": "densereward.heads.process:ProcessHead",
        "language_model": "densereward.heads.language_model:LanguageModelHead",
    },
)

ARCHITECTURES = {
    "*ForProcessRewardModel": "process",
    "*ForTokenClassification": "token_classifier",
    "*ForSequenceClassification": "bradley_terry",
}
"""The head that a reward model's architecture has, as its config names it; the first that fits."""


def head_for(architecture: str) -> Any:
    """The head's class; that of sequence classifiers, which refuses what it cannot read, where nothing fits."""
    fitting = (name for pattern, name in ARCHITECTURES.items() if fnmatchcase(architecture, pattern))
    return HEADS[next(fitting, "bradley_terry")]
