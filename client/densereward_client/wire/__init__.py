"""The request and the answer, defined once: the service imports this package, so the two cannot drift apart.

    requests.py    bodies of POST /token_rewards and /rewards
    answers.py     their answers, and errors
    catalogue.py   answers of GET /v1/models and /v1/methods
    arrays.py      lists of numbers, as JSON lists or as base64

Requests refuse unknown keys, because a misspelt field must not be ignored in silence. Answers accept them, so that an
older client can read a newer server.
"""

from .answers import (
    Error,
    ErrorBody,
    Objective,
    RewardsResponse,
    SampleReward,
    SampleTokenRewards,
    Segment,
    Timing,
    TokenRewardsResponse,
    Usage,
)
from .arrays import FloatArray, Spans, encode_base64
from .catalogue import EnsembleCard, MethodAvailability, MethodDescription, MethodList, ModelCard, ModelList, Precision
from .requests import Ensemble, Include, Message, MethodRequest, RewardsRequest, Sample, TokenRewardsRequest

__all__ = [
    "Ensemble",
    "EnsembleCard",
    "Error",
    "ErrorBody",
    "FloatArray",
    "Include",
    "Message",
    "MethodAvailability",
    "MethodDescription",
    "MethodList",
    "MethodRequest",
    "ModelCard",
    "ModelList",
    "Objective",
    "Precision",
    "RewardsRequest",
    "RewardsResponse",
    "Sample",
    "SampleReward",
    "SampleTokenRewards",
    "Segment",
    "Spans",
    "Timing",
    "TokenRewardsRequest",
    "TokenRewardsResponse",
    "Usage",
    "encode_base64",
]
