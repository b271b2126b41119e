"""A thin client for the densereward reward-model server: httpx, pydantic and numpy, never torch.

_client.py         Client and AsyncClient: the loops that send a call, and the calls' documentation
_call.py           what each call sends, and how its answer is read
_attempts.py       retries, pauses and the deadline of a call
_checks.py         whether an answer fits its request
_errors.py         the tree of errors
_bound_client.py   BoundClient and AsyncBoundClient: calls in a policy's own tokens
binding/           a policy's ids on the way to the reward model, and rewards on the way back
tokens.py          the bytes that each token of a tokenizer writes
wire/              the request and the answer; the service imports it too
tensors.py         an answer as padded arrays, [B, T]
advantages.py      token rewards in the advantages of a group baseline
trainers/          adapters for RL trainers
"""

from ._bound_client import AsyncBoundClient, BoundClient
from ._client import AsyncClient, Client
from ._errors import (
    BadRequest,
    ConnectionFailed,
    DeadlineExceeded,
    DenseRewardError,
    InvalidAnswer,
    NotFound,
    Overloaded,
    ServerFailure,
    StatusError,
    Unauthorized,
    Unavailable,
)
from .binding import Binding
from .tensors import Padded, to_padded
from .wire import (
    Error,
    Include,
    Message,
    MethodAvailability,
    MethodRequest,
    ModelCard,
    ModelList,
    RewardsResponse,
    Sample,
    SampleReward,
    SampleTokenRewards,
    Timing,
    TokenRewardsResponse,
    Usage,
)

__all__ = [
    "AsyncBoundClient",
    "AsyncClient",
    "BadRequest",
    "Binding",
    "BoundClient",
    "Client",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DenseRewardError",
    "Error",
    "Include",
    "InvalidAnswer",
    "Message",
    "MethodAvailability",
    "MethodRequest",
    "ModelCard",
    "ModelList",
    "NotFound",
    "Overloaded",
    "Padded",
    "RewardsResponse",
    "Sample",
    "SampleReward",
    "SampleTokenRewards",
    "ServerFailure",
    "StatusError",
    "Timing",
    "TokenRewardsResponse",
    "Unauthorized",
    "Unavailable",
    "Usage",
    "to_padded",
]
