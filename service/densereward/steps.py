"""A response written for a model that judges its steps: a separator after each, at whose last token it is read.

The separator takes the place of what stands between two steps in the response, a blank line or a line break, and
bears its last byte, so that a step's reward goes to the one token that ends it; the separator after the last step has
no byte. Steps are tokenised one by one, as such models were trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from densereward.capture import Span
from densereward.tokens import Vocabulary

__all__ = ["InSteps", "in_steps"]


@dataclass(frozen=True, slots=True)
class InSteps:
    """A response as the model reads it.

    Attributes:
        ids: of steps and separators.
        spans: [start, end) of each in the response's UTF-8 bytes.
        stops: tokens before the end of each step, its separator included.
    """

    ids: list[int]
    spans: list[Span]
    stops: list[int]


def in_steps(response: str, cut: str, separator_ids: Sequence[int], vocabulary: Vocabulary) -> InSteps:
    """Cut a response and write it step by step; steps of white space alone are none.

    Args:
        response: the text, not all of it white space.
        cut: what stands between steps.
        separator_ids: what is written after each.
        vocabulary: the model's.
    """
    written = InSteps([], [], [])
    size = len(response.encode())
    for step, begin in _steps(response, cut):
        encoding = vocabulary.encode(step)
        end = begin + len(step.encode())
        behind = min(end + len(cut.encode()), size)
        written.ids.extend([*encoding.ids, *separator_ids])
        written.spans.extend((begin + start, begin + stop) for start, stop in vocabulary.spans_in_text(step, encoding))
        written.spans.extend([*[(end, end)] * (len(separator_ids) - 1), (max(behind - 1, end), behind)])
        written.stops.append(len(written.ids))
    return written


def _steps(response: str, cut: str) -> Iterator[tuple[str, int]]:
    """Each step, and the byte it begins at."""
    begin = 0
    for part in response.split(cut):
        if part.strip():
            yield part, begin
        begin += len(part.encode()) + len(cut.encode())
