"""Trainers in environments of their own, each told by a variable that names its interpreter.

A trainer's side of a test is a program beside it: it gets JSON, and answers with JSON in its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serving import Json, environment

HERE = Path(__file__).parent


def python_of(trainer: str) -> str:
    """A trainer's interpreter; the test is skipped where there is none."""
    python = os.environ.get(f"{trainer.upper()}_PYTHON")
    if not python:
        pytest.skip(f"{trainer.upper()}_PYTHON names no interpreter that has {trainer}")
    return python


def ask(trainer: str, request: Json, seconds: float = 300.0) -> Json:
    """Run a trainer's program in its environment."""
    ended = subprocess.run(
        [python_of(trainer), str(HERE / f"{trainer}_program.py"), json.dumps(request)],
        env=environment(PYTHONPATH=str(HERE.parents[1] / "client"), NO_PROXY="127.0.0.1"),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    answer: Json = json.loads(ended.stdout.splitlines()[-1])
    return answer


def ids_of(tokenizer: Any, text: str, *, ended: bool = True) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    return [*ids, tokenizer.eos_token_id] if ended else ids
