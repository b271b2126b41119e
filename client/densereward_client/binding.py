"""A policy's tokens on their way to a reward model that may have others, and the rewards on their way back.

Where both have one vocabulary, ids are sent as they are. Otherwise the response is sent as text with the byte spans of
the policy's tokens, both put together from the ids. What comes back has one reward for every id, whatever its kind.

The end of a response has a rule of its own. A policy ends with its EOS and a reward model reads its score behind
closing tokens; so the EOS stands for these, and what they add is its reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._errors import InvalidAnswer
from .tokens import TokenBytes
from .wire import (
    Error,
    ModelCard,
    ModelList,
    RewardsResponse,
    Sample,
    SampleReward,
    SampleTokenRewards,
    Segment,
    TokenRewardsResponse,
)

__all__ = ["Binding", "Bound", "Text"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PER_TOKEN = ("response_mask", "weights", "token_entropies")


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


@dataclass(frozen=True)
class Bound:
    """One response, ready to be sent.

    Attributes:
        sample: As the reward model reads it.
        count: The policy's tokens: so many rewards come back.
        kept: Of these, those that were sent; what follows an EOS, or one that stands for nothing, gets no reward.
        warnings: `code: message` each, for the answer.
    """

    sample: Sample
    count: int
    kept: int
    warnings: list[str] = field(default_factory=list)


class Binding:
    """A policy's tokenizer beside a reward model's.

    Args:
        tokenizer: The policy's: a transformers fast tokenizer, or `TokenBytes` of one that is bound more than once.
        models: What the server serves, from `Client.models()`.
        model: Which of them is asked; by default the first. Of an ensemble, the policy's tokens are sent as text.
        eos_token_ids: What ends the policy's responses; by default its tokenizer's EOS.

    Attributes:
        same_tokens: Whether ids are sent as they are.
        eos_token_ids: What ends a response.

    Raises:
        ValueError: There is no such model, or the tokenizer spells in a way that is not known.
    """

    def __init__(
        self,
        tokenizer: Any,
        models: ModelList,
        model: str | Sequence[str] | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        self._tokens = tokenizer if isinstance(tokenizer, TokenBytes) else TokenBytes(tokenizer)
        self.model = model
        self._card = _card(models, model)
        default = [] if self._tokens.eos_id is None else [self._tokens.eos_id]
        self.eos_token_ids = frozenset(default if eos_token_ids is None else eos_token_ids)
        card = self._card
        self.same_tokens = card is not None and card.tokenizer_fingerprint == self._tokens.fingerprint
        self._closing_ids = list(card.closing_token_ids) if card is not None else []
        self._closing_text = (card.closing_text or "") if card is not None else ""
        self._seen: set[str] = set()

    def bind(self, sample: Sample | Mapping[str, Any]) -> Bound:
        """A sample whose ids are the policy's, as the reward model reads it.

        Without `finished`, a response has ended by itself if it ends with an EOS, whatever padding follows.

        Raises:
            ValueError: The response is not given as ids; an id that is none; lists of other lengths; a prompt whose
                ids the reward model cannot read.
        """
        given = sample if isinstance(sample, Sample) else Sample.model_validate(sample)
        if given.response_token_ids is None:
            raise ValueError("give the response as response_token_ids, the policy's own: rewards come back on these")
        ids = list(given.response_token_ids)
        for name in _PER_TOKEN:
            values = getattr(given, name)
            if values is not None and len(values) != len(ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(ids)} response_token_ids")
        content, warnings = self._content(ids)
        finished = given.finished if "finished" in given.model_fields_set else content < len(ids)
        sent = {name: getattr(given, name) for name in given.model_fields_set} | {"finished": finished}
        closes = finished and content < len(ids) and bool(self._closing_ids if self.same_tokens else self._closing_text)
        kept = content + closes  # nothing stands for an EOS where nothing closes a response
        for name in _PER_TOKEN:
            if sent.get(name) is not None:
                sent[name] = sent[name][:kept]
        asked = [1] * kept if given.response_mask is None else list(given.response_mask)[:kept]
        mask: list[Any] = [
            0 if ids[i] in self._tokens.special and i < content else keep for i, keep in enumerate(asked)
        ]
        if any(mask) and not all(mask):
            sent["response_mask"] = mask
        bound = (self._as_ids if self.same_tokens else self._as_text)(sent, ids, content, kept)
        bound.warnings.extend(warnings)
        return bound

    def _content(self, ids: Sequence[int]) -> tuple[int, list[str]]:
        """How many tokens stand before the EOS, or all; and what is strange about special tokens."""
        start = len(ids)
        while start and (ids[start - 1] in self.eos_token_ids or ids[start - 1] in self._tokens.special):
            start -= 1
        end = next((place for place in range(start, len(ids)) if ids[place] in self.eos_token_ids), len(ids))
        warnings = []
        if end == len(ids) and start < len(ids):
            warnings.append(
                f"ends_special: the response ends with the special token {ids[-1]}, which is no EOS here, and counts "
                "as cut; name what ends responses as eos_token_ids"
            )
        if any(token in self.eos_token_ids for token in ids[:start]):
            warnings.append("eos_within: there is text behind an EOS, which was read as if there were none")
        return end, warnings

    def bind_all(
        self, samples: Sequence[Sample | Mapping[str, Any]], on_error: str
    ) -> tuple[list[Bound], dict[int, str]]:
        """Samples as they are sent, and by their places why some are not, if those are to become errors in the answer.

        Raises:
            ValueError: As `bind`, unless `on_error` is "item" and some sample is left.
        """
        bound: list[Bound] = []
        refused: dict[int, str] = {}
        for index, sample in enumerate(samples):
            try:
                bound.append(self.bind(sample))
            except ValueError as error:
                if on_error != "item" or (index == len(samples) - 1 and not bound):
                    raise ValueError(f"sample {index}: {error}") from error
                refused[index] = str(error)
        return bound, refused

    def answer(
        self, bound: Sequence[Bound], answer: TokenRewardsResponse, refused: Mapping[int, str]
    ) -> TokenRewardsResponse:
        """The answer on the policy's tokens, one reward for each.

        Raises:
            InvalidAnswer: There are more or fewer.
        """
        data = [self._item(each, item) for each, item in zip(bound, answer.data, strict=True)]
        return answer.model_copy(update={"data": _in_places(data, refused, SampleTokenRewards)})

    @staticmethod
    def warned(bound: Sequence[Bound], answer: RewardsResponse, refused: Mapping[int, str]) -> RewardsResponse:
        """An answer of one reward a sample, with what was noticed on the way to the text."""
        for each, item in zip(bound, answer.data, strict=True):
            item.warnings.extend(each.warnings)
        return answer.model_copy(update={"data": _in_places(answer.data, refused, SampleReward)})

    def is_known(self, answered: str) -> bool:
        """Whether an answer with this fingerprint comes from the model that this is bound to, as far as was seen."""
        return answered in self._seen

    def compare(self, models: ModelList, answered: str) -> None:
        """See that an answer with a new fingerprint still comes from a model that reads the same tokens.

        Raises:
            InvalidAnswer: It does not; the tokens were read as others.
        """
        card, now = self._card, _card(models, self.model)
        if card is not None and now is not None:
            names = ("tokenizer_fingerprint", "closing_token_ids", "closing_text")
            if changed := [name for name in names if getattr(card, name) != getattr(now, name)]:
                raise InvalidAnswer(
                    f"the server's model is another one by now ({', '.join(changed)} changed), and ids may have been "
                    "misread; bind the tokenizer again"
                )
        self._seen.add(answered)

    def _as_ids(self, sent: dict[str, Any], ids: list[int], content: int, kept: int) -> Bound:
        """The ids, what begins the closing tokens in their EOS's place."""
        special = (place for place, token in enumerate(self._closing_ids) if token in self._tokens.special)
        begins = 1 + next(special, len(self._closing_ids) - 1)  # the server writes the rest
        sent["response_token_ids"] = [*ids[:content], *(self._closing_ids[:begins] if kept > content else [])]
        if kept > content and begins > 1:  # the first of them stands for the EOS
            for name in _PER_TOKEN:
                if sent.get(name) is not None:
                    sent[name] = [*sent[name], *[0] * (begins - 1)]
            sent.setdefault("response_mask", [*[1] * kept, *[0] * (begins - 1)])
        return Bound(Sample.model_validate(sent), len(ids), kept)

    def _as_text(self, sent: dict[str, Any], ids: list[int], content: int, kept: int) -> Bound:
        """The text of the ids, what begins the closing tokens in the EOS's place, and the span of each id."""
        if sent.get("prompt_token_ids") is not None:
            sent["prompt"] = self._prompt_text(sent.pop("prompt_token_ids"))
            behind = bool(sent["prompt"])
        else:  # a template writes its own blanks; so does whoever ends a prompt with one
            behind = bool(sent.get("prompt")) and not sent["prompt"][-1].isspace()
        text = self.text_of(ids[:content], cut=not sent["finished"], behind=behind)
        end = len(text.text.encode())
        closing = self._closing_text if kept > content else ""
        if text.text[-1:].isspace() and closing[:1].isspace():
            closing = ""  # the two would be read as one; the server writes them behind the response
        spans = [*text.spans, *[(end, end + len(closing.encode()))] * (kept - content)]
        del sent["response_token_ids"]
        sent |= {"response": text.text + closing, "response_spans": spans}
        return Bound(Sample.model_validate(sent), len(ids), kept, warnings=text.warnings)

    def _prompt_text(self, ids: Sequence[int]) -> str:
        if found := [token for token in ids if token in self._tokens.special][:3]:
            raise ValueError(
                f"prompt_token_ids hold the policy's special tokens {found}, which are no text to a reward model with "
                "other tokens; give `messages` or `prompt`"
            )
        return self.text_of(ids).text

    def text_of(self, ids: Sequence[int], *, cut: bool = False, behind: bool = False) -> Text:
        """The text that ids write, and the place of each in it.

        Bytes that are no UTF-8 become U+FFFD, as a tokenizer decodes them, and belong to the token that begins them;
        the beginning of a character at the end of a response that was cut is left out. With `behind`, other text stands
        before it, and a blank that the first token begins with is one.

        Raises:
            ValueError: An id that the tokenizer does not have, or one that stands for unknown text.
        """
        pieces = self._tokens.pieces(ids, behind=behind)
        raw = b"".join(pieces)
        ends = np.cumsum([0, *map(len, pieces)])
        faults = list(_faults(raw))
        if not faults:
            return Text(raw.decode(), _spans(ends))
        written, moved, reached = [], np.arange(len(raw) + 1), 0
        for start, stop, unfinished in faults:
            mark = b"" if cut and unfinished else _REPLACEMENT.encode()
            written += [raw[reached:start], mark]
            moved[start + 1 :] += len(mark) - (stop - start)
            moved[start + 1 : stop] = moved[stop]
            reached = stop
        text = b"".join([*written, raw[reached:]]).decode()
        places = [int(np.searchsorted(ends, start, side="right")) - 1 for start, *_ in faults]
        shown = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
        warning = f"invalid_utf8: the tokens at {shown} begin bytes that are no text; U+FFFD was read in their place"
        if all(cut and unfinished for *_, unfinished in faults):
            warning = f"cut_character: the response was cut within a character, at token {shown}; it was left out"
        return Text(text, _spans(moved[ends]), [warning])

    def _item(self, bound: Bound, item: SampleTokenRewards) -> SampleTokenRewards:
        item.warnings.extend(bound.warnings)
        if item.error is not None:
            return item
        item.token_rewards = {name: _on_all(rewards, bound) for name, rewards in item.token_rewards.items()}
        for name, mask in (item.mask or {}).items():
            (item.mask or {})[name] = [*mask[: bound.kept], *[0] * (bound.count - bound.kept)]
        for name, segments in (item.segments or {}).items():
            (item.segments or {})[name] = _within(segments, bound.kept)
        return item


