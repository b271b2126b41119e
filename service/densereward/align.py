"""From a sample as a trainer sends it to ids, the response's place in them, the closing tokens and the slots.

Which position is scored comes from lengths held here, never from searching a pad or end token in the ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from densereward.capture import Need, ScoringInput, Span, Steps, missing_closing
from densereward.chat import ChatTemplate
from densereward.cuts import Cuts
from densereward.errors import InvalidRequest, ModelError, TooLong
from densereward.methods.base import Response
from densereward.slots import Slots
from densereward.steps import StepWriter
from densereward.tokens import Vocabulary
from densereward_client.wire import Message, Sample

__all__ = ["Aligned", "Aligner"]


@dataclass(frozen=True, slots=True)
class Aligned:
    """One sample, ready for the engine.

    Attributes:
        sequence: what the engine scores.
        slots: where the rewards go.
        response: what methods may know of the response.
        spans: [start, end) of the reward model's tokens in the response's bytes; None where they cannot be known.
        warnings: `code: message` each.
        variants: per method of the request, what else it needs to be scored.
        prefixes: closed prefixes that are sequences of their own.
        dropped: tokens that the prompt lost at its beginning.
    """

    sequence: ScoringInput
    slots: Slots
    response: Response
    spans: list[Span] | None
    warnings: list[str]
    variants: Sequence[Sequence[ScoringInput]] = ()
    prefixes: Sequence[ScoringInput] = ()
    dropped: int = 0

    @property
    def further(self) -> list[ScoringInput]:
        """All that is scored beside the sequence: variants, method by method, and then the prefixes."""
        return [*chain(*self.variants), *self.prefixes]


@dataclass(slots=True)
class _Text:
    """Ids of the two parts, and what was noticed on the way."""

    prompt_ids: list[int]
    response_ids: list[int]
    spans: list[Span] | None
    steps: Sequence[int] = ()
    warnings: list[str] = field(default_factory=list)


class Aligner:
    """Reads samples for one model.

    Args:
        tokenizer: the model's transformers tokenizer.
        max_length: tokens in the longest sequence the model reads.
        vocabulary_size: token ids are below it.
        needs_prompt: whether an empty prompt is refused.
        unit: what the model scores.
        steps: how steps are written, where that is what it scores.
        gate: what prompts must end with, for a model that reads where that begins.
        score_token: what is written behind all that closes a response, where the score is read there.
        tokens: ids that the tokenizer must give these tokens.
        reads_pairs: whether prompt and response are a pair of texts to the model.

    Raises:
        ModelError: the tokenizer or its template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        vocabulary_size: int,
        *,
        needs_prompt: bool = False,
        unit: str = "sequence",
        steps: Steps | None = None,
        gate: str | None = None,
        score_token: int | None = None,
        tokens: Mapping[str, int] | None = None,
        reads_pairs: bool = False,
    ) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        plain = steps is not None and steps.joint is not None
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template and not plain else None
        self.max_length = max_length
        self._vocabulary_size = vocabulary_size
        self._needs_prompt = needs_prompt
        self._unit = unit
        self._gate = [] if gate is None else self.vocabulary.encode(gate).ids
        if self.template is None:
            self.closing_ids = self.vocabulary.suffix_ids
        else:
            self.closing_ids = self.vocabulary.ids_behind(self.template.closing)
        self._ending = [] if score_token is None else [score_token]
        self.closing_ids = [*self.closing_ids, *self._ending]
        self._between = None
        if reads_pairs:
            self._between, self.closing_ids = self._pair(tokenizer)
            self._ending = self.closing_ids
        # A blank or a line break that closing tokens begin with is nothing but text until a special token follows.
        special = (i for i, token in enumerate(self.closing_ids) if self.vocabulary.is_added(token))
        self._least_closing = 1 + next(special, len(self.closing_ids) - 1)
        blank = self.vocabulary.encode(" ").ids
        self._blank_id = blank[0] if len(blank) == 1 else None
        if outside := [token for token in self.closing_ids if token >= vocabulary_size]:
            raise ModelError(
                f"the tokenizer closes a response with {outside}, and the model has {vocabulary_size} tokens; it is "
                "another model's tokenizer"
            )
        self._check_tokens(tokens or {})
        self._steps = None
        if steps is not None:
            self._steps = StepWriter(self.vocabulary, steps, self.closing_ids, vocabulary_size)
        # TRL's PRMTrainer, whose separator is what it cuts at, writes a BOS wherever there is one.
        self._always_bos = steps is not None and steps.separator == steps.cut and self.vocabulary.bos_id is not None
        if unit != "sequence":
            self.closing_ids = []  # nothing is read behind the last token or step

    def _pair(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """What stands between the texts of a pair, and behind them."""
        if tokenizer.chat_template:
            raise ModelError("the model reads pairs of texts, and its chat template writes dialogues; take it away")
        before, between, after = self.vocabulary.pair_frame()
        if before != self.vocabulary.prefix_ids:
            raise ModelError(f"the tokenizer begins a pair with {before} and a text with {self.vocabulary.prefix_ids}")
        return between, after

    def _check_tokens(self, tokens: Mapping[str, int]) -> None:
        for token, expected in tokens.items():
            if (found := self.vocabulary.id_of(token)) != expected:
                raise ModelError(
                    f"the tokenizer has {found} for {token!r} and the model was trained with {expected}; it is another "
                    "model's tokenizer"
                )

    @property
    def adds_bos(self) -> bool:
        """Whether prompts given as text get a BOS they do not begin with."""
        return bool(self._prefix_ids)

    @property
    def frame(self) -> tuple[object, ...]:
        """Whatever is written round prompts and responses, beside the closing tokens."""
        return (self._prefix_ids, self._between, self._ending)

    @property
    def closing_text(self) -> str | None:
        """What begins them, up to a special token; None where no text is read so."""
        beginning = self.closing_ids[: self._least_closing]
        text = self.vocabulary.bytes_of(beginning).decode(errors="replace")
        return text if self.vocabulary.ids_behind(text) == beginning else None

    @property
    def _prefix_ids(self) -> list[int]:
        bos = self.vocabulary.bos_id
        return [bos] if self._always_bos and bos is not None else self.vocabulary.prefix_ids

    def align(self, sample: Sample, needs: frozenset[Need] = frozenset(), *, truncate: bool = False) -> Aligned:
        """Read one sample, for an engine that must keep `needs` of it.

        With `truncate`, a prompt loses as many tokens at its beginning as the sequence is too long, but for a BOS.

        Raises:
            InvalidRequest: a field, a length or an id that cannot be served.
            TooLong: more tokens than the model reads.
        """
        if self._steps is not None:
            self._check_vocabulary(sample.response_token_ids or [])
            sample = self._steps.as_text(sample)
        text = self._tokenize(sample)
        sequence = self._sequence(sample, text, needs)
        dropped = self._shortened(text, sequence.longest - self.max_length) if truncate else 0
        if dropped:
            sequence = self._sequence(sample, text, needs)
        if self._needs_prompt and not sequence.prompt_length:
            raise InvalidRequest(
                "a language model gives the first token of all no probability; give a prompt", code="empty_prompt"
            )
        if self._unit == "token" and not text.steps:
            raise InvalidRequest("this model scores tokens, and the response holds none", code="empty_response")
        self.check_length(sequence)
        slots = _slots(sample, len(text.response_ids))
        response = self._response(sample, text, slots)
        return Aligned(sequence, slots, response, text.spans, text.warnings, dropped=dropped)

    def _sequence(self, sample: Sample, text: _Text, needs: frozenset[Need]) -> ScoringInput:
        ending = self.closing_ids if sample.finished else self._ending
        closing = missing_closing(text.response_ids, ending, self._least_closing)
        token_ids = [*text.prompt_ids, *text.response_ids, *closing]
        self._check_vocabulary(token_ids)
        return ScoringInput(
            token_ids=token_ids,
            prompt_length=len(text.prompt_ids),
            response_length=len(text.response_ids),
            scored_position=len(token_ids) - 1,
            closing_ids=self.closing_ids,
            needs=needs,
            steps=[len(text.prompt_ids) + stop - 1 for stop in text.steps],
            gate=self._gate_in(text.prompt_ids),
            ending=self._ending,
            least_closing=self._least_closing,
        )

    def _gate_in(self, prompt_ids: list[int]) -> int:
        """Where the prompt's end begins at which the model reads what the prompt is about."""
        size = len(self._gate)
        if size and prompt_ids[-size:] != self._gate:
            end = self.vocabulary.bytes_of(self._gate).decode(errors="replace")
            raise InvalidRequest(
                f"this model weighs its objectives where a prompt ends with {end!r}, and this one does not; give "
                "`messages`",
                code="no_gate",
            )
        return len(prompt_ids) - size if size else 0

    def _shortened(self, text: _Text, beyond: int) -> int:
        """Take the tokens that are too many from the prompt's beginning, if it has as many; how many those were."""
        begins = [frame for frame in (self._prefix_ids, [self.vocabulary.bos_id]) if frame]
        kept = next((len(frame) for frame in begins if text.prompt_ids[: len(frame)] == frame), 0)
        if not 0 < beyond < len(text.prompt_ids) - kept - len(self._between or ()):
            return 0
        del text.prompt_ids[kept : kept + beyond]
        what = "" if not kept else " after the BOS" if self._between is None else " after what begins a pair"
        text.warnings.append(f"truncated: the prompt lost its first {beyond} tokens{what}")
        return beyond

    def whole(self, given: str | Sequence[int] | Sequence[Message], *, special_tokens: bool) -> Sample:
        """A text, ids or a dialogue that hold the response already, to be scored at their last token as they stand.

        With `special_tokens`, what the tokenizer itself writes round a text is written where it is not there yet; ids
        are left as they are.

        Raises:
            InvalidRequest: the model must know where the response begins, or reads no dialogues.
        """
        self._check_reads_wholes()
        return Sample(prompt_token_ids=[], response_token_ids=self._whole_ids(given, special_tokens), finished=False)

    def _whole_ids(self, given: str | Sequence[int] | Sequence[Message], special_tokens: bool) -> list[int]:
        if isinstance(given, str):
            text = given
        elif given and isinstance(given[0], Message):
            text = self._template("`input`").whole([each.model_dump() for each in given if isinstance(each, Message)])
        else:
            return [each for each in given if isinstance(each, int)]
        ids = self.vocabulary.encode(text).ids
        if not special_tokens:
            return ids
        before, behind = self.vocabulary.prefix_ids, self.vocabulary.suffix_ids
        ids = ids if ids[: len(before)] == before else [*before, *ids]
        return [*ids, *missing_closing(ids, behind)]

    def _check_reads_wholes(self) -> None:
        reasons = {
            "judges steps or tokens of a response": self._unit != "sequence",
            "reads prompt and response as a pair of texts": self._between is not None,
            "gives the response's tokens alone a probability": self._needs_prompt,
            "weighs its objectives where the prompt ends": bool(self._gate),
            "is read at a token that is written behind a response": bool(self._ending),
        }
        for reason in (reason for reason, applies in reasons.items() if applies):
            raise InvalidRequest(
                f"this model {reason}, so a text that holds both cannot be scored as it stands; give prompt and "
                "response to POST /rewards or /token_rewards",
                code="needs_prompt_and_response",
            )

    def instructed(self, sample: Sample, sequence: ScoringInput, instruction: str) -> ScoringInput:
        """An aligned sample whose prompt begins with an instruction.

        Raises:
            InvalidRequest: there is no telling where in the prompt the instruction would go.
        """
        if sample.messages:
            first = sample.messages[0]
            told = first.model_copy(update={"content": f"{instruction}\n\n{first.content}"})
            sample = sample.model_copy(update={"messages": [told, *sample.messages[1:]]})
        elif sample.prompt is not None and self.template is None:
            sample = sample.model_copy(update={"prompt": f"{instruction}\n\n{sample.prompt}"})
        else:
            raise InvalidRequest(
                "an instruction goes before the first message, and a prompt that is rendered already does not show "
                "where that is; give `messages`",
                code="needs_messages",
                field=next(
                    name for name in ("prompt", "messages", "prompt_token_ids") if getattr(sample, name) is not None
                ),
            )
        return sequence.with_prompt(self._tokenize(sample).prompt_ids)

    def _response(self, sample: Sample, text: _Text, slots: Slots) -> Response:
        cuts = None
        if text.spans is not None:
            written = sample.response
            read = partial(self.vocabulary.bytes_of, text.response_ids) if written is None else written.encode
            cuts = Cuts(read, text.spans, slots.spans)
        return Response(
            length=len(text.response_ids),
            count=slots.count,
            ids=text.response_ids,
            blank_id=self._blank_id,
            weights=None if sample.weights is None else np.asarray(sample.weights, dtype=np.float64),
            entropies=None if sample.token_entropies is None else np.asarray(sample.token_entropies, dtype=np.float64),
            finished=sample.finished or (self._ending == self.closing_ids != []),
            cuts=cuts,
            steps=text.steps,
        )

    def _tokenize(self, sample: Sample) -> _Text:
        self._check_vocabulary(sample.prompt_token_ids or [])
        self._check_vocabulary(sample.response_token_ids or [])
        if sample.prompt_token_ids is not None:
            prompt_text, prompt_ids = None, list(sample.prompt_token_ids)
            self._check_frame(prompt_ids)
        else:
            prompt_text = self._joined(self._prompt_text(sample))
            bare_ids = self.vocabulary.prompt_ids(prompt_text)
            prompt_ids = [*self._with_bos(sample, bare_ids), *(self._between or ())]
        if sample.response_token_ids is not None:
            response_ids = list(sample.response_token_ids)
            text = _Text(prompt_ids, response_ids, self.vocabulary.spans_of_ids(response_ids))
        elif self._steps is not None and self._steps.whole:
            text = self._in_whole(sample, prompt_text, prompt_ids)
        elif self._steps is not None:
            written = self._steps.write(sample.response or "")
            text = _Text(prompt_ids, written.ids, written.spans, written.stops)
        elif prompt_text is None or self._between is not None:
            text = self._apart(prompt_ids, sample.response or "")
        else:
            text = self._together(sample, prompt_text, bare_ids, sample.response or "")
        if self._unit == "token":
            text.steps = range(1, len(text.response_ids) + 1)
        text.warnings.extend(self._notices(sample, text))
        return text

    def _check_frame(self, prompt_ids: Sequence[int]) -> None:
        """The first of a pair's texts stands between tokens of its own, which ids that are given must hold."""
        if self._between is None:
            return
        before, between = self._prefix_ids, self._between
        framed = list(prompt_ids[: len(before)]) == before and list(prompt_ids[-len(between) :]) == between
        if not framed or len(prompt_ids) < len(before) + len(between):
            raise InvalidRequest(
                f"this model reads pairs of texts, of which the first begins with {before} and ends with {between}; "
                "give `prompt`, or these ids too",
                code="no_frame",
                field="prompt_token_ids",
            )

    def _joined(self, prompt: str) -> str:
        """A prompt as it stands before steps that are tokenised by themselves."""
        return prompt if self._steps is None else self._steps.joined(prompt)

    def _in_whole(self, sample: Sample, prompt: str | None, prompt_ids: list[int]) -> _Text:
        """A response with its separators, read together with the prompt where that is text."""
        if self._steps is None:
            raise ModelError("the model does not judge steps")
        prompt, written, places = self._steps.written(prompt, sample.response or "")
        if prompt is None:
            text = self._apart(prompt_ids, written)
        else:
            text = self._together(sample, prompt, self.vocabulary.prompt_ids(prompt), written)
        text.steps = self._steps.stops(text.response_ids, sample.response or "")
        text.spans = places.of(text.spans or [])
        return text

    def _prompt_text(self, sample: Sample) -> str:
        if sample.messages is None:
            return sample.prompt or ""
        return self._template().prompt([message.model_dump() for message in sample.messages])

    def _template(self, instead: str = "`prompt` or `prompt_token_ids`") -> ChatTemplate:
        if self.template is None:
            raise InvalidRequest(
                f"this model has no chat template: give {instead}",
                code="no_chat_template",
                field="messages",
            )
        return self.template

    def _with_bos(self, sample: Sample, ids: list[int]) -> list[int]:
        """BOS where the tokenizer adds one and the text lacks it; a template has written its own or wants none."""
        prefix = self._prefix_ids
        templated = sample.messages is not None and not self._always_bos
        return ids if templated or ids[: len(prefix)] == prefix else [*prefix, *ids]

    def _apart(self, prompt_ids: list[int], response: str) -> _Text:
        encoding = self.vocabulary.encode(response)
        return _Text(prompt_ids, encoding.ids, self.vocabulary.spans_in_text(response, encoding))

    def _together(self, sample: Sample, prompt: str, prompt_ids: list[int], response: str) -> _Text:
        """Prompt and response read as one text, as the model was trained, and cut where the response begins."""
        encoding = self.vocabulary.encode(prompt + response)
        spans = self.vocabulary.spans_in_text(prompt + response, encoding)
        boundary = len(prompt.encode())
        begin = next((start for start, stop in spans if stop > boundary), boundary)
        # Many tokenizers read a blank with the word behind it; one that ends the prompt, as in "[/INST] So.", is then
        # the response's.
        if prompt.endswith(" ") and 0 < begin == boundary - 1:
            before = self.vocabulary.prompt_ids(prompt[:-1])
        else:
            before, begin = prompt_ids, boundary
        cut = len(before)
        crosses = any(stop > begin for _, stop in spans[:cut][-1:]) or any(
            start < begin for start, _ in spans[cut:][:1]
        )
        # Where a tokenizer rewrites the text, its offsets may hide a crossing; the prompt's own ids do not.
        if crosses or before != encoding.ids[:cut]:
            text = self._apart(self._with_bos(sample, prompt_ids), response)
            text.warnings.append(
                "split_boundary: read as one text, a token would hold the prompt's end and the response's beginning; "
                "the two were tokenised apart"
            )
            return text
        shifted = [(max(start - boundary, 0), max(stop - boundary, 0)) for start, stop in spans[cut:]]
        return _Text(self._with_bos(sample, before), encoding.ids[cut:], shifted)

    def _notices(self, sample: Sample, text: _Text) -> list[str]:
        notices = []
        bos = self.vocabulary.bos_id
        if bos is not None and text.prompt_ids[:2] == [bos, bos]:
            notices.append("doubled_bos: the prompt begins with two BOS tokens; it was scored as it stands")
        if self._steps is not None and not sample.finished:
            notices.append("unfinished: the last step was cut by length, and is judged as if it had ended")
        response = sample.response
        template = None if sample.messages is None else self.template
        if response and response != response.strip() and template is not None and template.strips:
            notices.append(
                "unstripped_response: the model's template strips white space around an answer; the response was "
                "scored as it stands"
            )
        return notices

    def check_length(self, sequence: ScoringInput) -> None:
        """Refuse what cannot be scored.

        Raises:
            InvalidRequest: no token at all.
            TooLong: more tokens than the model reads.
        """
        if not sequence.token_ids:
            raise InvalidRequest("prompt and response hold no token, so there is nothing to score", code="empty_sample")
        if sequence.longest > self.max_length:
            ones = "closing ones" if self._steps is None else "separators"
            raise TooLong(
                f"{sequence.longest} tokens with the {ones}, and the model reads {self.max_length}; shorten the "
                "prompt or the response (nothing is truncated here)",
                tokens=sequence.longest,
                limit=self.max_length,
            )

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
        if lowest < 0 or highest >= self._vocabulary_size:
            raise InvalidRequest(
                f"token id {lowest if lowest < 0 else highest} is not in the model's vocabulary of "
                f"{self._vocabulary_size}; are these another model's tokens?",
                code="id_out_of_vocabulary",
                limit=self._vocabulary_size,
            )


def _slots(sample: Sample, response_length: int) -> Slots:
    """Where the rewards go, once every list that names slots has been found to have their number."""
    spans = sample.response_spans
    if spans is not None:
        _check_spans(spans, len((sample.response or "").encode()), response_length)
    count = response_length if spans is None else len(spans)
    for name in ("response_mask", "weights", "token_entropies"):
        values = getattr(sample, name)
        if values is not None and len(values) != count:
            unit = "the response's tokens" if spans is None else "response_spans"
            raise InvalidRequest(
                f"{name} has {len(values)} entries for {count} {unit}",
                code="length_mismatch",
                field=name,
                given=len(values),
                expected=count,
            )
    kept = None if sample.response_mask is None else [i for i, keep in enumerate(sample.response_mask) if keep]
    return Slots(count, spans, kept)


def _check_spans(spans: Sequence[Span], size: int, response_length: int) -> None:
    if response_length and not spans:
        raise InvalidRequest("response_spans is empty", code="invalid_spans", field="response_spans")
    reached = 0
    for i, (start, stop) in enumerate(spans):
        if not reached <= start <= stop <= size:
            raise InvalidRequest(
                f"response_spans[{i}] = [{start}, {stop}] must lie in order, without overlap, within the response's "
                f"{size} UTF-8 bytes",
                code="invalid_spans",
                field="response_spans",
            )
        reached = stop
