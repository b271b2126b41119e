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
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    return _running(command, "/health", threads, _VLLM_ENVIRONMENT | cores)


@contextmanager
def _running(
    command: Sequence[str], path: str, threads: int, environment: dict[str, str] | None = None
) -> Iterator[str]:
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
            yield url
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
