"""How the two texts of a sample become ids: read as one text, as a pair, or step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from densereward.capture import Span
from densereward.errors import InvalidRequest
from densereward.tokenization.chat_template import ChatTemplate
from densereward.tokenization.steps import StepWriter
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Sample

__all__ = ["Text", "TextReader"]


@dataclass(slots=True)
class Text:
    """Ids of the two parts, and what was noticed on the way.

    Attributes:
        spans: [start, end) of the response's ids in its UTF-8 bytes; None where they cannot be known.
        steps: response tokens before the end of each step, for a model that judges steps, or single tokens.
        warnings: `code: message` each.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    spans: list[Span] | None
    steps: Sequence[int] = ()
    warnings: list[str] = field(default_factory=list)


class TextReader:
    """Reads the texts of samples for one model.

    Args:
        vocabulary: the model's.
        template: the model's chat template; None for a model that reads no dialogues.
        steps: what writes responses step by step, where steps are what the model scores.
        reads_pairs: whether prompt and response are a pair of texts to the model.
    """

    def __init__(
        self, vocabulary: Vocabulary, template: ChatTemplate | None, steps: StepWriter | None, *, reads_pairs: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self._steps = steps
        self._reads_pairs = reads_pairs

    def read(self, sample: Sample) -> Text:
        """Prompt and response as they stand; nothing is written before or behind them.

        Raises:
            InvalidRequest: the model cannot read such a prompt or response.
        """
        prompt = self._prompt_text(sample)
        prompt_ids = list(sample.prompt_token_ids or ()) if prompt is None else self._vocabulary.prompt_ids(prompt)
        if sample.response_token_ids is not None:
            response_ids = list(sample.response_token_ids)
            return Text(prompt_ids, response_ids, self._vocabulary.spans_of_ids(response_ids))
        response = sample.response or ""
        if self._steps is not None and self._steps.whole:
            return self._with_separators(self._steps, prompt, prompt_ids, response)
        if self._steps is not None:
            written = self._steps.write(response)
            return Text(prompt_ids, written.ids, written.spans, written.stops)
        if prompt is None or self._reads_pairs:
            return self._apart(prompt_ids, response)
        return self._as_one(prompt, prompt_ids, response)

    def _prompt_text(self, sample: Sample) -> str | None:
        """The prompt as the model reads it, rendered by the chat template; None where it was sent as ids."""
        if sample.prompt_token_ids is not None:
            return None
        if sample.messages is None:
            prompt = sample.prompt or ""
        elif self._template is None:
            raise InvalidRequest(
                "this model has no chat template: give `prompt` or `prompt_token_ids`",
                code="no_chat_template",
                field="messages",
            )
        else:
            prompt = self._template.prompt([message.model_dump() for message in sample.messages])
        return prompt if self._steps is None else self._steps.joined(prompt)

    def _with_separators(self, steps: StepWriter, prompt: str | None, prompt_ids: list[int], response: str) -> Text:
        """A response with its separators, read together with the prompt where that is text."""
        prompt, written, places = steps.written(prompt, response)
        if prompt is None:
            text = self._apart(prompt_ids, written)
        else:
            text = self._as_one(prompt, self._vocabulary.prompt_ids(prompt), written)
        text.steps = steps.stops(text.response_ids, response)
        text.spans = places.of(text.spans or [])
        return text

    def _apart(self, prompt_ids: list[int], response: str) -> Text:
        encoding = self._vocabulary.encode(response)
        return Text(prompt_ids, encoding.ids, self._vocabulary.spans_in_text(response, encoding))

    def _as_one(self, prompt: str, prompt_ids: list[int], response: str) -> Text:
        """Prompt and response read as one text, as the model was trained, and cut where the response begins."""
        encoding = self._vocabulary.encode(prompt + response)
        spans = self._vocabulary.spans_in_text(prompt + response, encoding)
        boundary = len(prompt.encode())
        begin = next((start for start, stop in spans if stop > boundary), boundary)
        # Many tokenizers read a blank with the word behind it; one that ends the prompt, as in "[/INST] So.", is then
        # the response's.
        if prompt.endswith(" ") and 0 < begin == boundary - 1:
            before = self._vocabulary.prompt_ids(prompt[:-1])
        else:
            before, begin = prompt_ids, boundary
        cut = len(before)
        crosses = any(stop > begin for _, stop in spans[:cut][-1:]) or any(
            start < begin for start, _ in spans[cut:][:1]
        )
        # Where a tokenizer rewrites the text, its offsets may hide a crossing; the prompt's own ids do not.
        if crosses or before != encoding.ids[:cut]:
            text = self._apart(prompt_ids, response)
            text.warnings.append(
                "split_boundary: read as one text, a token would hold the prompt's end and the response's beginning; "
                "the two were tokenised apart"
            )
            return text
        shifted = [(max(start - boundary, 0), max(stop - boundary, 0)) for start, stop in spans[cut:]]
        return Text(before, encoding.ids[cut:], shifted)
