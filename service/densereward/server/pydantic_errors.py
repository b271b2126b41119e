"""Pydantic's errors, as one line of text and as an `InvalidRequest`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from densereward.errors import InvalidRequest

__all__ = ["describe_errors", "errors_in", "invalid_request"]

_SHOWN = 3


def errors_in(error: ValidationError) -> list[ErrorDetails]:
    """The errors without the input, which may be large or secret."""
    return error.errors(include_url=False, include_context=False, include_input=False)


def describe_errors(errors: Sequence[ErrorDetails], inside: int = 0) -> str:
    """`field: what is wrong` of the first few; `inside` parts of every location are known to the reader."""
    lines = [_line(error, inside) for error in errors[:_SHOWN]]
    more = len(errors) - len(lines)
    return "; ".join([*lines, f"and {more} more"] if more else lines)


def invalid_request(errors: Sequence[ErrorDetails], inside: int = 0, sample: Any = None) -> InvalidRequest:
    """The errors as an error that names the first field, and the sample's id where the errors are a sample's."""
    details: dict[str, Any] = {}
    if field := errors[0]["loc"][inside:]:
        details["field"] = field[0]
    if isinstance(sample, dict) and isinstance(sample.get("id"), str):
        details["id"] = sample["id"]
    return InvalidRequest(describe_errors(errors, inside), **details)


def _line(error: ErrorDetails, inside: int) -> str:
    field = ".".join(map(str, error["loc"][inside:]))
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
