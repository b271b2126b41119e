"""The served contestant: a real server process, and many callers who each wait for their one sample."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from densereward_client import AsyncClient, Client
from densereward_client.wire import Sample, SampleTokenRewards
from tests.benchmarks.harness import Numbers

_METHODS = ("red", "abc")
_START_SECONDS = 180.0


@contextmanager
def server(folder: Path, threads: int) -> Iterator[str]:
    """The address of a server process that computes with so many threads.

    Raises:
        RuntimeError: it does not start.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    flags = {"model": str(folder), "port": str(port), "device": "cpu", "log-level": "error"}
    command = [sys.executable, "-m", "densereward", "serve"] + [f"--{name}={value}" for name, value in flags.items()]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}) as process:
        try:
            _wait_until_ready(url, process)
            yield url
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with Client(url) as client:
        while not client.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start; the reason stands above")
            time.sleep(0.2)


@dataclass
class Served:
    """A contestant: callers who take samples from one heap until it is empty.

    Attributes:
        client_shares: CPU seconds of this process, the callers, over the seconds of each turn.
    """

    url: str
    samples: Sequence[Sample]
    callers: int
    client_shares: list[float] = field(default_factory=list)

    def __call__(self) -> Numbers:
        """Score every sample once."""
        started, worked = time.perf_counter(), time.process_time()
        items = asyncio.run(self._call())
        self.client_shares.append((time.process_time() - worked) / (time.perf_counter() - started))
        numbers = {name: np.concatenate([item.token_rewards[name] for item in items]) for name in _METHODS}
        return {"reward": np.array([item.reward for item in items]), **numbers}

    async def _call(self) -> list[SampleTokenRewards]:
        heap = iter(enumerate(self.samples))
        items: dict[int, SampleTokenRewards] = {}
        methods = [{"name": name, "beta": 1.0} for name in _METHODS]

        async def caller() -> None:
            for index, sample in heap:
                answer = await client.token_rewards([sample], methods=methods)
                items[index] = answer.data[0]

        async with AsyncClient(self.url) as client:
            await asyncio.gather(*(caller() for _ in range(self.callers)))
        return [items[index] for index in range(len(self.samples))]
