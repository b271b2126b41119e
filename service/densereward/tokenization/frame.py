"""What is written around prompt and response: BOS, separators of a pair, closing tokens; and the gate in the prompt.

All of it is read once from the model's tokenizer and chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from densereward.capture import Need, ScoringInput, Steps, missing_closing
from densereward.errors import InvalidRequest, ModelError
from densereward.tokenization.chat_template import ChatTemplate
from densereward.tokenization.texts import Text
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Sample

__all__ = ["Frame"]


class Frame:
    """What one model's prompts and responses are written into.

    Args:
        tokenizer: the model's transformers tokenizer.
        vocabulary: the same, read in bytes.
        vocabulary_size: token ids are below it.
        unit: what the model scores.
        steps: how steps are written, where that is what it scores.
        gate: what prompts must end with, for a model that reads where that begins.
        score_token: what is written behind all that closes a response, where the score is read there.
        reads_pairs: whether prompt and response are a pair of texts to the model.

    Attributes:
        template: what writes dialogues; None for a model that reads none.
        between: what stands between the texts of a pair; None where prompt and response are one text.
        ending: what is written behind every response, also behind one that was cut by length.
        closing_ids: what is written behind a finished response; nothing where only tokens or steps are read.
        template_closing_ids: what the template writes behind a response, read or not.
        least_closing: this many closing tokens at a response's end count as such; fewer are text like any other.
        gate_ids: what prompts must end with; empty where they may end with anything.

    Raises:
        ModelError: the tokenizer or its template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: Vocabulary,
        vocabulary_size: int,
        *,
        unit: str = "sequence",
        steps: Steps | None = None,
        gate: str | None = None,
        score_token: int | None = None,
        reads_pairs: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        plain = steps is not None and steps.joint is not None
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template and not plain else None
        self.gate_ids = [] if gate is None else vocabulary.encode(gate).ids
        closing = vocabulary.suffix_ids if self.template is None else vocabulary.ids_behind(self.template.closing)
        self.between: list[int] | None = None
        self.ending = [] if score_token is None else [score_token]
        self.template_closing_ids = [*closing, *self.ending]
        if reads_pairs:
            self.between, self.template_closing_ids = _pair(tokenizer, vocabulary)
            self.ending = self.template_closing_ids
        if outside := [token for token in self.template_closing_ids if token >= vocabulary_size]:
            raise ModelError(
                f"the tokenizer closes a response with {outside}, and the model has {vocabulary_size} tokens; it is "
                "another model's tokenizer"
            )
        # Closing tokens may begin with a blank or a line break, which is ordinary text until a special token follows.
        special = (i for i, token in enumerate(self.template_closing_ids) if vocabulary.is_added(token))
        self.least_closing = 1 + next(special, len(self.template_closing_ids) - 1)
        self.closing_ids = self.template_closing_ids if unit == "sequence" else []
        self._judges_steps = steps is not None
        # TRL's PRMTrainer, whose separator is what it splits at, writes a BOS wherever the tokenizer has one.
        self._always_bos = steps is not None and steps.separator == steps.cut and vocabulary.bos_id is not None

    @property
    def prefix_ids(self) -> list[int]:
        """Written before a prompt that was sent as text and does not begin with it."""
        bos = self._vocabulary.bos_id
        return [bos] if self._always_bos and bos is not None else self._vocabulary.prefix_ids

    @property
    def closing_text(self) -> str | None:
        """The closing tokens as text, up to the first special token; None where no text is read as these."""
        beginning = self.closing_ids[: self.least_closing]
        text = self._vocabulary.bytes_of(beginning).decode(errors="replace")
        return text if self._vocabulary.ids_behind(text) == beginning else None

    @property
    def closes_all(self) -> bool:
        """Whether a response that was cut by length is closed like any other."""
        return self.ending == self.closing_ids != []

    def open(self, sample: Sample, text: Text) -> None:
        """Write what stands before the response, and note what a trainer should know about the two parts.

        Raises:
            InvalidRequest: a prompt that was sent as ids lacks it.
        """
        if sample.prompt_token_ids is None:
            text.prompt_ids = [*self._with_bos(sample, text.prompt_ids), *(self.between or ())]
        else:
            self._check_prompt(text.prompt_ids)
        text.warnings.extend(self._notices(sample, text.prompt_ids))

    def close(self, text: Text, needs: frozenset[Need], *, finished: bool) -> ScoringInput:
        """The whole sequence: prompt, response and closing tokens, with the positions that are scored.

        Raises:
            InvalidRequest: the prompt does not end as the model needs it.
        """
        closing = self.closing_behind(text.response_ids, finished=finished)
        token_ids = [*text.prompt_ids, *text.response_ids, *closing]
        return ScoringInput(
            token_ids=token_ids,
            prompt_length=len(text.prompt_ids),
            response_length=len(text.response_ids),
            scored_position=len(token_ids) - 1,
            closing_ids=self.closing_ids,
            needs=needs,
            steps=[len(text.prompt_ids) + stop - 1 for stop in text.steps],
            gate=self._gate_in(text.prompt_ids),
            ending=self.ending,
            least_closing=self.least_closing,
        )

    def shorten(self, text: Text, excess: int) -> int:
        """Take `excess` tokens from the prompt's beginning, if it has as many; how many were taken.

        A BOS stays, and so does what begins a pair.
        """
        starts = [start for start in (self.prefix_ids, [self._vocabulary.bos_id]) if start]
        kept = next((len(start) for start in starts if text.prompt_ids[: len(start)] == start), 0)
        if not 0 < excess < len(text.prompt_ids) - kept - len(self.between or ()):
            return 0
        del text.prompt_ids[kept : kept + excess]
        where = "" if not kept else " after the BOS" if self.between is None else " after what begins a pair"
        text.warnings.append(f"truncated: the prompt lost its first {excess} tokens{where}")
        return excess

    def closing_behind(self, response_ids: Sequence[int], *, finished: bool) -> Sequence[int]:
        """What a response does not already end with of what is written behind it."""
        return missing_closing(response_ids, self.closing_ids if finished else self.ending, self.least_closing)

    def _with_bos(self, sample: Sample, ids: list[int]) -> list[int]:
        """BOS where the tokenizer adds one and the text lacks it; a template has written its own or wants none."""
        prefix = self.prefix_ids
        templated = sample.messages is not None and not self._always_bos
        return ids if templated or ids[: len(prefix)] == prefix else [*prefix, *ids]

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """A prompt of a pair that was sent as ids must hold the special tokens around it."""
        if self.between is None:
            return
        before, between = self.prefix_ids, self.between
        framed = list(prompt_ids[: len(before)]) == before and list(prompt_ids[-len(between) :]) == between
        if not framed or len(prompt_ids) < len(before) + len(between):
            raise InvalidRequest(
                f"this model reads pairs of texts, of which the first begins with {before} and ends with {between}; "
                "give `prompt`, or these ids too",
                code="no_frame",
                field="prompt_token_ids",
            )

    def _gate_in(self, prompt_ids: list[int]) -> int:
        """The position of the gate: where the end of the prompt begins, at which the model weighs its objectives."""
        size = len(self.gate_ids)
        if size and prompt_ids[-size:] != self.gate_ids:
            end = self._vocabulary.bytes_of(self.gate_ids).decode(errors="replace")
            raise InvalidRequest(
                f"this model weighs its objectives where a prompt ends with {end!r}, and this one does not; give "
                "`messages`",
                code="no_gate",
            )
        return len(prompt_ids) - size if size else 0

    def _notices(self, sample: Sample, prompt_ids: list[int]) -> list[str]:
        notices = []
        bos = self._vocabulary.bos_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            notices.append("doubled_bos: the prompt begins with two BOS tokens; it was scored as it stands")
        if self._judges_steps and not sample.finished:
            notices.append("unfinished: the last step was cut by length, and is judged as if it had ended")
        response = sample.response
        template = None if sample.messages is None else self.template
        if response and response != response.strip() and template is not None and template.strips:
            notices.append(
                "unstripped_response: the model's template strips white space around an answer; the response was "
                "scored as it stands"
            )
        return notices

    def instructed(self, sample: Sample, instruction: str) -> Sample:
        """A sample whose prompt begins with an instruction.

        Raises:
            InvalidRequest: there is no telling where in the prompt the instruction would go.
        """
        if sample.messages:
            first = sample.messages[0]
            told = first.model_copy(update={"content": f"{instruction}\n\n{first.content}"})
            return sample.model_copy(update={"messages": [told, *sample.messages[1:]]})
        if sample.prompt is not None and self.template is None:
            return sample.model_copy(update={"prompt": f"{instruction}\n\n{sample.prompt}"})
        given = next(name for name in ("prompt", "messages", "prompt_token_ids") if getattr(sample, name) is not None)
        raise InvalidRequest(
            "an instruction goes before the first message, and a prompt that is rendered already does not show where "
            "that is; give `messages`",
            code="needs_messages",
            field=given,
        )


def _pair(tokenizer: Any, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """The special tokens between the texts of a pair, and behind them."""
    if tokenizer.chat_template:
        raise ModelError("the model reads pairs of texts, and its chat template writes dialogues; take it away")
    before, between, after = vocabulary.pair_frame()
    if before != vocabulary.prefix_ids:
        raise ModelError(f"the tokenizer begins a pair with {before} and a text with {vocabulary.prefix_ids}")
    return between, after
