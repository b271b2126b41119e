"""For tests that choose the responses themselves: runs a program in a trainer's environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving import Json
from tests.trainers.conftest import run

HERE = Path(__file__).parent


def run_program(trainer: str, folder: Path, job: Json) -> Json:
    """Runs `run_TRAINER.py` with a job, and returns what it wrote down."""
    output = folder / "seen.json"
    (folder / "job.json").write_text(json.dumps(job | {"output": str(output)}))
    ended = run(trainer, str(HERE / f"run_{trainer}.py"), str(folder / "job.json"))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    seen: Json = json.loads(output.read_text())
    return seen


def ids_of(tokenizer: Any, text: str, *, ended: bool = True) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    return [*ids, tokenizer.eos_token_id] if ended else ids
