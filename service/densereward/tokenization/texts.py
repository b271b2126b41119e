"""How the two texts of a sample become ids: as one text, as a pair, or step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from densereward.capture import Span
from densereward.tokenization.frame import Frame
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
        frame: what its texts stand in.
        steps: what writes responses step by step, where steps are what the model scores.
    """

    def __init__(self, vocabulary: Vocabulary, frame: Frame, steps: StepWriter | None) -> None:
        self._vocabulary = vocabulary
        self._frame = frame
        self._steps = steps

    def read(self, sample: Sample) -> Text:
        """Prompt and response, with all that stands before the response and nothing that closes it.

        Raises:
            InvalidRequest: the model cannot read such a prompt or response.
        """
        if sample.prompt_token_ids is not None:
            prompt_text, prompt_ids = None, list(sample.prompt_token_ids)
            self._frame.check_prompt(prompt_ids)
        else:
            prompt_text = self._joined(self._prompt_text(sample))
            bare_ids = self._vocabulary.prompt_ids(prompt_text)
            prompt_ids = [*self._frame.with_bos(sample, bare_ids), *(self._frame.between or ())]
        if sample.response_token_ids is not None:
            response_ids = list(sample.response_token_ids)
            text = Text(prompt_ids, response_ids, self._vocabulary.spans_of_ids(response_ids))
        elif self._steps is not None and self._steps.whole:
            text = self._in_whole(self._steps, sample, prompt_text, prompt_ids)
        elif self._steps is not None:
            written = self._steps.write(sample.response or "")
            text = Text(prompt_ids, written.ids, written.spans, written.stops)
        elif prompt_text is None or self._frame.between is not None:
            text = self._apart(prompt_ids, sample.response or "")
        else:
            text = self._together(sample, prompt_text, bare_ids, sample.response or "")
        text.warnings.extend(self._notices(sample, text))
        return text

    def _prompt_text(self, sample: Sample) -> str:
        if sample.messages is None:
            return sample.prompt or ""
        return self._frame.dialogues().prompt([message.model_dump() for message in sample.messages])

    def _joined(self, prompt: str) -> str:
        """A prompt as it stands before steps that are tokenised by themselves."""
        return prompt if self._steps is None else self._steps.joined(prompt)

    def _in_whole(self, steps: StepWriter, sample: Sample, prompt: str | None, prompt_ids: list[int]) -> Text:
        """A response with its separators, read together with the prompt where that is text."""
        prompt, written, places = steps.written(prompt, sample.response or "")
        if prompt is None:
            text = self._apart(prompt_ids, written)
        else:
            text = self._together(sample, prompt, self._vocabulary.prompt_ids(prompt), written)
        text.steps = steps.stops(text.response_ids, sample.response or "")
        text.spans = places.of(text.spans or [])
        return text

    def _apart(self, prompt_ids: list[int], response: str) -> Text:
        encoding = self._vocabulary.encode(response)
        return Text(prompt_ids, encoding.ids, self._vocabulary.spans_in_text(response, encoding))

    def _together(self, sample: Sample, prompt: str, prompt_ids: list[int], response: str) -> Text:
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
            text = self._apart(self._frame.with_bos(sample, prompt_ids), response)
            text.warnings.append(
                "split_boundary: read as one text, a token would hold the prompt's end and the response's beginning; "
                "the two were tokenised apart"
            )
            return text
        shifted = [(max(start - boundary, 0), max(stop - boundary, 0)) for start, stop in spans[cut:]]
        return Text(self._frame.with_bos(sample, before), encoding.ids[cut:], shifted)

    def _notices(self, sample: Sample, text: Text) -> list[str]:
        notices = []
        bos = self._vocabulary.bos_id
        if bos is not None and text.prompt_ids[:2] == [bos, bos]:
            notices.append("doubled_bos: the prompt begins with two BOS tokens; it was scored as it stands")
        if self._steps is not None and not sample.finished:
            notices.append("unfinished: the last step was cut by length, and is judged as if it had ended")
        response = sample.response
        template = None if sample.messages is None else self._frame.template
        if response and response != response.strip() and template is not None and template.strips:
            notices.append(
                "unstripped_response: the model's template strips white space around an answer; the response was "
                "scored as it stands"
            )
        return notices
