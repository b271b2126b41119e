"""What pydantic found wrong, as one line and as an error of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from densereward.errors import InvalidRequest

__all__ = ["invalid", "problems_of", "told"]

_SHOWN = 3


def problems_of(error: ValidationError) -> list[ErrorDetails]:
    """The problems without the input, which may be large or secret."""
    return error.errors(include_url=False, include_context=False, include_input=False)


def told(problems: Sequence[ErrorDetails], inside: int = 0) -> str:
    """`field: what is wrong` of the first few; `inside` parts of every location are known to the reader."""
    lines = [_line(problem, inside) for problem in problems[:_SHOWN]]
    more = len(problems) - len(lines)
    return "; ".join([*lines, f"and {more} more"] if more else lines)


def invalid(problems: Sequence[ErrorDetails], inside: int = 0, sample: Any = None) -> InvalidRequest:
    """The problems as an error that names the first field, and the sample's id where the problems are a sample's."""
    details: dict[str, Any] = {}
    if field := problems[0]["loc"][inside:]:
        details["field"] = field[0]
    if isinstance(sample, dict) and isinstance(sample.get("id"), str):
        details["id"] = sample["id"]
    return InvalidRequest(told(problems, inside), **details)


def _line(problem: ErrorDetails, inside: int) -> str:
    field = ".".join(map(str, problem["loc"][inside:]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
