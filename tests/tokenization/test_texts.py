"""Prompt and response as ids: where they are cut, which bytes each token has, what is written before them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import normalizers
from tokenizers.processors import ByteLevel

import tiny
from densereward.errors import InvalidRequest
from densereward.tokenization.frame import Frame
from densereward.tokenization.texts import Text, TextReader
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Sample

BOS, START = 0, 1
TOKENIZER = tiny.make_tokenizer()


def read_by(tokenizer: Any, sample: Sample) -> Text:
    """Both parts as ids, with what stands before the response."""
    vocabulary = Vocabulary(tokenizer)
    frame = Frame(tokenizer, vocabulary, 320)
    text = TextReader(vocabulary, frame.template, None, reads_pairs=False).read(sample)
    frame.open(sample, text)
    return text


def read(tokenizer: Any = TOKENIZER, **sample: Any) -> Text:
    return read_by(tokenizer, Sample(**sample))


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("bare", ["", "Why?"])
def test_bos_is_added_once_to_a_prompt_as_text(bare: str) -> None:
    tokenizer = tiny.make_tokenizer(adds_bos=True)
    for prompt in (bare, f"<|bos|>{bare}"):
        text = read(tokenizer, prompt=prompt, response="So.")
        assert text.prompt_ids == [BOS, *ids_of(bare)]
        assert text.response_ids == ids_of("So.")
        assert not text.warnings


def test_bos_is_added_neither_to_ids_nor_to_messages() -> None:
    tokenizer = tiny.make_tokenizer(adds_bos=True)
    assert read(tokenizer, prompt_token_ids=[5], response_token_ids=[7]).prompt_ids == [5]
    assert read(tokenizer, messages=[{"role": "user", "content": ""}], response="a").prompt_ids[0] == START


def test_a_template_that_writes_bos_is_not_given_another() -> None:
    tokenizer = tiny.make_tokenizer(adds_bos=True, template="<|bos|>" + tiny.CHATML)
    text = read(tokenizer, messages=[{"role": "user", "content": ""}], response="a")
    assert text.prompt_ids[:2] == [BOS, START]


def test_a_doubled_bos_is_reported() -> None:
    text = read(tiny.make_tokenizer(adds_bos=True), prompt_token_ids=[BOS, BOS, 5], response_token_ids=[7])
    assert text.warnings[0].startswith("doubled_bos:")


def test_prompt_and_response_are_read_as_one_text_and_cut_between_tokens() -> None:
    text = read(prompt="Thank you", response=" very much")
    assert [*text.prompt_ids, *text.response_ids] == ids_of("Thank you very much")
    assert text.prompt_ids == ids_of("Thank you")
    assert text.spans == _byte_spans(" very much", text.response_ids)


def test_a_token_over_the_boundary_is_never_given_to_either_side() -> None:
    assert ids_of("The") != [*ids_of("T"), *ids_of("he")]
    text = read(prompt="T", response="he")
    assert (text.prompt_ids, text.response_ids) == (ids_of("T"), ids_of("he"))
    assert text.warnings[0].startswith("split_boundary:")


@pytest.mark.parametrize("prompt", ["Thank ", "Thank  "])
def test_a_blank_that_ends_the_prompt_is_read_with_the_word_behind_it_and_has_no_bytes(prompt: str) -> None:
    text = read(prompt=prompt, response="the")
    assert [*text.prompt_ids, *text.response_ids] == ids_of(f"{prompt}the")
    assert text.response_ids == ids_of(" the")
    assert text.spans is not None
    assert (text.spans[0][0], text.spans[-1][1]) == (0, 3)
    assert not text.warnings


def test_a_prompt_of_one_blank_stays_a_prompt() -> None:
    text = read(prompt=" ", response="the")
    assert text.prompt_ids == ids_of(" ")
    assert text.warnings[0].startswith("split_boundary:")


def test_a_response_that_the_template_would_have_stripped_is_scored_as_it_stands_with_a_warning() -> None:
    tokenizer = tiny.make_tokenizer(template=tiny.CHATML.replace("message['content']", "message['content'] | trim"))
    messages = [{"role": "user", "content": "Why?"}]
    assert read(tokenizer, messages=messages, response=" So.").warnings[0].startswith("unstripped_response:")
    assert not read(tokenizer, messages=messages, response="So.").warnings


def test_dialogues_are_refused_without_a_template() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        read(tiny.make_tokenizer(template=None), messages=[{"role": "user", "content": "Why?"}], response="So.")


def test_spans_count_bytes_and_not_characters() -> None:
    text = read(prompt="é😀", response="é😀")
    assert text.spans is not None
    assert text.spans[0][0] == 0
    assert text.spans[-1][1] == len("é😀".encode())


def test_a_crossing_that_offsets_hide_is_found_by_the_prompts_own_ids() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    text = read(tokenizer, prompt="e", response="\u0301 a")
    assert text.warnings[0].startswith("split_boundary:")
    assert text.prompt_ids == ids_of("e")


def _byte_spans(text: str, token_ids: list[int]) -> list[tuple[int, int]]:
    spans, reached = [], 0
    for piece in TOKENIZER.convert_ids_to_tokens(token_ids):
        spans.append((reached, reached + len(piece)))
        reached += len(piece)
    assert reached == len(text.encode())
    return spans
