"""Score heads by reward-model family: how a model's hidden states become rewards, and where they are read."""

from __future__ import annotations

from densereward.registry import Table

HEADS = Table(
    "head",
    {
        "bradley_terry": "densereward.heads.bradley_terry:BradleyTerryHead",
        "language_model": "densereward.heads.language_model:LanguageModelHead",
    },
)
