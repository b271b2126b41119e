"""`Binding`: what is sent for a response in the policy's ids, and how the response's end is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import InvalidAnswer
from ..tokens import TokenBytes
from ..wire import ModelCard, ModelList, RewardsResponse, Sample, SampleReward, SampleTokenRewards, TokenRewardsResponse
from .bound import Bound, with_refused
from .text import Text, text_of

__all__ = ["Binding"]

_PER_TOKEN = ("response_mask", "weights", "token_entropies")
_READ_BY = ("tokenizer_fingerprint", "closing_token_ids", "closing_text")  # of a model card


class Binding:
    """A policy's tokenizer and a reward model's.

    Args:
        tokenizer: The policy's: a transformers fast tokenizer, or its `TokenBytes`, to bind it more than once.
        models: What the server serves, from `Client.models()`.
        model: Which of them scores; by default the first. For an ensemble, the policy's tokens are sent as text.
        eos_token_ids: What ends the policy's responses; by default its tokenizer's EOS.

    Attributes:
        same_tokens: Whether ids are sent as they are.
        eos_token_ids: What ends a response.

    Raises:
        ValueError: There is no such model, or how the tokenizer writes its tokens is not known here.
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
        default = [] if self._tokens.eos_id is None else [self._tokens.eos_id]
        self.eos_token_ids = frozenset(default if eos_token_ids is None else eos_token_ids)
        self._card = card = _card(models, model)
        self.same_tokens = card is not None and card.tokenizer_fingerprint == self._tokens.fingerprint
        self._closing_ids = list(card.closing_token_ids) if card is not None else []
        self._closing_text = (card.closing_text or "") if card is not None else ""
        self._known: set[str] = set()  # fingerprints of answers

    def bind(self, sample: Sample | Mapping[str, Any]) -> Bound:
        """A sample in the policy's ids, as the reward model reads it.

        Without `finished`, a response counts as finished if it ends with an EOS, with or without padding after it.

        Raises:
            ValueError: The response is not given as ids, an id does not exist, a list has another length than the ids,
                or the reward model cannot read the prompt's ids.
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
        ended = content < len(ids)
        finished = given.finished if "finished" in given.model_fields_set else ended
        closing = self._closing_ids if self.same_tokens else self._closing_text
        kept = content + (ended and finished and bool(closing))  # the EOS is sent only as the closing tokens
        fields = {name: getattr(given, name) for name in given.model_fields_set} | {"finished": finished}
        for name in _PER_TOKEN:
            if fields.get(name) is not None:
                fields[name] = fields[name][:kept]
        mask = self._mask(given, ids, content, kept)
        if any(mask) and not all(mask):
            fields["response_mask"] = mask
        bound = (self._as_ids if self.same_tokens else self._as_text)(fields, ids, content, kept)
        bound.warnings.extend(warnings)
        return bound

    def bind_all(
        self, samples: Sequence[Sample | Mapping[str, Any]], on_error: str
    ) -> tuple[list[Bound], dict[int, str]]:
        """The samples to send, and the reason for each that is refused, by its index; with "item" those become errors.

        Raises:
            ValueError: As `bind`, unless `on_error` is "item" and at least one sample can be sent.
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
        data = [each.on_policy_tokens(item) for each, item in zip(bound, answer.data, strict=True)]
        return answer.model_copy(update={"data": with_refused(data, refused, SampleTokenRewards)})

    @staticmethod
    def warned(bound: Sequence[Bound], answer: RewardsResponse, refused: Mapping[int, str]) -> RewardsResponse:
        """An answer with one reward per sample, with the warnings that arose while its samples were bound."""
        for each, item in zip(bound, answer.data, strict=True):
            item.warnings.extend(each.warnings)
        return answer.model_copy(update={"data": with_refused(answer.data, refused, SampleReward)})

    def is_known(self, answered: str) -> bool:
        """Whether an earlier answer had this fingerprint, and `compare` accepted it."""
        return answered in self._known

    def compare(self, models: ModelList, answered: str) -> None:
        """Check that an answer with a new fingerprint comes from a model that reads the same tokens.

        Raises:
            InvalidAnswer: It does not, so the tokens were read as others.
        """
        card, now = self._card, _card(models, self.model)
        changed = [name for name in _READ_BY if card and now and getattr(card, name) != getattr(now, name)]
        if changed:
            raise InvalidAnswer(
                f"the server's model has been replaced ({', '.join(changed)} changed), and ids may have been "
                "misread; bind the tokenizer again"
            )
        self._known.add(answered)

    def text_of(self, ids: Sequence[int], *, cut: bool = False, behind: bool = False) -> Text:
        """The text that ids write, and the span of each in it.

        Bytes that are no UTF-8 become U+FFFD, as a tokenizer decodes them, and belong to the token of the first byte.

        Args:
            ids: The policy's.
            cut: The response was cut by length: an unfinished character at its end is left out.
            behind: Other text stands before it, so a space that the first token begins with is kept.

        Raises:
            ValueError: An id that the tokenizer does not have, or one that stands for unknown text.
        """
        return text_of(self._tokens, ids, cut=cut, behind=behind)

    def _content(self, ids: Sequence[int]) -> tuple[int, list[str]]:
        """The number of tokens before the EOS that ends the response, all without one; and warnings."""
        start = len(ids)
        while start and (ids[start - 1] in self.eos_token_ids or ids[start - 1] in self._tokens.special):
            start -= 1
        end = next((i for i in range(start, len(ids)) if ids[i] in self.eos_token_ids), len(ids))
        warnings = []
        if end == len(ids) and start < len(ids):
            warnings.append(
                f"ends_special: the response ends with the special token {ids[-1]}, which is no EOS here, and counts "
                "as cut; name what ends responses as eos_token_ids"
            )
        if any(token in self.eos_token_ids for token in ids[:start]):
            warnings.append("eos_within: there is text after an EOS, which was read as if there were no EOS")
        return end, warnings

    def _mask(self, given: Sample, ids: Sequence[int], content: int, kept: int) -> list[Any]:
        """The response mask of the tokens that are sent, with 0 for special tokens too."""
        mask: list[Any] = [1] * kept if given.response_mask is None else list(given.response_mask)[:kept]
        for i, token in enumerate(ids[:content]):
            if token in self._tokens.special:
                mask[i] = 0
        return mask

    def _as_ids(self, fields: dict[str, Any], ids: list[int], content: int, kept: int) -> Bound:
        """The ids, with the beginning of the closing tokens in place of the EOS."""
        special = (i for i, token in enumerate(self._closing_ids) if token in self._tokens.special)
        begins = 1 + next(special, len(self._closing_ids) - 1)  # the server adds the rest
        closing = self._closing_ids[:begins] if kept > content else []
        fields["response_token_ids"] = [*ids[:content], *closing]
        if more := len(closing[1:]):  # the first stands for the EOS, the others for none of the policy's tokens
            for name in _PER_TOKEN:
                if fields.get(name) is not None:
                    fields[name] = [*fields[name], *[0] * more]
            fields.setdefault("response_mask", [*[1] * kept, *[0] * more])
        return Bound(Sample.model_validate(fields), len(ids), kept)

    def _as_text(self, fields: dict[str, Any], ids: list[int], content: int, kept: int) -> Bound:
        """The text of the ids and the span of each, with the closing tokens' text in place of the EOS."""
        if fields.get("prompt_token_ids") is not None:
            fields["prompt"] = self._prompt_text(fields.pop("prompt_token_ids"))
            behind = bool(fields["prompt"])
        else:  # a template writes its own spaces, and so may a prompt that ends with one
            behind = bool(fields.get("prompt")) and not fields["prompt"][-1].isspace()
        text = self.text_of(ids[:content], cut=not fields["finished"], behind=behind)
        closing = self._closing_text if kept > content else ""
        if text.text[-1:].isspace() and closing[:1].isspace():
            closing = ""  # both spaces would be read as one token; the server adds the closing tokens
        end = len(text.text.encode())
        spans = [*text.spans, *[(end, end + len(closing.encode()))] * (kept - content)]
        del fields["response_token_ids"]
        fields |= {"response": text.text + closing, "response_spans": spans}
        return Bound(Sample.model_validate(fields), len(ids), kept, warnings=text.warnings)

    def _prompt_text(self, ids: Sequence[int]) -> str:
        if found := [token for token in ids if token in self._tokens.special][:3]:
            raise ValueError(
                f"prompt_token_ids hold the policy's special tokens {found}, which are no text to a reward model with "
                "other tokens; give `messages` or `prompt`"
            )
        return self.text_of(ids).text


def _card(models: ModelList, model: str | Sequence[str] | None) -> ModelCard | None:
    """The card of one model; None for an ensemble, whose models need not have the same tokens."""
    ensembles = {each.id for each in models.ensembles}
    if (model is not None and not isinstance(model, str)) or model in ensembles:
        return None
    cards = {card.id: card for card in models.data}
    if model is None or (model == "default" and model not in cards):
        return models.data[0]
    if model not in cards:
        raise ValueError(f"the server has no model {model!r}; there are {', '.join(cards)}")
    return cards[model]
