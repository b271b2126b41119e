"""Texts that hold prompt and response already: what is written round them, and who cannot read them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

import tiny
from densereward.errors import InvalidRequest
from densereward.tokenization.frame import Frame
from densereward.tokenization.preassembled import PreassembledReader
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Message

BOS, END = 0, 2
TOKENIZER = tiny.make_tokenizer()


def reader_of(tokenizer: Any, **read: Any) -> PreassembledReader:
    vocabulary = Vocabulary(tokenizer)
    return PreassembledReader(vocabulary, Frame(tokenizer, vocabulary, 320, **read), "sequence", needs_prompt=False)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("special", "reason"),
    [({"gate": "<|im_end|>"}, "weighs its objectives"), ({"score_token": 7}, "written behind a response")],
)
def test_a_whole_text_is_refused_where_the_place_of_the_response_matters(special: dict[str, Any], reason: str) -> None:
    reader = reader_of(tiny.make_tokenizer(), **special)
    for whole in ("Thank you", [5, 6], [Message(role="user", content="Why?")]):
        with pytest.raises(InvalidRequest, match=reason):
            reader.read(whole, special_tokens=True)


def test_what_a_tokenizer_writes_round_a_text_is_written_once() -> None:
    tokenizer = tiny.make_tokenizer(adds_bos=True, template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", BOS), ("<|im_end|>", END)]
    )
    reader = reader_of(tokenizer)
    for text in ("Thank you", "<|bos|>Thank you", "Thank you<|im_end|>", "<|bos|>Thank you<|im_end|>"):
        assert reader.read(text, special_tokens=True).response_token_ids == [BOS, *ids_of("Thank you"), END]
        assert reader.read(text, special_tokens=False).response_token_ids == ids_of(text)


def test_a_whole_dialogue_needs_a_template_and_its_refusal_names_the_other_way() -> None:
    with pytest.raises(InvalidRequest, match="no chat template: give `input`"):
        reader_of(tiny.make_tokenizer(template=None)).read([Message(role="user", content="Why?")], special_tokens=False)
