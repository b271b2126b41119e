"""A reward model, a policy with other tokens, and servers for the trainers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from densereward_client import Client
from serving import Server, serving

HERE = Path(__file__).parent
TURNS = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.trainers)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With byte-level tokens, closed by a template."""
    return tiny.save(tmp_path_factory.mktemp("reward-model"))


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in Llama 2's way, with a template without special tokens."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny.make_sentencepiece_style_tokenizer()
    tokenizer.chat_template = TURNS
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(policy: Path) -> Any:
    return tiny.PreTrainedTokenizerFast.from_pretrained(policy)


@pytest.fixture(scope="session")
def server(reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log", "--device", "cpu", "--model", str(reward_model)) as up:
        yield up


@pytest.fixture
def doomed(reward_model: Path, tmp_path: Path) -> Iterator[Server]:
    """A server for a test that ends it."""
    with serving(tmp_path / "log", "--device", "cpu", "--model", str(reward_model)) as up:
        yield up


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, trust_env=False) as client:
        yield client
