"""Served contestants: many callers who each wait for the answer to their one call, whatever server they ask."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx
import numpy as np

from densereward.capture import ScoringInput
from densereward_client import AsyncClient
from densereward_client.wire import Sample
from tests.benchmarks.harness import Numbers

_METHODS = ("red", "abc")
_TIMEOUT = 300.0  # seconds
_Asked = TypeVar("_Asked")
Ask = Callable[[_Asked], Awaitable[Numbers]]
"""One call, and what came back."""


@dataclass
class Callers(Generic[_Asked]):
    """A contestant: callers who take calls from one heap until it is empty.

    Attributes:
        url: the server's address.
        line: opens the way to a server.
        calls: what is asked, call by call.
        callers: how many wait at once.
        shares: CPU seconds of this process, the callers, over the seconds of each turn.
        waits: seconds that each call took, turn by turn.
    """

    url: str
    line: Callable[[str], AbstractAsyncContextManager[Ask[_Asked]]]
    calls: Sequence[_Asked]
    callers: int
    shares: list[float] = field(default_factory=list)
    waits: list[list[float]] = field(default_factory=list)

    def __call__(self) -> Numbers:
        """Make every call once."""
        started, worked = time.perf_counter(), time.process_time()
        answers = asyncio.run(self._call())
        self.shares.append((time.process_time() - worked) / (time.perf_counter() - started))
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    async def _call(self) -> list[Numbers]:
        heap = iter(enumerate(self.calls))
        answers: dict[int, Numbers] = {}
        waits: list[float] = []
        self.waits.append(waits)

        async with self.line(self.url) as ask:

            async def caller() -> None:
                for index, asked in heap:
                    started = time.perf_counter()
                    answers[index] = await ask(asked)
                    waits.append(time.perf_counter() - started)

            await asyncio.gather(*(caller() for _ in range(self.callers)))
        return [answers[index] for index in range(len(self.calls))]


@asynccontextmanager
async def token_rewards(url: str) -> AsyncIterator[Ask[Sequence[Sample]]]:
    """Our server: the rewards of `red` and `abc`, and the prefix scores."""
    methods = [{"name": name, "beta": 1.0} for name in _METHODS]
    async with AsyncClient(url, timeout=_TIMEOUT) as client:

        async def ask(samples: Sequence[Sample]) -> Numbers:
            items = (await client.token_rewards(samples, methods=methods, include=["prefix_scores"])).data
            scores = [part for item in items for part in ([item.prompt_score], item.prefix_scores)]
            numbers = {
                name: np.concatenate([item.token_rewards[name] for item in items], dtype=np.float64)
                for name in _METHODS
            }
            return {
                "reward": np.array([item.reward for item in items]),
                "prefix_scores": np.concatenate(scores, dtype=np.float64),  # type: ignore[arg-type]
                **numbers,
            }

        yield ask


@asynccontextmanager
async def rewards(url: str) -> AsyncIterator[Ask[Sequence[Sample]]]:
    """Our server: one number a sample."""
    async with AsyncClient(url, timeout=_TIMEOUT) as client:

        async def ask(samples: Sequence[Sample]) -> Numbers:
            return {"reward": np.array([item.reward for item in (await client.rewards(samples)).data])}

        yield ask


@asynccontextmanager
async def plain_rewards(url: str) -> AsyncIterator[Ask[Sequence[str]]]:
    """The plain server: whole dialogues as text, one number each."""
    async with _http(url) as client:

        async def ask(queries: Sequence[str]) -> Numbers:
            answer = await client.post("/get_reward", json={"query": list(queries)})
            return {"reward": np.array(answer.raise_for_status().json()["rewards"])}

        yield ask


@asynccontextmanager
async def vllm_scores(url: str) -> AsyncIterator[Ask[ScoringInput]]:
    """vLLM's server: a score for every token, of which the prefixes' are kept."""
    async with _http(url) as client:

        async def ask(sequence: ScoringInput) -> Numbers:
            body = {"model": "model", "task": "token_classify", "input": list(sequence.token_ids)}
            answer = await client.post("/pooling", json=body | {"encoding_format": "base64"})
            data = base64.b64decode(answer.raise_for_status().json()["data"][0]["data"])
            scores = np.frombuffer(data, dtype="<f4").astype(np.float64)
            return {
                "reward": scores[[sequence.scored_position]],
                "prefix_scores": scores[sequence.prompt_length - 1 : sequence.response_stop],
            }

        yield ask


def _http(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, limits=httpx.Limits(max_connections=None))


@contextmanager
def probed(url: str, seconds: list[float]) -> Iterator[None]:
    """Ask for an address from a process of its own during the block; the seconds of each answer are added."""
    command = [sys.executable, "-m", "tests.benchmarks.probe", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        printed, _ = process.communicate()
    seconds += json.loads(printed)
