"""From a sample as a trainer sends it to one sequence of ids for the engine, in one straight trip.

    read      prompt and response become ids, and the response's byte spans are kept           (texts, steps)
    frame     the prompt gets what stands before the response: BOS, separators of a pair       (frame)
    close     the closing tokens follow; which positions are scored is counted, never searched (frame)
    check     the length, and every id

The chat template is applied in `texts`, which renders messages with `chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from densereward.capture import Need, ScoringInput, Span, Steps
from densereward.errors import InvalidRequest, ModelError, TooLong
from densereward.tokenization.frame import Frame
from densereward.tokenization.preassembled import PreassembledReader
from densereward.tokenization.steps import StepWriter
from densereward.tokenization.texts import Text, TextReader
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Message, Sample

__all__ = ["Aligned", "Aligner"]


@dataclass(frozen=True, slots=True)
class Aligned:
    """One sample as ids.

    Attributes:
        sample: as it was read. For a model that judges steps the response is text, and its ids became spans.
        sequence: what the engine scores.
        response_ids: T of them.
        spans: [start, end) of the response's ids in its UTF-8 bytes; None where they cannot be known.
        steps: response tokens before the end of each step, for a model that judges steps, or single tokens.
        finished: whether closing tokens follow the response.
        warnings: `code: message` each.
        dropped: tokens that the prompt lost at its beginning.
    """

    sample: Sample
    sequence: ScoringInput
    response_ids: Sequence[int]
    spans: list[Span] | None
    steps: Sequence[int]
    finished: bool
    warnings: list[str]
    dropped: int = 0


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
        self._check_tokens(tokens or {})
        self._steps = None
        if steps is not None:
            closing_ids = self._frame.template_closing_ids
            self._steps = StepWriter(self.vocabulary, steps, closing_ids, vocabulary_size)
        self._texts = TextReader(self.vocabulary, self.template, self._steps, reads_pairs=reads_pairs)
        self._preassembled = PreassembledReader(self.vocabulary, self._frame, unit, needs_prompt=needs_prompt)

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
        """All that is written around prompts and responses but the closing tokens."""
        return (self._frame.prefix_ids, self._frame.between, self._frame.ending)

    @property
    def closing_text(self) -> str | None:
        """The closing tokens as text, up to the first special token; None where no text is read as these."""
        return self._frame.closing_text

    def align(self, sample: Sample, needs: frozenset[Need] = frozenset(), *, truncate: bool = False) -> Aligned:
        """Read one sample, for an engine that must keep `needs` of it.

        With `truncate`, a prompt loses as many tokens at its beginning as the sequence is too long, but for a BOS.

        Raises:
            InvalidRequest: a field, a length or an id that cannot be served.
            TooLong: more tokens than the model reads.
        """
        self._check_ids(sample.prompt_token_ids or [])
        self._check_ids(sample.response_token_ids or [])
        if self._steps is not None:
            sample = self._steps.as_text(sample)
        text = self._opened(sample)
        sequence = self._closed(sample, text, needs)
        dropped = self._frame.shorten(text, sequence.longest - self.max_length) if truncate else 0
        if dropped:
            sequence = self._closed(sample, text, needs)
        self._check_parts(sequence)
        self.check_length(sequence)
        finished = sample.finished or self._frame.closes_all
        return Aligned(
            sample, sequence, text.response_ids, text.spans, text.steps, finished, text.warnings, dropped=dropped
        )

    def _opened(self, sample: Sample) -> Text:
        """Prompt and response as ids, with all that stands before the response and nothing that closes it."""
        text = self._texts.read(sample)
        if self._unit == "token":
            text.steps = range(1, len(text.response_ids) + 1)
        self._frame.open(sample, text)
        return text

    def _closed(self, sample: Sample, text: Text, needs: frozenset[Need]) -> ScoringInput:
        """The sequence, closing tokens included."""
        sequence = self._frame.close(text, needs, finished=sample.finished)
        self._check_ids(sequence.token_ids)
        return sequence

    def preassembled(self, given: str | Sequence[int] | Sequence[Message], *, special_tokens: bool) -> Sample:
        """A text, ids or a dialogue that hold the response already, to be scored at their last token as they stand.

        With `special_tokens`, what the tokenizer itself writes round a text is written where it is not there yet; ids
        are left as they are.

        Raises:
            InvalidRequest: the model must know where the response begins, or reads no dialogues.
        """
        return self._preassembled.read(given, special_tokens=special_tokens)

    def instructed(self, sample: Sample, sequence: ScoringInput, instruction: str) -> ScoringInput:
        """An aligned sample whose prompt begins with an instruction.

        Raises:
            InvalidRequest: there is no telling where in the prompt the instruction would go.
        """
        return sequence.with_prompt(self._opened(self._frame.instructed(sample, instruction)).prompt_ids)

    def _check_parts(self, sequence: ScoringInput) -> None:
        """Refuse a missing prompt or response where the model needs one."""
        if self._needs_prompt and not sequence.prompt_length:
            raise InvalidRequest(
                "a language model gives the first token of all no probability; give a prompt", code="empty_prompt"
            )
        if self._unit == "token" and not sequence.steps:
            raise InvalidRequest("this model scores tokens, and the response holds none", code="empty_response")

    def check_length(self, sequence: ScoringInput) -> None:
        """Refuse what cannot be scored.

        Raises:
            InvalidRequest: no token at all.
            TooLong: more tokens than the model reads.
        """
        if not sequence.token_ids:
            raise InvalidRequest("prompt and response hold no token, so there is nothing to score", code="empty_sample")
        if sequence.longest > self.max_length:
            included = "closing tokens" if self._steps is None else "separators"
            raise TooLong(
                f"{sequence.longest} tokens with the {included}, and the model reads {self.max_length}; shorten the "
                "prompt or the response (nothing is truncated here)",
                tokens=sequence.longest,
                limit=self.max_length,
            )

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
        if lowest < 0 or highest >= self._vocabulary_size:
            raise InvalidRequest(
                f"token id {lowest if lowest < 0 else highest} is not in the model's vocabulary of "
                f"{self._vocabulary_size}; are these another model's tokens?",
                code="id_out_of_vocabulary",
                limit=self._vocabulary_size,
            )
