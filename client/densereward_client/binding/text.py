"""The text that ids write, put together from the bytes of their tokens, with the byte span of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..tokens import TokenBytes

__all__ = ["Text", "text_of"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Text:
    """What tokens write.

    Attributes:
        text: Their text.
        spans: [start, end) of each token in its UTF-8 bytes; in order, without gaps.
        warnings: `code: message` each.
    """

    text: str
    spans: list[tuple[int, int]]
    warnings: list[str] = field(default_factory=list)


class _Invalid(NamedTuple):
    """[start, end) of bytes that are no UTF-8; `unfinished` if more bytes could have completed a character."""

    start: int
    end: int
    unfinished: bool


def text_of(tokens: TokenBytes, ids: Sequence[int], *, cut: bool = False, behind: bool = False) -> Text:
    """The text of ids, as `Binding.text_of` describes it."""
    pieces = tokens.pieces(ids, behind=behind)
    raw = b"".join(pieces)
    ends = np.cumsum([0, *map(len, pieces)])
    invalid = _invalid_utf8(raw)
    if not invalid:
        return Text(raw.decode(), _spans(ends))
    text, offsets = _replace(raw, invalid, cut=cut)
    positions = [int(np.searchsorted(ends, each.start, side="right")) - 1 for each in invalid]
    return Text(text, _spans(offsets[ends]), [_warning(invalid, positions, cut=cut)])


def _invalid_utf8(raw: bytes) -> list[_Invalid]:
    invalid = []
    offset = 0
    while offset < len(raw):
        try:
            raw[offset:].decode()
            break
        except UnicodeDecodeError as error:
            unfinished = error.reason == "unexpected end of data"
            invalid.append(_Invalid(offset + error.start, offset + error.end, unfinished))
            offset += error.end
    return invalid


def _replace(raw: bytes, invalid: Sequence[_Invalid], *, cut: bool) -> tuple[str, NDArray[np.int64]]:
    """The text with U+FFFD for invalid bytes, and the offset in its bytes of each offset in `raw`.

    With `cut`, the beginning of an unfinished character is left out instead.
    """
    parts, offsets, copied = [], np.arange(len(raw) + 1), 0
    for start, end, unfinished in invalid:
        mark = b"" if cut and unfinished else _REPLACEMENT.encode()
        parts += [raw[copied:start], mark]
        offsets[start + 1 :] += len(mark) - (end - start)
        offsets[start + 1 : end] = offsets[end]  # the mark belongs to the token of the first byte
        copied = end
    return b"".join([*parts, raw[copied:]]).decode(), offsets


def _warning(invalid: Sequence[_Invalid], positions: Sequence[int], *, cut: bool) -> str:
    shown = ", ".join(map(str, positions[:5])) + (", ..." if len(positions) > 5 else "")
    if all(cut and each.unfinished for each in invalid):
        return f"cut_character: the response was cut within a character, at token {shown}; it was left out"
    return f"invalid_utf8: the tokens at {shown} begin bytes that are no text; U+FFFD was read in their place"


def _spans(ends: NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
