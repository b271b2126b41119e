"""`densereward` in a fork of a process that has imported it: to import torch takes seconds, and tests are short."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from densereward.cli import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["densereward.commands.serve", "densereward.checks.loading", "transformers.models.llama.modeling_llama"]
)


class Forked:
    """`densereward ARGUMENTS`, with what tests use of `subprocess.Popen`; its output is added to two files, or one."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], out: Path, err: Path) -> None:
        path = environment.get("PYTHONPATH")
        assert path == os.environ.get("PYTHONPATH"), "a fork has imported the service already, from elsewhere"
        self._process = _FORKS.Process(target=_run, args=(list(arguments), environment, out, err))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("densereward", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    main(arguments)
