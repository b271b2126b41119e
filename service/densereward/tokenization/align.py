"""From a sample as a trainer sends it to ids, the response's place in them, the closing tokens and the slots.

Which position is scored comes from lengths held here, never from searching a pad or end token in the ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from densereward.capture import Need, ScoringInput, Span, Steps
from densereward.errors import InvalidRequest, ModelError, TooLong
from densereward.methods.base import Response
from densereward.methods.boundaries import Cuts
from densereward.scoring.placement import Slots, slots_of
from densereward.tokenization.frame import Frame
from densereward.tokenization.preassembled import WholeReader
from densereward.tokenization.steps import StepWriter
from densereward.tokenization.texts import Text, TextReader
from densereward.tokenization.vocabulary import Vocabulary
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
        self._frame = Frame(
            tokenizer,
            self.vocabulary,
            vocabulary_size,
            unit=unit,
            steps=steps,
            gate=gate,
            score_token=score_token,
            reads_pairs=reads_pairs,
        )
        self.template = self._frame.template
        self.closing_ids = self._frame.closing_ids
        self.max_length = max_length
        self._vocabulary_size = vocabulary_size
        self._needs_prompt = needs_prompt
        self._unit = unit
        blank = self.vocabulary.encode(" ").ids
        self._blank_id = blank[0] if len(blank) == 1 else None
        self._check_tokens(tokens or {})
        self._steps = None
        if steps is not None:
            closing_ids = self._frame.template_closing_ids
            self._steps = StepWriter(self.vocabulary, steps, closing_ids, vocabulary_size)
        self._texts = TextReader(self.vocabulary, self._frame, self._steps)
        self._wholes = WholeReader(self.vocabulary, self._frame, unit, needs_prompt=needs_prompt)

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
        return bool(self._frame.prefix_ids)

    @property
    def frame(self) -> tuple[object, ...]:
        """Whatever is written round prompts and responses, beside the closing tokens."""
        return (self._frame.prefix_ids, self._frame.between, self._frame.ending)

    @property
    def closing_text(self) -> str | None:
        """What begins the closing tokens, up to a special token; None where no text is read so."""
        return self._frame.closing_text

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
        text = self._read(sample)
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
        slots = slots_of(sample, len(text.response_ids))
        response = self._response(sample, text, slots)
        return Aligned(sequence, slots, response, text.spans, text.warnings, dropped=dropped)

    def _read(self, sample: Sample) -> Text:
        self._check_vocabulary(sample.prompt_token_ids or [])
        self._check_vocabulary(sample.response_token_ids or [])
        text = self._texts.read(sample)
        if self._unit == "token":
            text.steps = range(1, len(text.response_ids) + 1)
        return text

    def _sequence(self, sample: Sample, text: Text, needs: frozenset[Need]) -> ScoringInput:
        closing = self._frame.closing_behind(text.response_ids, finished=sample.finished)
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
            gate=self._frame.gate_in(text.prompt_ids),
            ending=self._frame.ending,
            least_closing=self._frame.least_closing,
        )

    def _shortened(self, text: Text, beyond: int) -> int:
        """Take the tokens that are too many from the prompt's beginning, if it has as many; how many those were."""
        kept, between = self._frame.kept_of(text.prompt_ids), self._frame.between
        if not 0 < beyond < len(text.prompt_ids) - kept - len(between or ()):
            return 0
        del text.prompt_ids[kept : kept + beyond]
        what = "" if not kept else " after the BOS" if between is None else " after what begins a pair"
        text.warnings.append(f"truncated: the prompt lost its first {beyond} tokens{what}")
        return beyond

    def whole(self, given: str | Sequence[int] | Sequence[Message], *, special_tokens: bool) -> Sample:
        """A text, ids or a dialogue that hold the response already, to be scored at their last token as they stand.

        With `special_tokens`, what the tokenizer itself writes round a text is written where it is not there yet; ids
        are left as they are.

        Raises:
            InvalidRequest: the model must know where the response begins, or reads no dialogues.
        """
        return self._wholes.read(given, special_tokens=special_tokens)

    def instructed(self, sample: Sample, sequence: ScoringInput, instruction: str) -> ScoringInput:
        """An aligned sample whose prompt begins with an instruction.

        Raises:
            InvalidRequest: there is no telling where in the prompt the instruction would go.
        """
        sample = self._frame.instructed(sample, instruction)
        return sequence.with_prompt(self._read(sample).prompt_ids)

    def _response(self, sample: Sample, text: Text, slots: Slots) -> Response:
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
            finished=sample.finished or self._frame.closes_all,
            cuts=cuts,
            steps=text.steps,
        )

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
