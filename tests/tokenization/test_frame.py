"""What stands round a prompt and a response, read from a tokenizer and its template."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

import tiny
from densereward.errors import ModelError
from densereward.tokenization.frame import Frame
from densereward.tokenization.vocabulary import Vocabulary

END, NEWLINE = 2, 201


def frame_of(tokenizer: Any, vocabulary_size: int = 320, **read: Any) -> Frame:
    return Frame(tokenizer, Vocabulary(tokenizer), vocabulary_size, **read)


@pytest.mark.parametrize(
    ("response", "missing"),
    [
        ([7, END], [NEWLINE]),
        ([7, END, NEWLINE], []),
        ([7, NEWLINE], [END, NEWLINE]),
        ([END], [NEWLINE]),
        ([7, END, END], [NEWLINE]),
    ],
)
def test_closing_tokens_that_are_there_are_not_given_twice(response: list[int], missing: list[int]) -> None:
    assert list(frame_of(tiny.make_tokenizer()).closing_behind(response, finished=True)) == missing


def test_a_response_that_was_cut_by_length_gets_only_what_is_written_behind_all() -> None:
    tokenizer = tiny.make_tokenizer()
    assert not frame_of(tokenizer).closing_behind([7], finished=False)
    scored = frame_of(tokenizer, score_token=9)
    assert list(scored.closing_behind([7], finished=False)) == [9]
    assert list(scored.closing_behind([7], finished=True)) == [END, NEWLINE, 9]
    assert not scored.closes_all


def test_without_a_template_the_tokenizers_own_end_closes_a_response() -> None:
    tokenizer = tiny.make_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", END)]
    )
    frame = frame_of(tokenizer)
    assert frame.closing_ids == [END]
    assert list(frame.closing_behind([7], finished=True)) == [END]
    assert frame.template is None


def test_where_only_steps_are_read_nothing_closes_a_response() -> None:
    frame = frame_of(tiny.make_tokenizer(), unit="step")
    assert (frame.closing_ids, frame.template_closing_ids) == ([], [END, NEWLINE])
    assert not frame.closing_behind([7], finished=True)


def test_closing_tokens_that_the_model_does_not_have_are_another_models() -> None:
    with pytest.raises(ModelError, match="another model's tokenizer"):
        frame_of(tiny.make_tokenizer(), vocabulary_size=200)


def test_a_template_that_writes_bos_keeps_its_closing_tokens() -> None:
    frame = frame_of(tiny.make_tokenizer(adds_bos=True, template="<|bos|>" + tiny.CHATML))
    assert (frame.prefix_ids, frame.closing_ids) == ([0], [END, NEWLINE])
