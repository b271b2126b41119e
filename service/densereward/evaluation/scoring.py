"""What the evaluation asks of the service: texts in, token rewards and rewards out, by the way of any request."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from densereward.default_model.data import Message
from densereward.evaluation.metrics import Floats, Spans
from densereward.scoring.pipeline import answer_to
from densereward.server.service import Service
from densereward.settings import ModelSettings
from densereward_client.wire import RewardsRequest, RewardsResponse, TokenRewardsRequest, TokenRewardsResponse

METHODS: list[dict[str, Any]] = [
    {"label": "red open", "name": "red"},
    {"label": "red closed", "name": "red", "prefix_mode": "closed"},
    {"label": "abc", "name": "abc", "beta": 1.0},
]
EMPTY_TURN: list[Message] = [{"role": "user", "content": ""}]


@dataclass(frozen=True)
class TextRewards:
    """Character spans (T, 2) of a text's tokens and, per method, their rewards (T,); each sums to reward - baseline.

    `passes` are of the methods that took several.
    """

    spans: Spans
    rewards: dict[str, Floats]
    passes: dict[str, int] = field(default_factory=dict)


class Scorer:
    """A model folder behind the service's own pipeline, float32 on the CPU. A context manager."""

    def __init__(self, folder: Path) -> None:
        settings = ModelSettings(model=str(folder), device="cpu", max_queue_tokens=sys.maxsize)
        self._service = Service(settings, repeatable=True)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Scorer:
        self._runner.run(self._service.start())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._service.stop())
        self._runner.close()

    def texts(
        self, texts: Sequence[str], methods: Sequence[dict[str, Any]] = METHODS, questions: Sequence[str] = ()
    ) -> list[TextRewards]:
        """Token rewards of each text as the finished answer to its question, or to an empty user turn."""
        turns = [[{"role": "user", "content": question}] for question in questions] or [EMPTY_TURN] * len(texts)
        samples = [{"messages": turn, "response": text} for turn, text in zip(turns, texts, strict=True)]
        asked = {"samples": samples, "methods": list(methods), "include": ["spans"]}
        request = TokenRewardsRequest.model_validate(asked)
        work = answer_to(self._service.pipeline, request, request.samples)
        answer = TokenRewardsResponse.model_validate(self._runner.run(work))
        return [
            TextRewards(
                character_spans(text, item.spans or []),
                {name: rewards.astype(np.float64) for name, rewards in item.token_rewards.items()},
                item.passes or {},
            )
            for text, item in zip(texts, answer.data, strict=True)
        ]

    def dialogues(self, dialogues: Sequence[Sequence[Message]]) -> Floats:
        """Reward of the last turn of each dialogue, the assistant's."""
        samples = [{"messages": list(turns[:-1]), "response": turns[-1]["content"]} for turns in dialogues]
        request = RewardsRequest.model_validate({"samples": samples})
        work = answer_to(self._service.pipeline, request, request.samples)
        answer = RewardsResponse.model_validate(self._runner.run(work))
        return np.array([item.reward for item in answer.data], dtype=np.float64)

    def answers(self, texts: Sequence[str]) -> Floats:
        """Reward of each text as the finished answer to an empty user turn."""
        return self.dialogues([[*EMPTY_TURN, {"role": "assistant", "content": text}] for text in texts])


def character_spans(text: str, spans: Sequence[tuple[int, int]]) -> Spans:
    """Byte spans of a text as character spans, (T, 2); a part of a character is the whole character."""
    starts = np.array([0, *accumulate(len(character.encode()) for character in text)])
    bytes_ = np.array(spans, dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(starts, bytes_[:, 0], side="right") - 1
    return np.stack([first, np.maximum(np.searchsorted(starts, bytes_[:, 1]), first)], axis=1)
