"""What travels between tokenization, the methods and the engines.

    needs      what a method asks of a forward pass                         filled by methods
    sequences  one sequence: its ids, where its response lies, its needs    filled by tokenization, read by engines
    results    what one forward pass gave for a sequence                    filled by engines, read by methods

Shapes: S tokens in a sequence (prompt, response, closing tokens), T tokens in its response.
"""

from __future__ import annotations

from densereward.capture.needs import (
    PREFIX_MODES,
    AttentionRow,
    Contributions,
    Gradients,
    LogProbabilities,
    LogRatios,
    Need,
    Objectives,
    PrefixMode,
    PrefixScores,
    ReceivedAttention,
    StepScores,
    Variants,
)
from densereward.capture.results import Captured, Prefixes
from densereward.capture.sequences import ScoringInput, Span, Steps, missing_closing

__all__ = [
    "PREFIX_MODES",
    "AttentionRow",
    "Captured",
    "Contributions",
    "Gradients",
    "LogProbabilities",
    "LogRatios",
    "Need",
    "Objectives",
    "PrefixMode",
    "PrefixScores",
    "Prefixes",
    "ReceivedAttention",
    "ScoringInput",
    "Span",
    "StepScores",
    "Steps",
    "Variants",
    "missing_closing",
]
