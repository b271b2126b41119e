"""Arrays as they travel: a list of numbers, or base64 of little-endian values, which is smaller and quicker to read.

Both say the same numbers. What a list may not hold is refused in base64 too, by the name of the field.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    StrictInt,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapSerializer,
    WrapValidator,
)

__all__ = ["COMPACT", "Ids", "Mask", "Numbers", "Spans", "decode_base64", "encode_base64"]

COMPACT = "base64"
"""As the context of a dump: long lists become base64."""

_SHORTEST = 64
"""Entries from which on a list is sent in base64; a shorter one stays legible."""

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Offset = Annotated[StrictInt, Field(ge=0)]
_T = TypeVar("_T")
_Check = Callable[[NDArray[Any]], NDArray[Any]]


def encode_base64(array: NDArray[np.float32]) -> str:
    """Little-endian float32 bytes in base64, the convention of the embeddings APIs."""
    return _encode(array.astype("<f4"))


def decode_base64(text: str, dtype: str) -> NDArray[Any]:
    """The little-endian values in base64.

    Raises:
        ValueError: no base64, or no whole number of values.
    """
    kind = np.dtype(dtype)
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"neither a list nor base64 of little-endian {kind.name} values") from error


def _encode(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    for position in np.flatnonzero(~np.isfinite(values))[:1]:
        raise ValueError(f"entry {position} is not a finite number")
    return values


def _zeros_and_ones(values: NDArray[Any]) -> NDArray[Any]:
    for position in np.flatnonzero(values > 1)[:1]:
        raise ValueError(f"entry {position} is {values[position]}, and must be 0 or 1")
    return values


def _pairs(values: NDArray[Any]) -> NDArray[Any]:
    if len(values) % 2:
        raise ValueError(f"{len(values)} int32 values are no pairs of start and end")
    for position in np.flatnonzero(values < 0)[:1]:
        raise ValueError(f"span {position // 2} has the offset {values[position]}, which is below 0")
    return values.reshape(-1, 2)


def _read(dtype: str, check: _Check) -> WrapValidator:
    """Of base64, its values as the list would hold them; of anything else, what the list's own rules make of it."""

    def read(value: Any, as_list: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, str):
            return as_list(value.tolist() if hasattr(value, "tolist") else value)
        values = check(decode_base64(value, dtype)).tolist()
        return list(map(tuple, values)) if check is _pairs else values

    return WrapValidator(read)


def _write(dtype: str) -> WrapSerializer:
    """A list, or base64 where that was asked for and holds exactly the same numbers."""

    def write(values: Sequence[Any], as_list: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        if info.context != COMPACT or values is None or len(values) < _SHORTEST:
            return as_list(values)
        wide = np.asarray(values)
        if wide.dtype == object or wide.dtype == np.uint64:  # integers that no narrower type holds
            return as_list(values)
        with np.errstate(over="ignore"):
            narrow = wide.astype(dtype)
        return _encode(narrow) if np.array_equal(narrow, wide) else as_list(values)

    return WrapSerializer(write)


def _schema(items: dict[str, Any], values: str) -> WithJsonSchema:
    text = {"type": "string", "contentEncoding": "base64", "description": f"Little-endian {values}."}
    return WithJsonSchema({"anyOf": [{"type": "array", "items": items}, text]})


def _as_it_is(values: NDArray[Any]) -> NDArray[Any]:
    return values


_PAIR = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}

Ids = Annotated[list[StrictInt], _read("<i4", _as_it_is), _write("<i4"), _schema({"type": "integer"}, "int32")]
"""Token ids: a list, or base64 of int32."""

Mask = Annotated[
    list[Literal[0, 1]], _read("u1", _zeros_and_ones), _write("u1"), _schema({"enum": [0, 1]}, "uint8, 0 or 1")
]
"""Zeros and ones: a list, or base64 of uint8."""

Numbers = Annotated[list[_Number], _read("<f4", _finite), _write("<f4"), _schema({"type": "number"}, "float32")]
"""Finite numbers: a list, or base64 of float32."""

Spans = Annotated[
    list[tuple[_Offset, _Offset]], _read("<i4", _pairs), _write("<i4"), _schema(_PAIR, "int32, start and end in turn")
]
"""Pairs of offsets: a list of pairs, or base64 of int32, start and end in turn."""
