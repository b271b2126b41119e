"""Lists as base64: the same numbers as JSON lists, and errors that name the field."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from densereward_client.wire import Sample
from densereward_client.wire.arrays import BASE64

IDS = {"prompt": "", "response_token_ids": [5]}


def _base64(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


@st.composite
def _samples(draw: st.DrawFn) -> dict[str, Any]:
    """Lists on both sides of the shortest that is sent in base64."""
    count = draw(st.sampled_from([0, 1, 63, 64, 65, 200]))
    offsets = st.tuples(st.integers(0, 2**33), st.integers(0, 2**31 - 1))

    def of(each: Any) -> Any:
        return draw(st.lists(each, min_size=count, max_size=count))

    numbers = st.sampled_from([st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-1e300, 1e300)])
    text = {"prompt": "p", "response": "r", "response_spans": of(offsets)}
    sample: dict[str, Any] = draw(
        st.sampled_from([text, {"prompt_token_ids": of(st.integers(-(2**70), 2**70)), "response": "r"}])
    )
    return sample | {
        "response_mask": of(st.integers(0, 1)),
        "weights": of(draw(numbers)),
        "token_entropies": [0.5] * 64,
    }


@given(sample=_samples())
def test_what_is_sent_in_base64_is_read_as_the_same_numbers(sample: dict[str, Any]) -> None:
    original = Sample.model_validate(sample)
    sent = original.model_dump_json(exclude_unset=True, context=BASE64)
    assert Sample.model_validate_json(sent) == original
    assert isinstance(json.loads(sent)["token_entropies"], str)
    assert isinstance(json.loads(sent)["response_mask"], str) is (len(sample["response_mask"]) >= 64)


@given(ids=st.lists(st.integers(-(2**31), 2**31 - 1)), spans=st.lists(st.tuples(*[st.integers(0, 2**31 - 1)] * 2)))
def test_any_length_may_come_in_base64(ids: list[int], spans: list[tuple[int, int]]) -> None:
    assert Sample.model_validate({"prompt": "", "response_token_ids": _base64(ids, "<i4")}).response_token_ids == ids
    text = {"prompt": "", "response": "", "response_spans": _base64(spans, "<i4")}
    assert Sample.model_validate(text).response_spans == spans


def test_numbers_that_float32_does_not_hold_are_sent_as_a_list() -> None:
    sample = Sample.model_validate(IDS | {"weights": [0.1] * 64, "token_entropies": [0.25] * 64})
    sent = json.loads(sample.model_dump_json(exclude_unset=True, context=BASE64))
    assert sent["weights"] == [0.1] * 64
    assert sent["token_entropies"] == _base64([0.25] * 64, "<f4")


NOT_BASE64 = "neither a list nor base64 of little-endian {} values"
BAD = [
    ("response_token_ids", "not base64", NOT_BASE64.format("int32")),
    ("response_token_ids", "é" * 8, NOT_BASE64.format("int32")),
    ("response_token_ids", _base64([1, 2, 3], "u1"), NOT_BASE64.format("int32")),
    ("response_mask", "11111", NOT_BASE64.format("uint8")),
    ("response_mask", _base64([1, 0, 2], "u1"), "entry 2 is 2, and must be 0 or 1"),
    ("weights", _base64([1, 2], "<f2") + "AAA=", NOT_BASE64.format("float32")),
    ("weights", _base64([1, np.nan], "<f4"), "entry 1 is not a finite number"),
    ("token_entropies", _base64([np.inf], "<f4"), "entry 0 is not a finite number"),
    ("response_spans", _base64([0, 1, 2], "<i4"), "3 int32 values are no pairs of start and end"),
    ("response_spans", _base64([0, 1, -2, 3], "<i4"), "span 1 has the offset -2, which is below 0"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD)
def test_what_the_bytes_may_not_hold_is_refused_by_the_fields_name(field: str, value: str, message: str) -> None:
    sample = {"prompt": "", "response": "r"} if field == "response_spans" else IDS
    with pytest.raises(ValidationError) as refused:
        Sample.model_validate(sample | {field: value})
    [error] = refused.value.errors()
    assert error["loc"] == (field,)
    assert error["msg"].removeprefix("Value error, ") == message


@pytest.mark.parametrize("value", [[True], [1.5], ["1"], [None], 3, {}, b"AAAA"])
def test_lists_are_read_as_strictly_as_ever(value: Any) -> None:
    with pytest.raises(ValidationError):
        Sample.model_validate({"prompt": "", "response_token_ids": value})
