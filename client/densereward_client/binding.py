"""A policy's tokens on their way to a reward model that may have others, and the rewards on their way back.

Where both have one vocabulary, ids are sent as they are. Otherwise the response is sent as text with the byte spans of
the policy's tokens, both put together from the ids. What comes back has one reward for every id, whatever its kind.

The end of a response has a rule of its own. A policy ends with its EOS and a reward model reads its score behind
closing tokens; so the EOS stands for these, and what they add is its reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._errors import InvalidAnswer
from .tokens import TokenBytes
from .wire import ModelCard, ModelList, Sample, SampleTokenRewards, TokenRewardsResponse

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
        content: Of these, those before the EOS, where what was sent has other tokens from there on; else None.
        warnings: `code: message` each, for the answer.
    """

    sample: Sample
    count: int
    content: int | None = None
    warnings: list[str] = field(default_factory=list)


class Binding:
    """A policy's tokenizer beside a reward model's.

    Args:
        tokenizer: The policy's: a transformers fast tokenizer.
        models: What the server serves, from `Client.models()`.
        model: Which of them is asked; by default the first. Of an ensemble, the policy's tokens are sent as text.
        eos_token_ids: What ends the policy's responses; by default its tokenizer's EOS.

    Attributes:
        same_tokens: Whether ids are sent as they are.
        eos_token_ids: What ends the policy's responses.

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
        self._tokens = TokenBytes(tokenizer)
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

        Without `finished`, a response has ended by itself if its last id is an EOS.

        Raises:
            ValueError: The response is not given as ids; an id that is none; a prompt whose ids the reward model
                cannot read.
        """
        given = sample if isinstance(sample, Sample) else Sample.model_validate(sample)
        if given.response_token_ids is None:
            raise ValueError("give the response as response_token_ids, the policy's own: rewards come back on these")
        ids = list(given.response_token_ids)
        content = len(ids)
        while content and ids[content - 1] in self.eos_token_ids:
            content -= 1
        finished = given.finished if "finished" in given.model_fields_set else content < len(ids)
        sent = {name: getattr(given, name) for name in given.model_fields_set} | {"finished": finished}
        if self.same_tokens:
            return self._as_ids(sent, ids, content, finished=finished)
        return self._as_text(sent, ids, content, finished=finished)

    def answer(self, bound: Sequence[Bound], answer: TokenRewardsResponse) -> TokenRewardsResponse:
        """The answer on the policy's tokens, one reward for each.

        Raises:
            InvalidAnswer: There are more or fewer.
        """
        data = [self._item(each, item) for each, item in zip(bound, answer.data, strict=True)]
        return answer.model_copy(update={"data": data})

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

    def _as_ids(self, sent: dict[str, Any], ids: list[int], content: int, *, finished: bool) -> Bound:
        """The ids, their EOS replaced by closing tokens where it is not how these begin."""
        ending = ids[content:]
        if not ending or (finished and ending == self._closing_ids[: len(ending)]):
            return Bound(Sample.model_validate(sent), len(ids))
        closing = self._closing_ids if finished else []
        sent["response_token_ids"] = [*ids[:content], *closing]
        for name in _PER_TOKEN:
            if (values := sent.get(name)) is not None:
                last = values[content] if len(values) == len(ids) else 0
                rest = [last] * len(closing) if name == "response_mask" else [last, *[0] * len(closing)][: len(closing)]
                sent[name] = [*values[:content], *rest]
        return Bound(Sample.model_validate(sent), len(ids), content)

    def _as_text(self, sent: dict[str, Any], ids: list[int], content: int, *, finished: bool) -> Bound:
        """The text of the ids, closing tokens in the EOS's place, and the span of each id."""
        text = self.text_of(ids[:content], cut=not finished)
        end = len(text.text.encode())
        closing = self._closing_text if finished and content < len(ids) else ""
        after = end + len(closing.encode())
        spans = [*text.spans, *[(end if place == 0 else after, after) for place in range(len(ids) - content)]]
        mask = [1] * len(ids) if sent.get("response_mask") is None else list(sent["response_mask"])
        special = [place for place in range(content) if ids[place] in self._tokens.special]
        if len(mask) == len(ids):
            for place in special:
                mask[place] = 0
        del sent["response_token_ids"]
        sent |= {"response": text.text + closing, "response_spans": spans}
        if not all(mask):
            sent["response_mask"] = mask
        if sent.get("prompt_token_ids") is not None:
            sent["prompt"] = self._prompt_text(sent.pop("prompt_token_ids"))
        return Bound(Sample.model_validate(sent), len(ids), warnings=text.warnings)

    def _prompt_text(self, ids: Sequence[int]) -> str:
        if found := [token for token in ids if token in self._tokens.special][:3]:
            raise ValueError(
                f"prompt_token_ids hold the policy's special tokens {found}, which are no text to a reward model with "
                "other tokens; give `messages` or `prompt`"
            )
        return self.text_of(ids).text

    def text_of(self, ids: Sequence[int], *, cut: bool = False) -> Text:
        """The text that ids write, and the place of each in it.

        Bytes that are no UTF-8 become U+FFFD, as a tokenizer decodes them, and belong to the token that begins them;
        the beginning of a character at the end of a response that was cut is left out.

        Raises:
            ValueError: An id that the tokenizer does not have, or one that stands for unknown text.
        """
        pieces = self._tokens.pieces(ids)
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
        if bound.content is not None:
            item.token_rewards = {
                name: _folded(rewards, bound.content, bound.count) for name, rewards in item.token_rewards.items()
            }
            _fold_masks(item, bound.content, bound.count)
        for name, rewards in item.token_rewards.items():
            if len(rewards) != bound.count:
                raise InvalidAnswer(f"item {item.index}: {name} has {len(rewards)} rewards for {bound.count} tokens")
        return item


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


def _folded(rewards: NDArray[np.float32], content: int, count: int) -> NDArray[np.float32]:
    """What closing tokens got goes to the EOS they stand for; further EOS get nothing."""
    folded = np.zeros(count, dtype=np.float32)
    folded[:content] = rewards[:content]
    folded[content] = rewards[content:].sum(dtype=np.float64)
    return folded


def _fold_masks(item: SampleTokenRewards, content: int, count: int) -> None:
    """The same for what else is told of each token."""
    for name, mask in (item.mask or {}).items():
        (item.mask or {})[name] = [*mask[:content], *(mask[content:][:1] or [0]), *[0] * (count - content - 1)]
    for segments in (item.segments or {}).values():
        for segment in segments:
            segment.start, segment.end = (min(place, content + 1) for place in (segment.start, segment.end))
