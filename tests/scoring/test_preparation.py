"""A sample made ready for the engine: its slots, and what is refused before anything is queued."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from densereward.errors import InvalidRequest
from densereward.scoring.preparation import PreparedSample, prepare_sample
from densereward.tokenization.align import Aligner
from densereward_client.wire import Sample

ALIGNER = Aligner(tiny.make_tokenizer(), 256, 320)


def prepared(**sample: Any) -> PreparedSample:
    return prepare_sample(Sample(**sample), [], frozenset(), ALIGNER, truncate=False, reencodes=False, limit=1000)


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        ({"prompt_token_ids": [5], "response_token_ids": [5, 6], "response_mask": [1]}, "length_mismatch"),
        ({"prompt_token_ids": [5], "response_token_ids": [5, 6], "response_mask": [0, 0]}, "empty_mask"),
        ({"prompt": "", "response": "ab", "response_spans": [(0, 3)]}, "invalid_spans"),
    ],
)
def test_lists_that_name_the_trainers_tokens_wrongly_are_refused_with_their_code(
    sample: dict[str, Any], code: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        prepared(**sample)
    assert refused.value.error_code == code
    assert refused.value.status == 422


def test_an_empty_response_may_bring_empty_spans() -> None:
    assert prepared(prompt="Why?", response="", response_spans=[]).slots.count == 0


def test_an_empty_response_may_bring_an_empty_mask() -> None:
    assert prepared(prompt="Why?", response="", response_mask=[]).slots.count == 0
