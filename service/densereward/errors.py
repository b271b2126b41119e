"""Everything that can go wrong on purpose. Each class carries the code and the HTTP status of the contract.

DenseRewardError
|-- InvalidRequest            422  a field, a length or an id that cannot be served
|   |-- MalformedJSON         400
|   |-- UnknownModel          404
|   |-- TooLarge              413  more than the server takes in one request
|   |-- TooLong               422  more tokens than the model reads; never truncated
|   `-- MethodUnavailable     422  the model or the engine cannot give what the method needs
|-- Unauthorized              401
|-- Overloaded                429  with Retry-After
|-- ClientGone                499  the caller left before the answer
|-- EngineFailure             500
|-- NotReady                  503  loading or draining, with Retry-After
|-- EngineDied                503  the engine's process ended, with Retry-After
|-- DeadlineExceeded          504
`-- ModelError                     at start-up: a model that would answer wrong numbers is not served
    `-- CannotPack                 its sequences would see each other if packed
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "CannotPack",
    "ClientGone",
    "DeadlineExceeded",
    "DenseRewardError",
    "EngineDied",
    "EngineFailure",
    "InvalidRequest",
    "MalformedJSON",
    "MethodUnavailable",
    "ModelError",
    "NotReady",
    "Overloaded",
    "TooLarge",
    "TooLong",
    "Unauthorized",
    "UnknownModel",
]


class DenseRewardError(Exception):
    """Base of all of them.

    Args:
        message: what went wrong and what to do next.
        code: a narrower code than the class's own.
        details: machine-readable facts: the sample's index, the field, the limit.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = code or type(self).code
        self.details = details

    def __str__(self) -> str:
        return self.message

    def as_error(self) -> dict[str, Any]:
        """The contract's error object."""
        return {"code": self.error_code, "message": self.message, "details": self.details}


class InvalidRequest(DenseRewardError):
    """The request cannot be served as it stands."""

    code = "invalid_request"
    status = 422


class MalformedJSON(InvalidRequest):
    """The body is not JSON."""

    code = "malformed_json"
    status = 400


class UnknownModel(InvalidRequest):
    """No such model is loaded."""

    code = "unknown_model"
    status = 404


class TooLarge(InvalidRequest):
    """The request holds more than the server takes at once."""

    code = "too_large"
    status = 413


class TooLong(InvalidRequest):
    """A sample holds more tokens than the model reads."""

    code = "too_long"


class MethodUnavailable(InvalidRequest):
    """The model or its engine cannot give what the method needs."""

    code = "method_unavailable"


class Unauthorized(DenseRewardError):
    """No key, or a wrong one."""

    code = "unauthorized"
    status = 401


class _TryLater(DenseRewardError):
    def __init__(self, message: str, *, retry_after: float, code: str | None = None, **details: Any) -> None:
        super().__init__(message, code=code, **details)
        self.retry_after = retry_after


class Overloaded(_TryLater):
    """The queue is full; `retry_after` (seconds) is when there should be room."""

    code = "overloaded"
    status = 429


class ClientGone(DenseRewardError):
    """The caller left before the answer was ready."""

    code = "client_gone"
    status = 499


class EngineFailure(DenseRewardError):
    """The forward pass failed, or gave a number that is not finite."""

    code = "engine_failure"


class NotReady(_TryLater):
    """The model is still loading, or the server is shutting down."""

    code = "not_ready"
    status = 503


class EngineDied(_TryLater):
    """The engine's process ended. The server ends too, and its supervisor starts another."""

    code = "engine_died"
    status = 503


class DeadlineExceeded(DenseRewardError):
    """The request's time ran out."""

    code = "deadline_exceeded"
    status = 504


class ModelError(DenseRewardError):
    """The model cannot be loaded, or would answer wrong numbers."""

    code = "model_error"


class CannotPack(ModelError):
    """In this model, sequences that are packed into one row would attend to each other."""
