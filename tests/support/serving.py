"""A densereward server as its users have it: a process of its own, on a port of its own, called with plain JSON."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from densereward_client.wire import ErrorBody, RewardsResponse, TokenRewardsResponse
from forked import Forked

Json = dict[str, Any]

NOT_BY_A_SCORE = ("steps", "implicit", "contrastive")
"""Methods that a model which scores sequences cannot serve by itself."""

SCORE = 1e-6
"""How far a score of the tiny models, which is about 1, may move with its batch."""
STEP = 2 * SCORE
"""The same for a token's reward, which is the difference of two scores."""
PATIENCE = 120.0  # seconds; a loaded machine is slow to import torch
# Every call on a connection of its own: one left open would be closed under the next caller by a server that stops.
_HTTP = httpx.Client(verify=False, trust_env=False, timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0))
_LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with these variables, and no others of densereward's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DENSEREWARD_")}
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


def command(*arguments: str, fresh: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """`densereward ARGUMENTS`, run to its end; a fresh one has an interpreter of its own, as users start it."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _start(arguments, environment(**variables), out, err, fresh=fresh)
        try:
            status = process.wait(PATIENCE)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


def _start(
    arguments: Sequence[str], variables: dict[str, str], out: Path, err: Path, *, fresh: bool
) -> subprocess.Popen[bytes] | Forked:
    if not fresh:
        return Forked(arguments, variables, out, err)
    with out.open("ab") as stdout, err.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "densereward", *arguments], env=variables, stdout=stdout, stderr=stderr
        )


@dataclass(frozen=True)
class Ended:
    """What is left of a command that was called as a function."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


def until(holds: Callable[[], bool], what: str, seconds: float = 30.0, every: float = 0.01) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(every)


class Server:
    """A running `densereward serve` whose log goes to a file; a fresh one has an interpreter of its own."""

    def __init__(self, log: Path, *flags: str, fresh: bool = False, **variables: str) -> None:
        self._log = log
        log.touch()
        self.process = _start(["serve", "--port", "0", *flags], environment(**variables), log, log, fresh=fresh)
        self.url = ""

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        return url.host, url.port or 80

    def wait_until_listening(self) -> None:
        until(self._listens, "the port", PATIENCE, every=0.05)

    def wait_until_ready(self) -> None:
        self.wait_until_listening()
        until(lambda: self._alive() and self.get("/ready").is_success, "/ready", PATIENCE, every=0.2)

    def _listens(self) -> bool:
        found = _LISTENING.search(self.log)
        self.url = found[1] if self._alive() and found else ""
        return bool(self.url)

    def _alive(self) -> bool:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
        return True

    def get(self, path: str) -> httpx.Response:
        return _HTTP.get(self.url + path)

    def metrics(self) -> dict[str, float]:
        """`name{labels}` to value."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_status(self) -> int:
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def children_named(name: str, parent: int) -> set[int]:
    """The child processes of another that call themselves so."""
    lists = [each.read_text().split() for each in Path(f"/proc/{parent}/task").glob("*/children")]
    children = [int(pid) for pids in lists for pid in pids]
    return {pid for pid in children if name in Path(f"/proc/{pid}/cmdline").read_text()}


@contextmanager
def serving(log: Path, *flags: str, fresh: bool = False, **variables: str) -> Iterator[Server]:
    """A server that is ready; it is gone at the end."""
    server = Server(log, *flags, fresh=fresh, **variables)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class Api:
    """A server as curl sees it. Whatever comes back must keep the contract."""

    http: httpx.Client

    def post(self, samples: Sequence[Any], path: str = "/token_rewards", **request: Any) -> httpx.Response:
        return self.http.post(path, json={"samples": samples} | request)

    def send(self, body: bytes | str, path: str = "/token_rewards") -> httpx.Response:
        return self.http.post(path, content=body)

    def answer(self, samples: Sequence[Any], path: str = "/token_rewards", **request: Any) -> Json:
        return answer(self.post(samples, path, **request))

    def items(self, samples: Sequence[Any], path: str = "/token_rewards", **request: Any) -> list[Json]:
        items: list[Json] = self.answer(samples, path, **request)["data"]
        assert [item["index"] for item in items] == list(range(len(samples)))
        return items

    def item(self, sample: Json, path: str = "/token_rewards", **request: Any) -> Json:
        return self.items([sample], path, **request)[0]

    def refusal(self, samples: Sequence[Any], path: str = "/token_rewards", **request: Any) -> tuple[int, Json]:
        return refusal(self.post(samples, path, **request))


def answer(response: httpx.Response) -> Json:
    """An answer that keeps the contract: it reads as the wire says, and every item's sums come out."""
    assert response.status_code == 200, response.text
    content: Json = response.json()
    if content["object"] == "rewards":
        RewardsResponse.model_validate_json(response.content)
        return content
    for item in TokenRewardsResponse.model_validate_json(response.content).data:
        for method, rewards in item.token_rewards.items():
            expected = (item.reward or 0.0) * (item.scale or {}).get(method, 1.0)
            off = float(rewards.sum(dtype="f8")) + item.baseline[method] - expected
            assert abs(off) < 1e-5 * max(1.0, float(abs(rewards).sum())), (item.index, method)
    return content


def refusal(response: httpx.Response) -> tuple[int, Json]:
    """Status and error of an answer that keeps the contract; JSON is compared as it is."""
    assert response.status_code >= 400, response.text
    ErrorBody.model_validate_json(response.content)
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"code", "message", "details"}
    error: Json = content["error"]
    return response.status_code, error
