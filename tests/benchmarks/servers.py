"""The servers as processes of their own: ours, a plain reward server, and vLLM's in an environment of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_START_SECONDS = 180.0
_VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Running:
    """A server, with all the processes that it started."""

    url: str
    process: int

    @property
    def bytes(self) -> int:
        """What its processes hold; pages that several share are counted once."""
        sizes = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in _with_children(self.process)]
        return sum(int(line.split()[1]) * 1024 for size in sizes for line in size.splitlines() if line[:4] == "Pss:")


def _with_children(process: int) -> list[int]:
    lists = [each.read_text().split() for each in Path(f"/proc/{process}/task").glob("*/children")]
    return [process, *(pid for pids in lists for child in pids for pid in _with_children(int(child)))]


def engine(
    name: str, folder: Path, threads: int, python: str = sys.executable, arguments: dict[str, object] | None = None
) -> AbstractContextManager[Running]:
    """Our server with an engine by its name, run by an interpreter that has it installed."""
    flags = {"model": str(folder), "port": "{port}", "log-level": "error", "engine": name, "prompt-cache-bytes": "0"}
    flags |= {"max-length": "4096"}
    flags |= {"engine-arguments": json.dumps(arguments)} if arguments else {}
    command = [python, "-W", "ignore", "-m", "densereward", "serve"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    return _started(command, "/ready", threads, _VLLM_ENVIRONMENT | _cores(threads))


def _cores(threads: int) -> dict[str, str]:
    """A core for each of vLLM's threads."""
    return {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}


def ours(folder: Path, threads: int) -> AbstractContextManager[str]:
    """The address of our server."""
    flags = {"model": str(folder), "port": "{port}", "device": "cpu", "log-level": "error"}
    flags["prompt-cache-bytes"] = "0"  # the rounds repeat their samples, which would be served from it
    command = [sys.executable, "-m", "densereward", "serve"] + [f"--{name}={value}" for name, value in flags.items()]
    return _running(command, "/ready", threads)


def plain(folder: Path, threads: int) -> AbstractContextManager[str]:
    """The address of the plain reward server."""
    return _running([sys.executable, "-m", "tests.benchmarks.reward_server", str(folder), "{port}"], "/health", threads)


def vllm(python: Path, folder: Path, threads: int) -> AbstractContextManager[str]:
    """The address of vLLM's server, run by another interpreter, which has it installed.

    Compiled and with a core for each thread: that serves a quarter to a third more than eager mode does.
    """
    flags = {
        "model": str(folder),
        "served-model-name": "model",
        "host": "127.0.0.1",
        "port": "{port}",
        "runner": "pooling",
        "dtype": "float32",
        "pooler-config": json.dumps({"task": "token_classify", "use_activation": False}),
        "uvicorn-log-level": "error",
    }
    switches = ["--disable-log-stats", "--disable-uvicorn-access-log"]
    command = [str(python), "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", *switches]
    command += [f"--{name}={value}" for name, value in flags.items()]
    return _running(command, "/health", threads, _VLLM_ENVIRONMENT | _cores(threads))


@contextmanager
def _running(
    command: Sequence[str], path: str, threads: int, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """A server's address until the end of the block."""
    with _started(command, path, threads, environment) as running:
        yield running.url


@contextmanager
def _started(
    command: Sequence[str], path: str, threads: int, environment: dict[str, str] | None = None
) -> Iterator[Running]:
    """A server until the end of the block, with all the processes that it starts.

    Raises:
        RuntimeError: it does not start.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    filled = [part.replace("{port}", str(port)) for part in command]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)} | (environment or {})
    with subprocess.Popen(filled, env=variables, start_new_session=True) as process:
        try:
            _wait(url + path, process)
            yield Running(url, process.pid)
        finally:
            _end(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the server did not start; the reason stands above")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
