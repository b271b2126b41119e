"""A server with a small reward model, and programs that run in the trainers' environments."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from densereward_client import Client
from serving import Json, Server, environment, serving

ROOT = Path(__file__).parents[2]
SECONDS = 300.0  # a loaded machine is slow to import a trainer

Train = Callable[..., Json]


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("trainers") / "log", "--device", "cpu", "--model", str(tiny_llama)) as up:
        yield up


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, trust_env=False) as client:
        yield client


def run(trainer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in a trainer's environment."""
    python = Path(os.environ.get("TRAINERS", ".trainers")).expanduser() / trainer / "bin" / "python"
    assert python.exists(), f"there is no {python}; `make test-trainers` installs it"
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("client", "tests/support"))
    return subprocess.run(
        [str(python), *arguments],
        env=environment(PYTHONPATH=paths, TRL_EXPERIMENTAL_SILENCE="1", NO_PROXY="127.0.0.1", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture
def train(server: Server, tmp_path: Path) -> Train:
    """Runs `run_TRAINER.py` in the trainer's environment with a job, and returns what it wrote down.

    With several processes, `processes` has what each wrote down.
    """

    def train(trainer: str, /, processes: int = 1, **job: Any) -> Json:
        output = tmp_path / "seen.json"
        request = {"url": server.url, "output": str(output), "folder": str(tmp_path / "run")} | job
        (tmp_path / "job.json").write_text(json.dumps(request))
        several = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes)) if processes > 1 else ()
        ended = run(trainer, *several, str(Path(__file__).parent / f"run_{trainer}.py"), str(tmp_path / "job.json"))
        assert ended.returncode == 0, ended.stderr[-4000:]
        if processes > 1:
            ranks = [output.with_name(f"{output.name}{rank}") for rank in range(processes)]
            return {"processes": [json.loads(each.read_text()) for each in ranks]}
        seen: Json = json.loads(output.read_text())
        return seen

    return train
