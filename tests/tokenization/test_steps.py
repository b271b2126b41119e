"""A response written step by step, on literal texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from densereward.capture import Steps
from densereward.errors import InvalidRequest, ModelError
from densereward.tokenization.steps import InSteps, StepWriter
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Sample

VOCABULARY = Vocabulary(tiny.make_tokenizer())
CLOSING = [2, 201]


def bytes_of(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text.encode()[start:stop].decode(errors="replace") for start, stop in spans]


def writer(cut: str = "\n\n", separator: str = "<|im_start|>") -> StepWriter:
    return StepWriter(VOCABULARY, Steps(cut, separator), CLOSING, 320)


def in_steps(text: str, cut: str = "\n\n", separator: str = "<|im_start|>") -> InSteps:
    return writer(cut, separator).write(text)


def test_each_step_is_followed_by_a_separator_that_stands_at_its_last_letter() -> None:
    text = "So: a\n\nThen b 😀\n\nEnd \n"
    written = in_steps(text)
    steps = [VOCABULARY.encode(step).ids for step in ("So: a", "Then b 😀", "End \n")]
    assert written.ids == [*steps[0], 1, *steps[1], 1, *steps[2], 1]
    assert [written.ids[stop - 1] for stop in written.stops] == [1, 1, 1]
    ends = [text.encode().index(b"a") + 1, len("So: a\n\nThen b 😀".encode()), text.encode().index(b"End") + 3]
    assert [written.spans[stop - 1] for stop in written.stops] == [(end - 1, end) for end in ends]


def test_a_separator_of_several_tokens_is_read_at_the_last() -> None:
    written = in_steps("a\n\nb", "\n\n", "\n\n")
    a, b, line = (VOCABULARY.encode(letter).ids[0] for letter in "ab\n")
    assert written.ids == [a, line, line, b, line, line]
    assert written.spans == [(0, 1), (0, 1), (0, 1), (3, 4), (3, 4), (3, 4)]
    assert written.stops == [3, 6]


def test_blank_steps_are_none() -> None:
    text = "\n\n a\n\n \n\n\n\nb\n\n"
    written = in_steps(text)
    assert [written.ids[stop - 1] for stop in written.stops] == [1, 1]
    assert [written.spans[stop - 1] for stop in written.stops] == [(3, 4), (11, 12)]


def test_line_breaks_of_either_kind_end_a_step() -> None:
    one, two = in_steps("a\n\nb\n\nc"), in_steps("a\r\n\r\nb\r\n\r\nc")
    assert one.ids == two.ids
    assert one.stops == two.stops


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|>", "\n\n<|im_end|>\n"])
def test_closing_tokens_at_the_end_are_no_part_of_the_last_step(end: str) -> None:
    plain = writer().as_text(Sample(prompt="", response="a\n\nb", response_spans=[(0, 3), (3, 4)]))
    text = writer().as_text(
        Sample(prompt="", response="a\n\nb" + end, response_spans=[(0, 3), (3, 4), (4, 4 + len(end))])
    )
    ids = writer().as_text(Sample(prompt="", response_token_ids=VOCABULARY.encode("a\n\nb" + end).ids))
    for sample in (text, ids):
        assert sample.response is not None
        assert writer().write(sample.response).ids == writer().write(str(plain.response)).ids
        assert sample.response_spans is not None
        assert max(stop for _, stop in sample.response_spans) <= len(sample.response)
    assert len(ids.response_spans or []) == len(VOCABULARY.encode("a\n\nb" + end).ids)


def test_ids_of_a_tokenizer_that_writes_a_blank_before_every_text_are_read_as_that_text() -> None:
    vocabulary = Vocabulary(tiny.make_sentencepiece_style_tokenizer())
    reader = StepWriter(vocabulary, Steps("\n", "\n"), [], 1000)
    ids = vocabulary.encode("Thank you").ids
    sample = reader.as_text(Sample(prompt="", response_token_ids=ids))
    assert sample.response == "Thank you"
    assert len(sample.response_spans or []) == len(ids)
    assert reader.write("Thank you").ids[: len(ids)] == ids


def test_special_tokens_that_ids_spell_out_letter_by_letter_are_not_read_as_one() -> None:
    ids = [VOCABULARY.encode(letter).ids[0] for letter in "<|im_start|>"]
    with pytest.raises(InvalidRequest) as refused:
        writer("\n", "\n").as_text(Sample(prompt="", response_token_ids=ids))
    assert refused.value.error_code == "no_text"


def test_a_separator_that_the_tokenizer_does_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="does not know '<extra_0>' as a token of its own"):
        writer("\n\n", "<extra_0>")
    with pytest.raises(ModelError, match="which is not in the model"):
        StepWriter(VOCABULARY, Steps("\n", "\n"), [], 10)


@given(st.text(st.sampled_from("ab é😀\n"), min_size=1).filter(str.strip), st.sampled_from(["\n", "\n\n"]))
def test_every_letter_is_in_a_step_and_every_step_ends_at_its_last_letter(text: str, cut: str) -> None:
    written = in_steps(text, cut)
    assert len(written.ids) == len(written.spans)
    assert written.stops[-1] == len(written.ids)
    tokens = [span for token, span in zip(written.ids, written.spans, strict=True) if token != 1]
    held = b"".join(text.encode()[start:stop] for start, stop in tokens).decode()
    assert "".join(held.split()) == "".join(text.split())
    for stop in written.stops:
        last = text.encode()[: written.spans[stop - 1][1]].decode()[-1]
        assert not last.isspace()
