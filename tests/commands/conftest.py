"""Commands called as functions, where starting a process for each would only take longer."""

from __future__ import annotations

import os

import pytest

from densereward.cli import main
from serving import Ended, Run


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DENSEREWARD_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`densereward ARGUMENTS` in this process: its exit status and what it printed."""

    def call(*arguments: object) -> Ended:
        status, message = 0, ""
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            # What the interpreter does: a message goes to stderr, and the status is 1.
            status, message = (ended.code, "") if isinstance(ended.code, int) else (1, str(ended.code))
        captured = capsys.readouterr()
        return Ended(status, captured.out, captured.err + message)

    return call
