"""Lists of numbers on the wire: as JSON lists, or as base64 of little-endian values, which is smaller and quicker.

Both hold the same numbers. What a list must not hold is refused in base64 too, with the name of the field.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    StrictInt,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapSerializer,
    WrapValidator,
)

__all__ = ["BASE64", "FloatArray", "Ids", "Mask", "Numbers", "Spans", "encode_base64"]

BASE64 = "base64"
"""As the context of a dump: lists of 64 entries and more become base64."""

_SHORTEST = 64
"""Shorter lists are always sent as lists, which people can read."""

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Offset = Annotated[StrictInt, Field(ge=0)]


def encode_base64(array: NDArray[np.float32]) -> str:
    """Little-endian float32 bytes in base64, the convention of the embeddings APIs."""
    return _encode(array.astype("<f4"))


def _encode(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _decode(text: str, dtype: str) -> NDArray[Any]:
    kind = np.dtype(dtype)
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"neither a list nor base64 of little-endian {kind.name} values") from error


def _list_of_ids(values: NDArray[Any]) -> list[Any]:
    return list(values.tolist())


def _list_of_numbers(values: NDArray[Any]) -> list[Any]:
    for position in np.flatnonzero(~np.isfinite(values))[:1]:
        raise ValueError(f"entry {position} is not a finite number")
    return list(values.tolist())


def _list_of_zeros_and_ones(values: NDArray[Any]) -> list[Any]:
    for position in np.flatnonzero(values > 1)[:1]:
        raise ValueError(f"entry {position} is {values[position]}, and must be 0 or 1")
    return list(values.tolist())


def _list_of_pairs(values: NDArray[Any]) -> list[Any]:
    if len(values) % 2:
        raise ValueError(f"{len(values)} int32 values are no pairs of start and end")
    for position in np.flatnonzero(values < 0)[:1]:
        raise ValueError(f"span {position // 2} has the offset {values[position]}, which is below 0")
    return list(map(tuple, values.reshape(-1, 2).tolist()))


def _reader(dtype: str, checked_list: Callable[[NDArray[Any]], list[Any]]) -> WrapValidator:
    """Reads base64 into the list that it stands for; everything else follows the list's own rules."""

    def read(value: Any, as_list: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, str):
            return checked_list(_decode(value, dtype))
        return as_list(value.tolist() if hasattr(value, "tolist") else value)

    return WrapValidator(read)


def _writer(dtype: str) -> WrapSerializer:
    """Writes a list; or base64, if that was asked for and holds exactly the same numbers."""

    def write(values: Sequence[Any], as_list: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        if info.context != BASE64 or values is None or len(values) < _SHORTEST:
            return as_list(values)
        wide = np.asarray(values)
        if wide.dtype == object or wide.dtype == np.uint64:  # integers that do not fit into int64
            return as_list(values)
        with np.errstate(over="ignore"):
            narrow = wide.astype(dtype)
        return _encode(narrow) if np.array_equal(narrow, wide) else as_list(values)

    return WrapSerializer(write)


def _schema(items: dict[str, Any], values: str) -> WithJsonSchema:
    text = {"type": "string", "contentEncoding": "base64", "description": f"Little-endian {values}."}
    return WithJsonSchema({"anyOf": [{"type": "array", "items": items}, text]})


Ids = Annotated[list[StrictInt], _reader("<i4", _list_of_ids), _writer("<i4"), _schema({"type": "integer"}, "int32")]
"""Token ids: a list, or base64 of int32."""

Mask = Annotated[
    list[Literal[0, 1]],
    _reader("u1", _list_of_zeros_and_ones),
    _writer("u1"),
    _schema({"enum": [0, 1]}, "uint8, 0 or 1"),
]
"""Zeros and ones: a list, or base64 of uint8."""

Numbers = Annotated[
    list[_Number], _reader("<f4", _list_of_numbers), _writer("<f4"), _schema({"type": "number"}, "float32")
]
"""Finite numbers: a list, or base64 of float32."""

_PAIR = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}

Spans = Annotated[
    list[tuple[_Offset, _Offset]],
    _reader("<i4", _list_of_pairs),
    _writer("<i4"),
    _schema(_PAIR, "int32, start and end in turn"),
]
"""Pairs of offsets: a list of pairs, or base64 of int32, start and end in turn."""


def _float_array(value: str | Iterable[float] | NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        if isinstance(value, str):
            return _decode(value, "<f4").astype(np.float32)
        array = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError("neither a list of numbers nor base64 of little-endian float32 values") from error
    if array.ndim != 1:
        raise ValueError(f"{array.ndim} dimensions where there must be one")
    return array


FloatArray = Annotated[
    NDArray[np.float32],
    BeforeValidator(_float_array),
    PlainSerializer(lambda array: array.tolist(), return_type=list[float]),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}),
]
"""float32[T] in answers, whichever encoding they came in."""