Item = TypeVar("Item", bound=SampleReward)


def _in_places(served: Sequence[Item], refused: Mapping[int, str], kind: type[Item]) -> list[Item]:
    """Items in the order that was asked for, errors in the places of what was not sent."""
    left = iter(served)
    data: list[Item] = []
    for index in range(len(served) + len(refused)):
        if index in refused:
            data.append(kind(index=index, error=Error(code="invalid_tokens", message=refused[index])))
        else:
            data.append(next(left).model_copy(update={"index": index}))
    return data


def _card(models: ModelList, model: str | Sequence[str] | None) -> ModelCard | None:
    """The card of one model; None for several, whose tokens need not be the same."""
    ensembles = {each.id for each in models.ensembles}
    if (model is not None and not isinstance(model, str)) or model in ensembles:
        return None
    cards = {card.id: card for card in models.data}
    if model is None or (model == "default" and model not in cards):
        return models.data[0]
    if model not in cards:
        raise ValueError(f"the server has no model {model!r}; there are {', '.join(cards)}")
    return cards[model]


def _faults(raw: bytes) -> list[tuple[int, int, bool]]:
    """[start, end) of bytes that are no UTF-8, and whether more bytes could have made them some."""
    faults = []
    reached = 0
    while reached < len(raw):
        try:
            raw[reached:].decode()
            break
        except UnicodeDecodeError as error:
            unfinished = error.reason == "unexpected end of data"
            faults.append((reached + error.start, reached + error.end, unfinished))
            reached += error.end
    return faults


def _spans(ends: NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


def _on_all(rewards: NDArray[np.float32], bound: Bound) -> NDArray[np.float32]:
    """Rewards of what was sent, and none of what was not.

    Raises:
        InvalidAnswer: There are fewer than were asked for, or some that would be lost.
    """
    if len(rewards) < bound.kept or rewards[bound.kept :].any():
        raise InvalidAnswer(f"{len(rewards)} rewards came back for {bound.kept} tokens")
    return np.concatenate([rewards[: bound.kept], np.zeros(bound.count - bound.kept, dtype=np.float32)])


def _within(segments: Sequence[Segment], kept: int) -> list[Segment]:
    """Segments of what was sent; one of further closing tokens joins that before it."""
    within: list[Segment] = []
    for segment in segments:
        if within and segment.start >= kept:
            within[-1].score += segment.score
        else:
            within.append(segment.model_copy(update={"end": min(segment.end, kept)}))
    return within
