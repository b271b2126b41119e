"""A response written for a model that judges its steps: a separator after each, at whose last token it is read.

The separator replaces what divides two steps in the response, a blank line or a line break. Its byte span is that of
the step's last letter, so that a step's reward goes to the trainer's token that ends the step. Steps are tokenised one
by one, as such models were trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from densereward.capture import Span, Steps
from densereward.errors import InvalidRequest, ModelError
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Sample

__all__ = ["InSteps", "StepWriter"]


@dataclass(frozen=True, slots=True)
class InSteps:
    """A response as the model reads it.

    Attributes:
        ids: of steps and separators.
        spans: [start, end) of each in the response's UTF-8 bytes; a separator has its step's last byte once more.
        stops: tokens before the end of each step, its separator included.
    """

    ids: list[int]
    spans: list[Span]
    stops: list[int]


@dataclass(frozen=True, slots=True)
class Places:
    """For each byte of a rewritten text, the [start, end) in the response that it comes from."""

    each: list[Span]

    def of(self, spans: Sequence[Span]) -> list[Span]:
        """Spans of the rewritten text as spans of the response."""
        last = self.each[-1][1] if self.each else 0
        return [
            (self.each[start][0], max(end for _, end in self.each[start:stop])) if start < stop else (last, last)
            for start, stop in spans
        ]


def _last_byte(step: str, begin: int) -> Span:
    """The span of a step's last letter, or of the line break before a step without one."""
    end = max(begin + len(step.rstrip().encode()), 1)
    return (end - 1, end)


