"""What CONTRIBUTING says is true: a method, a head, an engine and a trainer are one file and one row each.

The files and rows are taken from the document, put into a copy of the sources, and used there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

import tiny
from serving import Json, Server, answer, environment, serving

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", DOCUMENT, re.DOTALL))
_ROW = re.compile(r"```python\n# (\S+\.py), in (\w+)\n(.*?)```", re.DOTALL)
ROWS = {path: (table, row) for path, table, row in _ROW.findall(DOCUMENT)}
TRAINER_ROW = re.findall(r"```markdown\n(\|.*\|)\n```", DOCUMENT)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the document's files and rows in it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("service", "client"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in FILES.items():
        assert not (ROOT / path).exists()
        (folder / path).write_text(text)
    for path, (table, row) in ROWS.items():
        before, named, after = (folder / path).read_text().partition(f"{table} = Table(")
        assert named
        (folder / path).write_text(before + named + after.replace("    {\n", "    {\n" + row, 1))
    return folder


@pytest.fixture(scope="module")
def path_of(sources: Path) -> str:
    return f"{sources / 'service'}:{sources / 'client'}"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the family that the document's head reads."""
    folder = tmp_path_factory.mktemp("judge")
    model = tiny.make_model("llama")
    weights = {name.replace("score.", "judge."): each.contiguous() for name, each in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = model.config.to_dict() | {"architectures": ["JudgeRewardModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(judge: Path, path_of: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("log") / "log", "--model", str(judge), fresh=True, PYTHONPATH=path_of
    ) as running:
        yield running


def post(server: Server, path: str, **request: Any) -> Json:
    sample = {"prompt_token_ids": [5, 6], "response_token_ids": [7, 8, 9]}
    response = httpx.post(server.url + path, json={"samples": [sample | request.pop("sample", {})]} | request)
    item: Json = answer(response)["data"][0]
    return item


def run(program: str, path_of: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(PYTHONPATH=path_of),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_each_kind_of_part_has_a_file_and_a_row() -> None:
    assert {Path(path).parent.name for path in FILES} == {"methods", "heads", "engines", "trainers"}
    assert {table for table, _ in ROWS.values()} == {"METHODS", "HEADS", "ENGINES"}
    assert len(TRAINER_ROW) == 1


def test_the_files_are_formatted_and_linted_as_the_project_is(sources: Path) -> None:
    paths = [str(sources / path) for path in FILES]
    for command in (["ruff", "format", "--check"], ["ruff", "check"]):
        ended = subprocess.run(
            [sys.executable, "-m", *command, "--config", str(ROOT / "pyproject.toml"), *paths],
            capture_output=True,
            text=True,
            check=False,
            cwd=sources,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_method_is_listed_described_and_served(server: Server) -> None:
    assert "ramp" in server.get("/v1/models").json()["data"][0]["methods"]
    described = {each["name"]: each for each in server.get("/v1/methods").json()["data"]}
    assert described["ramp"]["equation"].startswith("r_t = R")
    item = post(server, "/token_rewards", methods=["ramp"])
    shares = [share * item["reward"] for share in (1 / 6, 2 / 6, 3 / 6)]
    assert item["token_rewards"]["ramp"] == pytest.approx(shares, rel=1e-5)


def test_the_head_reads_the_familys_checkpoint(server: Server) -> None:
    assert server.get("/v1/models").json()["data"][0]["head"] == "judge"
    closed = torch.tensor([[5, 6, 7, 8, 9, 2, 201]])
    model = tiny.make_model("llama")
    with torch.no_grad():
        hidden = model.get_submodule("model")(input_ids=closed).last_hidden_state[0, -1]
        expected = float(model.get_submodule("score")(hidden))
    assert post(server, "/rewards")["reward"] == pytest.approx(expected, abs=1e-4)


def test_the_engine_is_a_value_of_the_flag(judge: Path, path_of: str, tmp_path: Path) -> None:
    flags = ("--model", str(judge), "--engine", "id_mean")
    with serving(tmp_path / "log", *flags, fresh=True, PYTHONPATH=path_of) as running:
        assert running.get("/v1/models").json()["data"][0]["engine"] == "id_mean"
        item = post(running, "/rewards", sample={"finished": False})
        assert item["reward"] == pytest.approx(7 / 320)


def test_the_adapter_gives_its_trainer_rewards_that_sum_to_the_servers(server: Server, path_of: str) -> None:
    program = """
import json, sys
from densereward_client import Client
from densereward_client.trainers.toy import token_rewards
with Client(sys.argv[1], trust_env=False) as client:
    row = {"prompt_ids": [5, 6], "response_ids": [7, 8, 9]}
    reward = client.rewards([{"prompt_token_ids": [5, 6], "response_token_ids": [7, 8, 9]}]).data[0].reward
    print(json.dumps([token_rewards(client, [row]), reward]))
"""
    [rows, reward] = json.loads(run(program, path_of, server.url))
    assert len(rows[0]) == 3
    assert sum(rows[0]) == pytest.approx(reward, abs=1e-5)
