"""What the README shows is true: its request, its client, its tables, its commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from densereward.heads import HEADS
from densereward.methods import METHODS
from densereward_client import Client
from serving import Server, answer, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("readme") / "log", "--model", str(tiny_llama)) as running:
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_curl_is_answered(server: Server) -> None:
    (body,) = (re.search(r"-d '(.*)'", block, re.DOTALL) for block in blocks("sh") if "curl" in block)
    assert body is not None
    content = answer(httpx.post(f"{server.url}/token_rewards", json=json.loads(body[1]), trust_env=False))
    item = content["data"][0]
    assert set(item["token_rewards"]) == {"red", "abc"}
    assert "".join(item["tokens"]) == "The food was great, but the music was awful."


def test_the_client_in_five_lines_runs(server: Server) -> None:
    program, _ = blocks("python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 5
    names: dict[str, Any] = {}
    exec(program.replace("http://127.0.0.1:8000", server.url), names)
    assert names["rewards"].shape == names["mask"].shape
    assert names["mask"].all()


def test_the_lines_that_bind_a_policys_tokenizer_run(server: Server) -> None:
    _, program = blocks("python")
    tokenizer = tiny.make_tokenizer()
    ids = [*tokenizer("Thank you").input_ids, tokenizer.eos_token_id]
    with Client(server.url, trust_env=False) as client:
        names: dict[str, Any] = {"client": client, "tokenizer": tokenizer, "ids": ids}
        exec(program, names | {"dialogue": [{"role": "user", "content": "How was it?"}]}, names)
    assert len(names["answer"].data[0].token_rewards["red"]) == len(ids)


def test_the_table_of_methods_is_the_servers(server: Server) -> None:
    section = README.split("## Methods")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*$", section, re.MULTILINE)
    assert rows == list(METHODS) == list(server.get("/v1/models").json()["data"][0]["methods"])


def test_the_parameters_and_defaults_in_the_table_are_the_methods_own() -> None:
    section = README.split("## Methods")[1].split("\n## ")[0]
    for name in METHODS:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", section, re.MULTILINE)
        fields = METHODS[name].params_type.model_fields
        parameters = row.split("|")[3]
        own = {parameter: field for parameter, field in fields.items() if parameter not in ("normalize", "clip")}
        assert set(re.findall(r"`(\w+)` \(", parameters)) == set(own)
        for parameter, field in own.items():
            shown = re.search(rf"`{parameter}` \(`?([\w.]+)", parameters)
            assert shown is not None
            if field.default is not None:
                assert shown[1] == (
                    f"{field.default:g}" if type(field.default) in (int, float) else _said(field.default)
                )


def _said(default: str | bool) -> str:
    if isinstance(default, str):
        return "texts" if " " in default else default
    return str(default).lower()


def test_the_table_of_families_is_the_codes() -> None:
    section = README.split("## Reward models")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*) \| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    told = {"sequence": "prefix scores", "token": "a score for each token", "step": "a score for each step"}
    assert [(families, name) for families, name, _ in rows[:-1]] == [(HEADS[name].families, name) for name in HEADS]
    assert all(what.startswith(told[HEADS[name].unit]) for _, name, what in rows[:-1])


def test_the_commands_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets
    assert set(re.findall(r"(?:^|`|or: )densereward (\w+)", README, re.MULTILINE)) <= {
        "serve",
        "score",
        "check",
        "demo",
    }


def test_the_files_it_links_to_are_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