class StepWriter:
    """Rewrites responses for one model, with a separator after each step.

    Args:
        vocabulary: the model's.
        steps: how they are written; line breaks between them may be of either kind.
        closing_ids: what the model's template writes after a response, which is no part of the last step.
        vocabulary_size: token ids are below it.

    Raises:
        ModelError: the tokenizer cannot write the separator.
    """

    def __init__(self, vocabulary: Vocabulary, steps: Steps, closing_ids: Sequence[int], vocabulary_size: int) -> None:
        self._vocabulary = vocabulary
        self._written = steps
        self._cut = re.compile("\r?\n".join(map(re.escape, steps.cut.split("\n"))))
        separator = steps.separator
        self._separator = vocabulary.encode(separator.strip() if steps.whole else separator).ids
        self._special = separator if separator != steps.cut else None
        self._endings = {*closing_ids, vocabulary.eos_id}
        marks = (
            vocabulary.token_text(token) for token in self._endings if token is not None and vocabulary.is_added(token)
        )
        self._marks = tuple(marks)
        known = [token for token in self._separator if token < vocabulary_size]
        if not known or known != self._separator:
            raise ModelError(f"the tokenizer writes {self._separator} for {separator!r}, which is not in the model")
        if self._special is not None and not (len(known) == 1 and (steps.whole or vocabulary.is_added(known[0]))):
            raise ModelError(
                f"the tokenizer does not know {separator!r} as a token of its own; it is another model's tokenizer"
            )

    @property
    def whole(self) -> bool:
        """Whether prompt and response are read as one text."""
        return self._written.whole

    def joined(self, prompt: str) -> str:
        """A prompt with the text between it and the first step, where the step is tokenised by itself."""
        joint = self._written.joint
        return prompt if joint is None or self.whole or prompt.endswith(joint) else prompt + joint

    def write(self, response: str) -> InSteps:
        """Split a response that is not blank into steps, and tokenise them one by one."""
        written = InSteps([], [], [])
        for step, begin in self._steps(response):
            encoding = self._vocabulary.encode(step)
            spans = self._vocabulary.spans_in_text(step, encoding)
            written.ids.extend([*encoding.ids, *self._separator])
            written.spans.extend((begin + start, begin + stop) for start, stop in spans)
            written.spans.extend([_last_byte(step, begin)] * len(self._separator))
            written.stops.append(len(written.ids))
        return written

    def written(self, prompt: str | None, response: str) -> tuple[str | None, str, Places]:
        """Prompt and response to be read as one text with separators, and where the response's bytes come from.

        Blanks at the prompt's end go to the response, since tokens begin with those before them.
        """
        bare = None if prompt is None else prompt.rstrip(" ")
        joint = self._written.joint or ""
        joined = not prompt or prompt.endswith(joint) or response.startswith(joint)
        text = (prompt or "")[len(bare or "") :] if joined else joint
        spans = [(0, 0)] * len(text.encode())
        reached = 0
        for step, begin in self._steps(response):
            end = begin + len(step.encode())
            text += response.encode()[reached:end].decode() + self._written.separator
            spans += [(place, place + 1) for place in range(reached, end)]
            spans += [_last_byte(step, begin)] * len(self._written.separator.encode())
            reached = end
        return bare, text, Places(spans)

    def stops(self, ids: Sequence[int], response: str) -> list[int]:
        """Tokens before the end of each step, in a response that was read as one text.

        Raises:
            InvalidRequest: the separators are not where they were written.
        """
        stops = [place + 1 for place, token in enumerate(ids) if token == self._separator[-1]]
        if len(stops) != len(list(self._steps(response))):
            raise InvalidRequest(
                f"the response holds the token that {self._written.separator!r} is, which stands for the end of a step",
                code="separator_in_response",
                field="response",
            )
        return stops

    def _steps(self, response: str) -> Iterator[tuple[str, int]]:
        """Each step, and the byte it begins at."""
        begins = [0, *(match.end() for match in self._cut.finditer(response))]
        ends = [*(match.start() for match in self._cut.finditer(response)), len(response)]
        for begin, end in zip(begins, ends, strict=True):
            if self._written.blank or response[begin:end].strip():
                yield response[begin:end], len(response[:begin].encode())

    def as_text(self, sample: Sample) -> Sample:
        """A sample whose response is text without closing tokens at its end; ids become spans to reward.

        Raises:
            InvalidRequest: there is no step, or the response's ids cannot be rewritten as text.
        """
        ids = sample.response_token_ids
        text, given = self._of_text(sample) if ids is None else self._of_ids(ids)
        if not text.strip():
            raise InvalidRequest("this model judges steps, and the response holds none", code="empty_response")
        if self._special is not None and self._special in text:
            raise InvalidRequest(
                f"the response holds {self._special!r}, which stands for the end of a step and is written here",
                code="separator_in_response",
                field="response",
            )
        return sample.model_copy(update={"response": text, "response_token_ids": None} | given)

    def _of_text(self, sample: Sample) -> tuple[str, dict[str, list[Span]]]:
        response = sample.response or ""
        if not any(mark in response for mark in self._marks):  # the usual case, in which it is not tokenised twice
            return response, {}
        encoding = self._vocabulary.encode(response)
        content = self._content(encoding.ids)
        whole = response.encode()
        if content == len(encoding.ids):
            return response, {}
        size = self._vocabulary.spans_in_text(response, encoding)[content][0]
        spans = sample.response_spans
        inside = spans is not None and all(stop <= len(whole) for _, stop in spans)  # others are refused elsewhere
        given = {"response_spans": [(min(a, size), min(b, size)) for a, b in spans]} if spans and inside else {}
        return whole[:size].decode(), given

    def _of_ids(self, ids: Sequence[int]) -> tuple[str, dict[str, list[Span]]]:
        body = ids[: self._content(ids)]
        spans, text = self._vocabulary.spans_of_ids(body), None
        with suppress(UnicodeDecodeError):
            text = self._vocabulary.text_of(body)
        same = text is not None and self._added(self._vocabulary.encode(text).ids) == self._added(body)
        if spans is None or text is None or not same or not all(map(self._vocabulary.token_bytes, body)):
            raise InvalidRequest(
                "the response is rewritten step by step, and its ids are not what their text is tokenised to; give "
                "`response` as text",
                code="no_text",
                field="response_token_ids",
            )
        size, shift = len(text.encode()), len(self._vocabulary.bytes_of(body)) - len(text.encode())
        moved = [(max(start - shift, 0), max(stop - shift, 0)) for start, stop in spans]
        return text, {"response_spans": [*moved, *[(size, size)] * (len(ids) - len(body))]}

    def _content(self, ids: Sequence[int]) -> int:
        """The number of tokens before the closing ones, which begin with a special token."""
        start = len(ids)
        while start and ids[start - 1] in self._endings:
            start -= 1
        return next((i for i in range(start, len(ids)) if self._vocabulary.is_added(ids[i])), len(ids))

    def _added(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if self._vocabulary.is_added(token)]
