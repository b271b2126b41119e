"""One server for most of the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

import tiny
from serving import Api, Server, serving

STRICT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'critic' %}"
    "{{ raise_exception('no critics here') }}{% endif %}{% endfor %}" + tiny.CHATML
)


@pytest.fixture(scope="session")
def key() -> str:
    return "the-key-of-this-server"


@pytest.fixture(scope="session")
def poison() -> str:
    """A text whose token makes the model answer NaN. The self-check's probes do not hold it."""
    return "\x0e"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, poison: str) -> Path:
    """A random Llama whose template refuses critics and whose embedding has one bad row."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.make_tokenizer(template=STRICT_TEMPLATE)
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[tokenizer.encode(poison)[0]] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(model_folder: Path, key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--model", str(model_folder), "--model-name", "tiny", "--max-body-bytes", "400000", "--max-samples", "64")
    with serving(log, *flags, DENSEREWARD_API_KEY=key) as running:
        yield running


@pytest.fixture(scope="session")
def http(server: Server, key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def api(http: httpx.Client) -> Api:
    return Api(http)


@pytest.fixture(autouse=True)
def _show_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """The end of the server's log, which pytest shows beside a failing test."""
    yield
    if "server" in request.fixturenames:
        print(request.getfixturevalue("server").log[-3000:])
