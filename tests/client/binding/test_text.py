"""The text that ids write: every byte has its token, and bytes that are no text are named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from densereward_client import Client
from densereward_client.tokens import byte_alphabet
from densereward_client.wire import ModelList
from families import POLICIES
from serving import Json

from .conftest import LETTERS, MESSAGES, bindings, ids_of

text = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=8).map("".join)


def test_bytes_that_are_no_text_are_named(client: Client, models: ModelList) -> None:
    tokenizer = POLICIES["tiny"]
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    smile = [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in "😀".encode()]
    good = ids_of(tokenizer, " good", eos=False)
    binding = bindings("tiny", models)
    read = binding.text_of([*smile[1:], *good])
    assert read.text == "\ufffd" * 3 + " good"
    assert [read.text.encode()[start:stop].decode() for start, stop in read.spans[:3]] == ["\ufffd"] * 3
    assert read.warnings == [
        "invalid_utf8: the tokens at 0, 1, 2 begin bytes that are no text; U+FFFD was read in their place"
    ]
    cut = binding.text_of([*good, *smile[:3]], cut=True)
    assert (cut.text, cut.spans[-3:]) == (" good", [(5, 5)] * 3)
    assert "cut within a character, at token" in cut.warnings[0]
    sample = {"prompt": "a", "response_token_ids": [*smile[1:], *good]}
    item = client.bind(tokenizer, model="bare").token_rewards([sample], methods=["red"]).data[0]
    assert any(warning.startswith("invalid_utf8") for warning in item.warnings)
    assert len(item.token_rewards["red"]) == 3 + len(good)


@pytest.mark.parametrize("policy", [*families.FAMILIES, "tiny sentencepiece"])
@settings(max_examples=40, deadline=None)
@given(written=text)
def test_every_byte_of_a_response_belongs_to_exactly_one_token(policy: str, written: str, models: ModelList) -> None:
    tokenizer = POLICIES[policy]
    ids = ids_of(tokenizer, written, eos=False)
    if policy == "bert" and 100 in ids:
        return  # a word it does not know
    read = bindings(policy, models).text_of(ids)
    assert read.text == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert [stop for _, stop in read.spans[:-1]] == [start for start, _ in read.spans[1:]]
    owned = [(0, 0), *read.spans]
    assert (owned[min(len(ids), 1)][0], owned[-1][1]) == (0, len(read.text.encode()))
    assert read.warnings == []


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(3, 258), max_size=12))
def test_any_bytes_are_read_as_the_tokenizer_reads_them(ids: list[int], models: ModelList) -> None:
    tokenizer = POLICIES["tiny"]
    read = bindings("tiny", models).text_of(ids)
    assert read.text == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert len(read.spans) == len(ids)
    assert all(start <= stop for start, stop in read.spans)
    assert bool(read.warnings) == ("\ufffd" in read.text)


@pytest.mark.parametrize("policy", ["llama", "tiny sentencepiece"])
def test_a_response_behind_a_plain_prompt_keeps_the_blank_it_begins_with(policy: str, client: Client) -> None:
    tokenizer = POLICIES[policy]
    whole = ids_of(tokenizer, "How was it? Thank you", eos=False)
    prompt = ids_of(tokenizer, "How was it?", eos=False)
    assert whole[: len(prompt)] == prompt
    bound = client.bind(tokenizer, model="closed")
    direct = client.token_rewards(
        [{"prompt": "How was it?", "response": " Thank you", "finished": False}], methods=["red"], model="closed"
    ).data[0]
    for given_prompt in ({"prompt": "How was it?"}, {"prompt_token_ids": prompt}):
        sample: Json = given_prompt | {"response_token_ids": whole[len(prompt) :]}
        assert bound.token_rewards([sample], methods=["red"]).data[0].reward == pytest.approx(direct.reward, abs=1e-6)
    dialogue = {"messages": MESSAGES, "response_token_ids": whole[len(prompt) :]}
    assert bound.binding.bind(dialogue).sample.response == "Thank you"
