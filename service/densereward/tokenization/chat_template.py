"""The reward model's chat template: the text before the assistant's answer, and the closing tokens after it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from densereward.errors import InvalidRequest, ModelError

__all__ = ["ChatTemplate"]

_ANSWER = "ANSWER-7c1e0b52"
_PROBE = ({"role": "user", "content": "question"},)


class ChatTemplate:
    """A tokenizer's chat template, split at the assistant's answer.

    The template renders a whole dialogue with a marker as its last answer, as it did when the model was trained. What
    is before the marker is the prompt; what is after it are the closing tokens.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Raises:
        ModelError: the template does not write the answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        try:
            self.closing = self._split(_PROBE)[1]
            spaced = f"\t{_ANSWER}\t"  # tabs, since some templates write blanks of their own round an answer
            self.strips = spaced not in self._write(_PROBE, spaced)
        except (TemplateError, ValueError) as error:
            raise ModelError(f"the chat template cannot be used: {error}") from error
        self.fingerprint = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()

    def prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """The dialogue up to where the assistant's answer begins.

        Raises:
            InvalidRequest: the template refuses the dialogue, or would close the answer in another way.
        """
        try:
            before, closing = self._split(messages)
        except Exception as error:  # a template is a program of the model's, and may fail in any way
            raise _refused(error) from error
        if closing != self.closing:
            raise InvalidRequest(
                f"after these messages the template closes an answer with {closing!r}, not with {self.closing!r}",
                code="template_error",
                field="messages",
            )
        return before

    def whole(self, messages: Sequence[dict[str, Any]]) -> str:
        """The dialogue as it stands, with whatever answer it ends with.

        Raises:
            InvalidRequest: the template refuses the dialogue.
        """
        try:
            return self._rendered(messages)
        except Exception as error:  # as in `prompt`
            raise _refused(error) from error

    def _split(self, messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
        before, marker, after = self._write(messages, _ANSWER).rpartition(_ANSWER)
        if not marker:
            raise ValueError("it leaves out the assistant's answer")
        return before, after

    def _write(self, messages: Sequence[dict[str, Any]], answer: str) -> str:
        return self._rendered([*messages, {"role": "assistant", "content": answer}])

    def _rendered(self, messages: Sequence[dict[str, Any]]) -> str:
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False))


def _refused(error: Exception) -> InvalidRequest:
    return InvalidRequest(
        f"the model's chat template refuses these messages: {error}", code="template_error", field="messages"
    )
