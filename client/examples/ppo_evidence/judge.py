"""Rewards over HTTP: a running server, or one that is started for the occasion, and what a trainer makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densereward_client import Client, Include, TokenRewardsResponse, to_padded

from .policy import Responses
from .start import Facts

__all__ = ["READING", "Judge", "Judged", "serving"]

READING = "every text as finished"
"""What the judge reads: the closing tokens are scored behind every text, also behind one that was cut by length."""

_COUNTED = ("low_attention_mass",)
_LISTENING = re.compile(r"listening on (http://\S+:\d+)")


class Judged(NamedTuple):
    """What the reward model made of a batch of texts.

    Attributes:
        rewards: Of each token, [batch, tokens]; 0 outside the texts.
        scores: R of each text, [batch]: the method's token rewards and its baseline sum to it.
        baselines: What the token rewards leave out, [batch].
        warnings: How often each of those came that leave the reading as it is.
    """

    rewards: Tensor
    scores: Tensor
    baselines: Tensor
    warnings: dict[str, int]


class Judge:
    """One method of a running server. Whatever goes wrong there raises here: a made-up reward would be learnt from.

    Args:
        client: Of the server.
        facts: The policy's ids are the reward model's, and what stands before a text there.
        method: As a request names it. `"less_prompt": True` is ours: the last token's reward loses the score that
            the prompt had alone, so that `sparse` sums to what `red` sums to.
        fingerprint: Of the reward model, where it must be this one.
    """

    def __init__(
        self, client: Client, facts: Facts, method: Mapping[str, Any], *, fingerprint: str | None = None
    ) -> None:
        self._client, self._facts, self._fingerprint = client, facts, fingerprint
        self._less_prompt = bool(method.get("less_prompt"))
        self._method = {name: value for name, value in method.items() if name != "less_prompt"} | {"label": "asked"}

    def __call__(self, openings: Tensor, responses: Responses) -> Judged:
        """Token rewards of what the policy wrote, unscaled.

        Raises:
            RuntimeError: A number is missing, another model answered, or a warning says that it read another thing.
        """
        answer = self._answer(openings, responses)
        warnings = _counted(answer)
        rewards, _ = to_padded(answer, "asked", length=responses.ids.shape[1]).to_torch()
        scores = _numbers("reward", (item.reward for item in answer.data))
        baselines = _numbers("baseline", (item.baseline.get("asked") for item in answer.data))
        if self._less_prompt:
            prompts = _numbers("prompt_score", (item.prompt_score for item in answer.data))
            last = responses.mask.sum(1, keepdim=True).cpu() - 1
            rewards, baselines = rewards.scatter_add(1, last, -prompts[:, None]), baselines + prompts
        device = openings.device
        return Judged(rewards.to(device), scores.to(device), baselines.to(device), warnings)

    def fingerprint(self) -> str:
        """The reward model's, as its answers carry it."""
        sample = self._sample([], [self._facts.end])
        return self._client.token_rewards([sample], methods=[self._method]).fingerprint

    def _answer(self, openings: Tensor, responses: Responses) -> TokenRewardsResponse:
        rows = zip(openings.tolist(), responses.ids.tolist(), responses.mask.sum(1).tolist(), strict=True)
        samples = [self._sample(opening, ids[:length]) for opening, ids, length in rows]
        include: list[Include] = ["prefix_scores"] if self._less_prompt else []
        answer = self._client.token_rewards(samples, methods=[self._method], include=include)
        if self._fingerprint not in (None, answer.fingerprint):
            raise RuntimeError(f"the reward model is {answer.fingerprint}, and this run is of {self._fingerprint}")
        return answer

    def _sample(self, opening: Sequence[int], response: Sequence[int]) -> dict[str, Any]:
        # Scored as cut, a text would have its R read at another place than its closed prefixes.
        return {
            "prompt_token_ids": [*self._facts.judge_prompt, *opening],
            "response_token_ids": list(response),
            "finished": True,
        }


def _counted(answer: TokenRewardsResponse) -> dict[str, int]:
    """How often each warning came; only those that leave the reading as it is may come at all."""
    warnings = [warning for item in answer.data for warning in item.warnings]
    codes = [warning.split(":")[0] for warning in warnings]
    if other := [warning for warning, code in zip(warnings, codes, strict=True) if code not in _COUNTED]:
        raise RuntimeError(f"the reward model read another thing than it was asked: {other[0]}")
    return dict(Counter(codes))


def _numbers(name: str, values: Iterable[float | None]) -> Tensor:
    found = list(values)
    if None in found:
        raise RuntimeError(f"the answer has no {name} for text {found.index(None)}")
    return torch.tensor(found)


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
