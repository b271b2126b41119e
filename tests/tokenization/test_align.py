"""From a sample to ids: where the response lies, which tokens close it, where the score is read."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from densereward.capture import PrefixScores
from densereward.errors import InvalidRequest, TooLong
from densereward.tokenization.align import Aligned, Aligner
from densereward_client.wire import Sample

BOS, END = 0, 2
NEWLINE = 201
TOKENIZER = tiny.make_tokenizer()


def aligner(*, max_length: int = 256, **tokenizer: Any) -> Aligner:
    return Aligner(tiny.make_tokenizer(**tokenizer), max_length, 320)


def align(reader: Aligner | None = None, **sample: Any) -> Aligned:
    return (reader or aligner()).align(Sample(**sample))


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def test_a_finished_response_gets_the_templates_closing_tokens_and_the_last_is_scored() -> None:
    aligned = align(prompt_token_ids=[5, 6], response_token_ids=[7, 8, 9])
    assert list(aligned.sequence.token_ids) == [5, 6, 7, 8, 9, END, NEWLINE]
    assert (aligned.sequence.prompt_length, aligned.sequence.response_length) == (2, 3)
    assert aligned.sequence.scored_position == 6


def test_a_response_cut_by_length_gets_none_and_is_scored_at_its_last_token() -> None:
    aligned = align(prompt_token_ids=[5, 6], response_token_ids=[7, 8, 9], finished=False)
    assert list(aligned.sequence.token_ids) == [5, 6, 7, 8, 9]
    assert aligned.sequence.scored_position == 4


def test_pad_is_eos_here_and_a_response_of_such_tokens_is_still_read_at_its_end() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == END
    aligned = align(prompt_token_ids=[5], response_token_ids=[END, END, END], finished=False)
    assert aligned.sequence.scored_position == 3


def test_a_closing_token_written_as_text_is_recognised() -> None:
    aligned = align(prompt="", response="Thank you<|im_end|>")
    assert list(aligned.sequence.token_ids) == [*ids_of("Thank you"), END, NEWLINE]


def test_messages_are_rendered_up_to_the_answer() -> None:
    aligned = align(messages=[{"role": "user", "content": "Why?"}], response="So.")
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    assert list(aligned.sequence.token_ids) == ids_of(rendered)
    assert aligned.sequence.response_length == len(ids_of("So."))


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        ({"prompt_token_ids": [5], "response_token_ids": [320]}, "id_out_of_vocabulary"),
        ({"prompt_token_ids": [-1], "response_token_ids": [5]}, "id_out_of_vocabulary"),
        ({"prompt_token_ids": [5] * 300, "response_token_ids": [5]}, "too_long"),
        ({"prompt": "", "response": "", "finished": False}, "empty_sample"),
    ],
)
def test_a_sample_that_cannot_be_served_is_refused_with_its_code(sample: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        align(**sample)
    assert refused.value.error_code == code
    assert refused.value.status == 422


def test_a_prompt_that_is_too_long_loses_its_beginning_where_that_is_asked_for() -> None:
    reader = Aligner(tiny.make_tokenizer(), max_length=10, vocabulary_size=320)
    sample = Sample(prompt_token_ids=list(range(20, 28)), response_token_ids=[7, 8, 9])
    aligned = reader.align(sample, truncate=True)
    assert list(aligned.sequence.token_ids) == [23, 24, 25, 26, 27, 7, 8, 9, END, NEWLINE]
    assert (aligned.dropped, aligned.sequence.prompt_length, aligned.sequence.response_length) == (3, 5, 3)
    assert aligned.warnings == ["truncated: the prompt lost its first 3 tokens"]
    with_bos = Sample(prompt_token_ids=[BOS, *range(20, 27)], response_token_ids=[7, 8, 9])
    kept = reader.align(with_bos, truncate=True)
    assert list(kept.sequence.token_ids)[:3] == [BOS, 23, 24]
    assert kept.warnings == ["truncated: the prompt lost its first 3 tokens after the BOS"]
    short = reader.align(Sample(prompt_token_ids=[5], response_token_ids=[7]), truncate=True)
    assert (short.dropped, short.warnings) == (0, [])


@pytest.mark.parametrize("prompt", [[], [5], [BOS, 5]])
def test_a_response_that_is_too_long_is_refused_whatever_its_prompt_could_lose(prompt: list[int]) -> None:
    reader = Aligner(tiny.make_tokenizer(), max_length=10, vocabulary_size=320)
    with pytest.raises(TooLong):
        reader.align(Sample(prompt_token_ids=prompt, response_token_ids=[7] * 9), truncate=True)


def test_the_longest_sequence_that_fits_is_served_closing_tokens_included() -> None:
    reader = aligner(max_length=10)
    assert len(align(reader, prompt_token_ids=[5] * 4, response_token_ids=[6] * 4).sequence.token_ids) == 10
    with pytest.raises(TooLong, match="11 tokens with the closing tokens, and the model reads 10"):
        align(reader, prompt_token_ids=[5] * 5, response_token_ids=[6] * 4)


def test_a_closed_prefix_must_fit_too() -> None:
    reader = aligner(max_length=10)
    sample = Sample(prompt_token_ids=[5] * 4, response_token_ids=[6] * 6, finished=False)
    assert reader.align(sample, frozenset([PrefixScores("open")])).sequence.longest == 10
    with pytest.raises(TooLong, match="12 tokens"):
        reader.align(sample, frozenset([PrefixScores("closed")]))
