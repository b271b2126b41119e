"""The examples run as they are, in the trainers they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving import Server

from .conftest import ROOT, run

pytestmark = pytest.mark.trainers


@pytest.mark.parametrize("trainer", ["trl_grpo", "trl_ppo"])
def test_an_example_trains(trainer: str, server: Server, tmp_path: Path) -> None:
    example = ROOT / "client" / "examples" / f"{trainer}.py"
    ended = run(trainer, str(example), "--url", server.url, "--steps", "2", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert [line.split(":")[0] for line in ended.stdout.splitlines() if line.startswith("step ")] == [
        "step 1",
        "step 2",
    ]
