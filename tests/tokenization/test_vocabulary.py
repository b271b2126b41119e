"""The bytes behind the reward model's tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tiny
from densereward.errors import ModelError
from densereward.tokenization.vocabulary import Vocabulary

BYTE_LEVEL = Vocabulary(tiny.make_tokenizer())
SENTENCEPIECE = Vocabulary(tiny.make_sentencepiece_style_tokenizer())

HARD_TEXTS = ["", "plain words", " 😀👩‍👩‍👧 ", "東京 и ещё", "e\u0301\u0300 combining", "\n\t \u200b", "a<|im_end|>b"]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_byte_level_spans_cover_every_byte_of_the_text_in_order(text: str) -> None:
    encoding = BYTE_LEVEL.encode(text)
    spans = BYTE_LEVEL.spans_in_text(text, encoding)
    assert len(spans) == len(encoding.ids)
    written = [text.encode()[start:stop] for start, stop in spans]
    assert b"".join(written) == text.encode()
    assert written == [BYTE_LEVEL.token_bytes(token) for token in encoding.ids]


@given(text=st.text(max_size=40))
def test_any_text_has_spans_that_spell_it_out(text: str) -> None:
    spans = BYTE_LEVEL.spans_in_text(text, BYTE_LEVEL.encode(text))
    assert [stop for _, stop in spans][-1:] == [len(text.encode())][: len(spans)]
    assert all(first[1] == second[0] for first, second in itertools.pairwise(spans))


@pytest.mark.parametrize("text", ["Thank you", "good 😀 food", "東京", "😀", "k"])
def test_tokens_of_a_tokenizer_that_adds_a_space_still_lie_in_the_text(text: str) -> None:
    encoding = SENTENCEPIECE.encode(text)
    spans = SENTENCEPIECE.spans_in_text(text, encoding)
    assert len(spans) == len(encoding.ids)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text.encode())
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    assert sum(stop - start for start, stop in spans) == len(text.encode())


def test_a_character_written_as_byte_tokens_is_split_between_them() -> None:
    spans = SENTENCEPIECE.spans_in_text("k😀", SENTENCEPIECE.encode("k😀"))
    assert spans[-4:] == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_a_blank_before_the_text_has_no_bytes_of_it() -> None:
    spans = SENTENCEPIECE.spans_in_text("😀", SENTENCEPIECE.encode("😀"))
    assert spans == [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]


def test_what_stands_behind_a_text_is_read_without_a_blank_before_it() -> None:
    assert SENTENCEPIECE.ids_behind("k") == SENTENCEPIECE.encode("ak").ids[-1:]
    assert SENTENCEPIECE.ids_behind("k") != SENTENCEPIECE.encode("k").ids
    assert BYTE_LEVEL.ids_behind("<|im_end|>\n") == BYTE_LEVEL.encode("<|im_end|>\n").ids


def test_spans_of_ids_are_the_bytes_the_ids_write() -> None:
    ids = BYTE_LEVEL.encode("a 😀<|im_end|>").ids
    spans = BYTE_LEVEL.spans_of_ids(ids)
    assert spans is not None
    assert spans[-1] == (len("a 😀".encode()), len("a 😀<|im_end|>".encode()))
    assert SENTENCEPIECE.spans_of_ids(SENTENCEPIECE.encode("k").ids) == [(0, 3 - 2), (1, 2)]


def test_a_part_of_a_character_shows_as_a_mark() -> None:
    texts = [BYTE_LEVEL.token_text(token) for token in BYTE_LEVEL.encode("😀").ids]
    assert "\ufffd" in texts
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.encode(" ").ids[0]) == " "


def test_the_frame_of_special_tokens_is_found() -> None:
    assert (BYTE_LEVEL.prefix_ids, BYTE_LEVEL.suffix_ids) == ([], [])
    assert Vocabulary(tiny.make_tokenizer(adds_bos=True)).prefix_ids == [0]
    assert SENTENCEPIECE.prefix_ids == [1]


def test_the_fingerprint_is_the_vocabularys_and_not_the_templates(tmp_path: object) -> None:
    same = Vocabulary(tiny.make_tokenizer(template=None, adds_bos=True))
    assert same.fingerprint == BYTE_LEVEL.fingerprint
    assert SENTENCEPIECE.fingerprint != BYTE_LEVEL.fingerprint
    tiny.make_tokenizer().save_pretrained(str(tmp_path))
    assert Vocabulary(AutoTokenizer.from_pretrained(str(tmp_path))).fingerprint == BYTE_LEVEL.fingerprint


def test_a_truncating_tokenizer_is_read_whole() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert len(Vocabulary(tokenizer).encode("a long enough text").ids) > 3


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ModelError, match="not a fast tokenizer"):
        Vocabulary(object())


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_prompt_met_again_has_the_same_ids_whatever_became_of_the_first(size: int) -> None:
    text = "a b " * size
    first = BYTE_LEVEL.prompt_ids(text)
    assert first == BYTE_LEVEL.encode(text).ids
    first.append(7)
    assert BYTE_LEVEL.prompt_ids(text) == BYTE_LEVEL.encode(text).ids
