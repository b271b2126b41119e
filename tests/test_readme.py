"""What the README shows is true: its request and the answer to it, its client, its commands, its length."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import Server, answer, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the embedded model, as `make serve` starts it."""
    with serving(tmp_path_factory.mktemp("readme") / "log") as running:
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_curl_is_answered_as_shown(server: Server) -> None:
    (body,) = (re.search(r"-d '(.*)'", block, re.DOTALL) for block in blocks("sh") if "curl" in block)
    assert body is not None
    request = json.loads(body[1])
    content = answer(httpx.post(f"{server.url}/token_rewards", json=request, trust_env=False))
    (item,) = content["data"]
    assert set(item["token_rewards"]) == set(request["methods"])
    assert "".join(item["tokens"]) == request["samples"][0]["response"]
    (shown,) = json.loads(blocks("json")[0])["data"]
    assert shown.keys() <= item.keys()
    assert shown["tokens"] == item["tokens"]
    for name in ("baseline", "token_rewards"):
        assert shown[name].keys() == item[name].keys()
        assert all(shown[name][method] == pytest.approx(item[name][method], abs=0.006) for method in shown[name])
    assert shown["reward"] == pytest.approx(item["reward"], abs=0.006)


def test_the_client_in_five_lines_runs(server: Server) -> None:
    (program,) = blocks("python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 5
    names: dict[str, Any] = {}
    exec(program.replace("http://127.0.0.1:8000", server.url), names)
    assert names["rewards"].shape == names["mask"].shape
    assert names["mask"].all()


def test_it_fits_on_a_screen() -> None:
    assert len(README.splitlines()) <= 65
