"""Where a response is cut: sentences in many scripts, on tokens that split characters, and the trainer's own tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densereward.capture import Span
from densereward.methods.boundaries import TextBoundaries


def boundaries(tokens: list[bytes], slots: list[Span] | None = None) -> TextBoundaries:
    text = b"".join(tokens)
    ends = [sum(map(len, tokens[: i + 1])) for i in range(len(tokens))]
    return TextBoundaries(lambda: text, list(pairwise([0, *ends])), slots)


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["One", " two", ".", " Three", "!", " Four"], [3, 5, 6]),
        (["Mr", ".", " Smith", " paid", " 3", ".", "50", "."], [8]),
        (["良", "い", "。", "次", "。"], [3, 5]),
        (["नमस्ते", "।", " ठीक", "।"], [2, 4]),
        (["First", ".", "\n\n", "Second", "."], [2, 5]),
        (["Done", ".", " \n"], [2, 3]),
        (["no", " mark", " here"], [3]),
        (["One", ". Two", "."], [2, 3]),
        ([" ", "\n"], [2]),
    ],
    ids=lambda value: "".join(value) if isinstance(value[0], str) else "",
)
def test_sentences_end_at_the_token_that_holds_their_mark(tokens: list[str], ends: list[int]) -> None:
    assert boundaries([token.encode() for token in tokens]).sentences == ends


def test_tokens_that_split_a_character_and_bytes_that_are_none_keep_every_place() -> None:
    mark = "。".encode()
    assert boundaries(["良い".encode(), mark[:1], mark[1:], "次".encode(), mark]).sentences == [3, 5]
    assert boundaries([b"a\xff\xfe", b".", b" B", b"\xe3."]).sentences == [2, 4]


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=30))
def test_cuts_are_in_order_and_end_with_the_response_whatever_the_bytes(tokens: list[bytes]) -> None:
    ends = boundaries(tokens).sentences
    assert ends == sorted(set(ends))
    assert ends[0] > 0
    assert ends[-1] == len(tokens)


def test_a_trainers_token_begins_at_the_first_token_that_begins_with_or_after_it() -> None:
    tokens = [b"ab", b"cd", b"e"]
    assert boundaries(tokens).before_slots([0, 2]) == [0, 2]
    assert boundaries(tokens, [(0, 1), (1, 2), (2, 3), (3, 5)]).before_slots([0, 1, 2, 3]) == [0, 1, 1, 2]
