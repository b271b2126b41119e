"""Random samples that make sense to a model: texts in many scripts, ids, spans, masks, weights."""

from __future__ import annotations

import base64
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np

import tiny
from tests.benchmarks.same_answers.models import Target

Json = dict[str, Any]

SENTENCES = tiny.CORPUS[:4]
PIECES = [
    *SENTENCES,
    "Thank you",
    " The dog is lazy.",
    " Is it? Yes!",
    "\n\n",
    "\n",
    "  ",
    "x = 3.14",
    " wonderful",
    "Grüße aus Zürich",
    "今日は晴れです。",
    "👩‍👩‍👧",
    "😀👍🏽",
    "e\u0301\u0300",
    "ﬁne ½",
    "\u200b\u202e",
    "\t- item",
    "<|im_end|>",
    "\r\n",
    "مرحبا",
    "\ufeff",
]
IDS = ["a", "", "Zürich 😀", "\u2028", '"}', "null"]
TYPES = {
    "prompt_token_ids": "<i4",
    "response_token_ids": "<i4",
    "response_spans": "<i4",
    "response_mask": "u1",
    "weights": "<f4",
    "token_entropies": "<f4",
}
"""Of lists that may be given as base64."""

SHORT = 100
"""Characters of a response that methods with many passes are asked for."""


class Samples:
    """Samples for one target, from a seeded generator."""

    def __init__(self, random: Random, target: Target) -> None:
        self._random = random
        self._target = target

    def chance(self, share: float) -> bool:
        """Whether something happens that happens in a share of all cases."""
        return self._random.random() < share

    def several(self, longest: int) -> list[Json]:
        """One sample or a few; at times several responses to one prompt."""
        samples = [self.one(longest) for _ in range(self._random.choice([1, 1, 1, 2, 3, 6]))]
        prompt = {name: value for name, value in samples[0].items() if name in ("prompt", "messages")}
        if prompt and self.chance(0.15):
            samples += [prompt | {"response": self.text(longest)} for _ in range(4)]
        return samples

    def one(self, longest: int) -> Json:
        """One sample, whose response has at most so many characters."""
        target = self._target
        sample: Json = {}
        prompt, response = self.texts(longest)
        as_ids = target.tokenizer is not None and self.chance(0.3)
        if target.dialogues and self.chance(0.4):
            sample["messages"] = self.messages()
        elif as_ids:
            sample["prompt_token_ids"] = self.ids(prompt, special=target.framed)
        else:
            sample["prompt"] = prompt
        if as_ids and self.chance(0.8):
            sample["response_token_ids"] = self.ids(response) if target.steps else self._any_ids(response)
        else:
            sample["response"] = response
            if self.chance(0.4):
                sample["response_spans"] = self.spans(response)
        sample |= self._options(self._slots(sample))
        return _in_base64(sample) if self.chance(0.15) else sample

    def text(self, longest: int) -> str:
        """Pieces up to some length; now and then none."""
        if self.chance(0.05):
            return ""
        text = ""
        length = self._random.randint(1, self._random.choice([4, 30, 30, 80, 80, 150, longest]))
        while len(text) < length:
            text += self._random.choice(PIECES if self.chance(0.6) else SENTENCES)
        if self._target.steps:
            text = text.replace(". ", ".\n\n").replace("<|im_end|>", "\n\n")
        return text[: min(longest, length + 20)]

    def texts(self, longest: int) -> tuple[str, str]:
        """A prompt and a response; at times a token crosses their boundary."""
        if self.chance(0.1):
            text = self._random.choice(SENTENCES)
            cut = self._random.randint(0, len(text))
            return text[:cut], text[cut:]
        question = self.text(80) or "Why?"
        return self._random.choice(self._target.prompts).format(question), self.text(longest)

    def messages(self) -> list[Json]:
        """A dialogue that ends with the user."""
        turns = [{"role": "user", "content": self.text(80) or "Why?"}]
        if self.chance(0.3):
            answer = {"role": "assistant", "content": self.text(60) or "So."}
            turns = [*turns, answer, {"role": "user", "content": "And then?"}]
        system = [{"role": "system", "content": "Be brief."}] if self._target.system and self.chance(0.2) else []
        return [*system, *turns]

    def spans(self, response: str) -> list[list[int]]:
        """Byte spans in order: some within a character, some empty, at times with gaps."""
        size = len(response.encode())
        cuts = self._random.choices(range(size + 1), k=self._random.randint(0, min(size, 12)))
        spans = [list(span) for span in pairwise([0, *sorted(cuts), size])]
        gaps = len(spans) > 3 and self.chance(0.2)
        return [span for span in spans if not (gaps and self.chance(0.1))]

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """A text in the model's tokens."""
        ids: list[int] = self._target.tokenizer.encode(text, add_special_tokens=special)
        return ids

    def _any_ids(self, text: str) -> list[int]:
        """A text's ids, or any others, which need not be a text."""
        if self.chance(0.7):
            return self.ids(text)
        return [self._random.randrange(3, 290) for _ in range(self._random.randint(0, 40))]

    def _slots(self, sample: Json) -> int | None:
        """How many rewards come back; None where that is not known here."""
        for name in ("response_spans", "response_token_ids"):
            if name in sample:
                return len(sample[name])
        known = self._target.tokenizer is not None and not self._target.steps
        return len(self.ids(sample["response"])) if known else None

    def _options(self, slots: int | None) -> Json:
        """What may stand beside prompt and response."""
        random = self._random
        options: Json = {}
        if slots is not None:
            if self.chance(0.15):
                options["response_mask"] = [random.choice([0, 1, 1]) for _ in range(slots)]
            if self.chance(0.8):
                options["weights"] = [round(random.random(), 3) for _ in range(slots)]
            if self.chance(0.4):
                options["token_entropies"] = [round(3 * random.random(), 3) for _ in range(slots)]
        if self.chance(0.2):
            options["finished"] = self.chance(0.2)
        if self.chance(0.2):
            options["id"] = random.choice(IDS)
        return options


def _in_base64(sample: Json) -> Json:
    """The sample with its lists of numbers as base64."""
    return {
        name: base64.b64encode(np.asarray(value, TYPES[name]).tobytes()).decode() if name in TYPES else value
        for name, value in sample.items()
    }
