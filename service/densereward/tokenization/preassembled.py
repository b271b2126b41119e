"""Inputs that hold prompt and response in one (text, ids or a dialogue), scored as they stand at their last token."""

from __future__ import annotations

from collections.abc import Sequence

from densereward.capture import missing_closing
from densereward.errors import InvalidRequest
from densereward.tokenization.chat_template import ChatTemplate
from densereward.tokenization.frame import Frame
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Message, Sample

__all__ = ["PreassembledReader"]


class PreassembledReader:
    """Reads preassembled texts for one model.

    Args:
        vocabulary: the model's.
        frame: what its texts stand in.
        unit: what the model scores.
        needs_prompt: whether it can score nothing without a prompt.
    """

    def __init__(self, vocabulary: Vocabulary, frame: Frame, unit: str, *, needs_prompt: bool) -> None:
        self._vocabulary = vocabulary
        self._frame = frame
        self._reasons = {
            "judges steps or tokens of a response": unit != "sequence",
            "reads prompt and response as a pair of texts": frame.between is not None,
            "gives the response's tokens alone a probability": needs_prompt,
            "weighs its objectives where the prompt ends": bool(frame.gate_ids),
            "is read at a token that is written behind a response": bool(frame.ending),
        }

    def read(self, given: str | Sequence[int] | Sequence[Message], *, special_tokens: bool) -> Sample:
        """See `Aligner.preassembled`.

        Raises:
            InvalidRequest: the model must know where the response begins, or reads no dialogues.
        """
        self._check()
        return Sample(prompt_token_ids=[], response_token_ids=self._ids(given, special_tokens), finished=False)

    def _check(self) -> None:
        for reason in (reason for reason, applies in self._reasons.items() if applies):
            raise InvalidRequest(
                f"this model {reason}, so a text that holds both cannot be scored as it stands; give prompt and "
                "response to POST /rewards or /token_rewards",
                code="needs_prompt_and_response",
            )

    def _ids(self, given: str | Sequence[int] | Sequence[Message], special_tokens: bool) -> list[int]:
        if isinstance(given, str):
            text = given
        elif given and isinstance(given[0], Message):
            messages = [each.model_dump() for each in given if isinstance(each, Message)]
            text = self._template().whole(messages)
        else:
            return [each for each in given if isinstance(each, int)]
        ids = self._vocabulary.encode(text).ids
        if not special_tokens:
            return ids
        before, behind = self._vocabulary.prefix_ids, self._vocabulary.suffix_ids
        ids = ids if ids[: len(before)] == before else [*before, *ids]
        return [*ids, *missing_closing(ids, behind)]

    def _template(self) -> ChatTemplate:
        if self._frame.template is None:
            raise InvalidRequest(
                "this model has no chat template: give `input`", code="no_chat_template", field="messages"
            )
        return self._frame.template
