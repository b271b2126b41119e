"""Rewards over HTTP, from a running server or one that is started here."""

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
"""How the judge reads texts: every text is scored with closing tokens, also one that was cut by length."""

_HARMLESS = ("low_attention_mass",)  # warnings that do not change what was read
_LABEL = "requested"
_LISTENING = re.compile(r"listening on (http://\S+:\d+)")


class Judged(NamedTuple):
    """The rewards of a batch of texts.

    Attributes:
        rewards: Of each token, [batch, tokens]; 0 after the end of a text.
        scores: R of each text, [batch], the sum of the method's token rewards and baseline.
        baselines: What the token rewards leave out, [batch].
        warnings: How often each harmless warning was given.
    """

    rewards: Tensor
    scores: Tensor
    baselines: Tensor
    warnings: dict[str, int]


class Judge:
    """One method of a running server. A failure raises, since the policy would learn from a made-up reward.

    Args:
        client: The server's.
        facts: Of the start policy; its ids are the reward model's too.
        method: As in a request. `"less_prompt": True` is an addition of this experiment: the prompt's own score is
            subtracted from the last token's reward, so that `sparse` sums to what `red` sums to.
        fingerprint: The reward model's, if a certain one is required.
    """

    def __init__(
        self, client: Client, facts: Facts, method: Mapping[str, Any], *, fingerprint: str | None = None
    ) -> None:
        self._client, self._facts, self._fingerprint = client, facts, fingerprint
        self._less_prompt = bool(method.get("less_prompt"))
        self._method = {name: value for name, value in method.items() if name != "less_prompt"} | {"label": _LABEL}

    def __call__(self, openings: Tensor, responses: Responses) -> Judged:
        """The token rewards of what the policy wrote, unscaled.

        Raises:
            RuntimeError: A number is missing, another model answered, or a warning says that something else was read.
        """
        answer = self._answer(openings, responses)
        warnings = _count_warnings(answer)
        rewards, _ = to_padded(answer, _LABEL, length=responses.ids.shape[1]).to_torch()
        scores = _numbers("reward", (item.reward for item in answer.data))
        baselines = _numbers("baseline", (item.baseline.get(_LABEL) for item in answer.data))
        if self._less_prompt:
            prompts = _numbers("prompt_score", (item.prompt_score for item in answer.data))
            last = responses.mask.sum(1, keepdim=True).cpu() - 1
            rewards, baselines = rewards.scatter_add(1, last, -prompts[:, None]), baselines + prompts
        device = openings.device
        return Judged(rewards.to(device), scores.to(device), baselines.to(device), warnings)

    def fingerprint(self) -> str:
        """The reward model's fingerprint, from an answer."""
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
        # If a text were scored as cut, R would be read at another position than its closed prefixes.
        return {
            "prompt_token_ids": [*self._facts.judge_prompt, *opening],
            "response_token_ids": list(response),
            "finished": True,
        }


def _count_warnings(answer: TokenRewardsResponse) -> dict[str, int]:
    """How often each warning was given; raises for any that is not harmless."""
    warnings = [warning for item in answer.data for warning in item.warnings]
    codes = [warning.split(":")[0] for warning in warnings]
    if other := [warning for warning, code in zip(warnings, codes, strict=True) if code not in _HARMLESS]:
        raise RuntimeError(f"the reward model read another thing than was sent: {other[0]}")
    return dict(Counter(codes))


def _numbers(name: str, values: Iterable[float | None]) -> Tensor:
    found = list(values)
    if None in found:
        raise RuntimeError(f"the answer has no {name} for text {found.index(None)}")
    return torch.tensor(found)


@contextmanager
def serving(log: Path, *flags: str, seconds: float = 180.0) -> Iterator[str]:
    """The address of a `densereward serve` with these flags, which runs until the block ends and writes to `log`.

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
    """The server's address once it is ready to score; empty until then."""
    found = _LISTENING.search(log.read_text())
    if found is None:
        return ""
    with Client(found[1], trust_env=False) as client:
        return found[1] if client.ready() else ""
