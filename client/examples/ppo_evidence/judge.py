"""Rewards over HTTP: a running server, or one that is started for the occasion, and what a trainer makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densereward_client import Client, to_padded

from .policy import Responses
from .start import Facts

__all__ = ["Judge", "Judged", "serving"]

_LISTENING = re.compile(r"listening on (http://\S+:\d+)")


class Judged(NamedTuple):
    """Token rewards [batch, tokens], 0 outside the texts, and the reward model's own score of each text [batch]."""

    rewards: Tensor
    scores: Tensor


class Judge:
    """One method of a running server. Whatever goes wrong there raises here: a made-up reward would be learnt from.

    Args:
        client: Of the server.
        facts: The policy's ids are the reward model's, and what stands before a text there.
        method: As a request names it. `"less_prompt": True` is ours: the last token's reward loses the score that
            the prompt had alone, so that `sparse` sums to what `red` sums to.
    """

    def __init__(self, client: Client, facts: Facts, method: Mapping[str, Any]) -> None:
        self._client, self._facts = client, facts
        self._less_prompt = bool(method.get("less_prompt"))
        self._method = {name: value for name, value in method.items() if name != "less_prompt"} | {"label": "asked"}

    def __call__(self, openings: Tensor, responses: Responses) -> Judged:
        """Token rewards of what the policy wrote, unscaled."""
        rows = zip(openings.tolist(), responses.ids.tolist(), responses.mask.sum(1).tolist(), strict=True)
        samples = [self._sample(opening, ids[:length]) for opening, ids, length in rows]
        answer = self._client.token_rewards(
            samples, methods=[self._method], include=["prefix_scores"] if self._less_prompt else []
        )
        rewards, _ = to_padded(answer, "asked", length=responses.ids.shape[1]).to_torch()
        if self._less_prompt:
            prompts = torch.tensor([item.prompt_score or 0.0 for item in answer.data])
            rewards = rewards.scatter_add(1, responses.mask.sum(1, keepdim=True).cpu() - 1, -prompts[:, None])
        scores = torch.tensor([item.reward or 0.0 for item in answer.data])
        return Judged(rewards.to(openings.device), scores.to(openings.device))

    def _sample(self, opening: Sequence[int], response: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt_token_ids": [*self._facts.judge_prompt, *opening],
            "response_token_ids": list(response),
            "finished": response[-1] == self._facts.end,
        }


@contextmanager
def serving(log: Path, *flags: str, seconds: float = 180.0) -> Iterator[str]:
    """The address of a `densereward serve` with these flags, which ends with the block; it tells the file `log`.

    Raises:
        RuntimeError: It did not become ready.
    """
    command = [sys.executable, "-m", "densereward", "serve", "--port", "0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # our own command
            command, stdout=output, stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": "1"} | os.environ
        )
    try:
        deadline = time.monotonic() + seconds
        while not (url := _ready_url(log)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _ready_url(log: Path) -> str:
    """Where it listens, once it is ready to score; empty until then."""
    found = _LISTENING.search(log.read_text())
    if found is None:
        return ""
    with Client(found[1], trust_env=False) as client:
        return found[1] if client.ready() else ""
