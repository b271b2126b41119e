"""Errors, grouped by what the caller can do about them.

```
DenseRewardError
├── ConnectionFailed        no answer: refused, reset, cut short                        (retried)
├── DeadlineExceeded        the total deadline passed while waiting for an answer
├── InvalidAnswer           a success whose content breaks the contract; it must not reach a trainer
└── StatusError             the server refused; carries status, code, message, details
    ├── BadRequest          400, 413, 422 and other 4xx: the request must change
    ├── Unauthorized        401, 403: no key, or the wrong one
    ├── NotFound            404: no such model, or not this server
    ├── Overloaded          429: the queue is full                                      (retried)
    ├── Unavailable         503: not ready, or draining                                 (retried)
    └── ServerFailure       500, 504 and all others: the server's side failed
```

A request that is wrong before it is sent raises `pydantic.ValidationError`, which is a `ValueError`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import ValidationError

from .wire import Error, ErrorBody

_BODY_SHOWN = 200  # characters of a foreign answer, enough to recognise a proxy's page


class DenseRewardError(Exception):
    """Every error that a call can raise once the request is sent."""


class ConnectionFailed(DenseRewardError):
    """No answer came back: the connection was refused, reset or cut short, in every attempt."""


class DeadlineExceeded(DenseRewardError):
    """The call's total deadline passed while the client waited for an answer."""


class InvalidAnswer(DenseRewardError):
    """The server reported success, but the content breaks the contract or does not fit the request."""


class StatusError(DenseRewardError):
    """The server answered with an error.

    Attributes:
        status: The HTTP status.
        code: The server's name for the error; "unknown" if the answer is not a densereward server's.
        message: What went wrong; the beginning of the body if the answer is not a densereward server's.
        details: Further facts, such as the index of the bad sample.
        retry_after: Seconds to wait, if the server gave a time.
    """

    def __init__(
        self, status: int, code: str, message: str, details: Mapping[str, Any], retry_after: float | None = None
    ) -> None:
        # All are arguments of the exception, so that it can be pickled between a trainer's processes.
        super().__init__(status, code, message, details, retry_after)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"


class BadRequest(StatusError):
    """The request must change before it can be served."""


class Unauthorized(StatusError):
    """The key is missing or wrong."""


class NotFound(StatusError):
    """The server has no such model, or is not a densereward server."""


class Overloaded(StatusError):
    """The server's queue is full."""


class Unavailable(StatusError):
    """The server is loading its model, or draining before it stops."""


class ServerFailure(StatusError):
    """The server failed, or reached its own deadline."""


_BY_STATUS: dict[int, type[StatusError]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    429: Overloaded,
    503: Unavailable,
}


def status_error(status: int, body: bytes, retry_after: str | None) -> StatusError:
    """The error for an unsuccessful answer; `retry_after` is the Retry-After header."""
    kind = _BY_STATUS.get(status, BadRequest if 400 <= status < 500 else ServerFailure)
    error = _read_error(body)
    return kind(status, error.code, error.message, error.details, _seconds(retry_after))


def beginning(body: bytes) -> str:
    """The start of a body as one quoted line, for a message."""
    return repr(body[: 4 * _BODY_SHOWN].decode(errors="replace")[:_BODY_SHOWN])


def _read_error(body: bytes) -> Error:
    try:
        return ErrorBody.model_validate_json(body).error
    except ValidationError:
        return Error(code="unknown", message=f"the answer is not densereward's, and begins {beginning(body)}")


def _seconds(header: str | None) -> float | None:
    """Retry-After as seconds; it is a number or a date, and None if neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
