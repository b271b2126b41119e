"""A response written step by step, on literal texts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import tiny
from densereward.steps import in_steps
from densereward.tokens import Vocabulary

VOCABULARY = Vocabulary(tiny.make_tokenizer())
END = [1]  # <|im_start|>, which no text here holds


def bytes_of(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text.encode()[start:stop].decode(errors="replace") for start, stop in spans]


def test_each_step_is_followed_by_a_separator_that_bears_the_last_byte_between_them() -> None:
    text = "So: a\n\nThen b 😀\n\nEnd"
    written = in_steps(text, "\n\n", END, VOCABULARY)
    steps = [VOCABULARY.encode(step).ids for step in ("So: a", "Then b 😀", "End")]
    assert written.ids == [*steps[0], 1, *steps[1], 1, *steps[2], 1]
    assert [written.ids[stop - 1] for stop in written.stops] == [1, 1, 1]
    shown = bytes_of(text, written.spans)
    assert [shown[stop - 1] for stop in written.stops] == ["\n", "\n", ""]
    assert [written.spans[stop - 1][1] for stop in written.stops] == [
        text.index("Then"),
        len(text.encode()) - 3,
        len(text.encode()),
    ]


def test_a_separator_of_several_tokens_is_read_at_the_last_which_bears_the_bytes() -> None:
    written = in_steps("a\nb", "\n", [7, 8], VOCABULARY)
    a, b = (VOCABULARY.encode(letter).ids[0] for letter in "ab")
    assert written.ids == [a, 7, 8, b, 7, 8]
    assert written.spans == [(0, 1), (1, 1), (1, 2), (2, 3), (3, 3), (3, 3)]
    assert written.stops == [3, 6]


def test_blank_steps_are_none() -> None:
    text = "\n\n a\n\n \n\n\n\nb\n\n"
    written = in_steps(text, "\n\n", END, VOCABULARY)
    assert [written.ids[stop - 1] for stop in written.stops] == END * 2
    shown = bytes_of(text, written.spans)
    assert [shown[stop - 1] for stop in written.stops] == ["\n", "\n"]
    assert [written.spans[stop - 1][1] for stop in written.stops] == [text.index("a") + 3, len(text)]
    assert shown[0][0] == " "


@given(st.text(st.sampled_from("ab é😀\n"), min_size=1).filter(str.strip), st.sampled_from(["\n", "\n\n"]))
def test_spans_are_in_order_and_hold_every_letter(text: str, cut: str) -> None:
    written = in_steps(text, cut, END, VOCABULARY)
    assert len(written.ids) == len(written.spans)
    assert written.stops[-1] == len(written.ids)
    reached = 0
    for start, stop in written.spans:
        assert reached <= start <= stop <= len(text.encode())
        reached = stop
    held = "".join(text.encode()[start:stop].decode("latin-1") for start, stop in written.spans)
    assert "".join(held.encode("latin-1").decode().split()) == "".join(text.split())
