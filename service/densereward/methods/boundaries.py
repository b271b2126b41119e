"""Where a response can be divided: at the ends of its sentences or words, and where the trainer's own tokens begin.

A boundary is the number of the reward model's tokens before it. A token that lies across a boundary is before it.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate

import sentencex

from densereward.capture import Span

__all__ = ["TextBoundaries"]

_LANGUAGE = "en"  # its abbreviations; the marks that end a sentence are those of all languages
_QUESTION_MARKS = "densereward_question_marks"

codecs.register_error(_QUESTION_MARKS, lambda error: ("?" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


class TextBoundaries:
    """The boundaries in one response's text.

    Args:
        text: gives its bytes, when they are first needed.
        spans: [start, end) of the reward model's tokens in them.
        slot_spans: likewise of the trainer's; None where it uses the reward model's.
    """

    def __init__(self, text: Callable[[], bytes], spans: Sequence[Span], slot_spans: Sequence[Span] | None) -> None:
        self._text = text
        self._starts = [start for start, _ in spans]
        self._slot_spans = slot_spans

    @cached_property
    def sentences(self) -> list[int]:
        """Tokens before each sentence's end, in order; the last is all of them.

        White space after a sentence is the next one's, as it is in most tokenizers' tokens.
        """
        text = self._text().decode(errors=_QUESTION_MARKS)  # each byte that is no character stays one byte long
        byte_at = [0, *accumulate(len(character.encode()) for character in text)]
        found = sentencex.get_sentence_boundaries(_LANGUAGE, text)
        ends = [each["start_index"] + len(text[each["start_index"] : each["end_index"]].rstrip()) for each in found]
        written = [end for end, each in zip(ends, found, strict=True) if end > each["start_index"]]
        boundaries = {bisect_left(self._starts, byte_at[end]) for end in written}
        return sorted({*boundaries - {0}, len(self._starts)})

    @cached_property
    def words(self) -> list[int]:
        """Tokens before each word's end, in order; the last is all of them. A word is what white space separates."""
        ends = (match.end() for match in re.finditer(rb"\S+", self._text()))
        return sorted({*(bisect_left(self._starts, end) for end in ends), len(self._starts)} - {0})

    def before_slots(self, slots: Sequence[int]) -> list[int]:
        """Tokens before each of these slots of the trainer's."""
        if self._slot_spans is None:
            return list(slots)
        return [bisect_left(self._starts, self._slot_spans[slot][0]) for slot in slots]
