"""Policies' tokenizers, and a server with two reward models, for the tests of bindings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tiny
from densereward_client import Client
from densereward_client.binding import Binding
from densereward_client.wire import ModelList
from families import TOKENS
from serving import Server, serving

MESSAGES = [{"role": "user", "content": "How was it?"}]
LETTERS = ["The fox", " ", "\n", "\t", "ß", "é", "e\u0301", "京都", "😀", "👩‍👩‍👧", "\x07", "\u200b", "don't. "]


def bindings(policy: str, models: ModelList) -> Binding:
    return Binding(TOKENS[policy], models, "closed")


def ids_of(tokenizer: Any, written: str, *, eos: bool = True) -> list[int]:
    ids = list(tokenizer.backend_tokenizer.encode(written, add_special_tokens=False).ids)
    return [*ids, tokenizer.eos_token_id] if eos and tokenizer.eos_token_id is not None else ids


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Reward models with tiny's tokens, closed by a template, and with SentencePiece's, closed by nothing."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder / "closed")
    tiny.make_model("llama", vocab_size=330, seed=1).save_pretrained(folder / "bare")
    tiny.make_sentencepiece_style_tokenizer().save_pretrained(folder / "bare")
    models = [part for name in ("closed", "bare") for part in ("--model", f"{name}={folder / name}")]
    with serving(
        folder / "log", "--device", "cpu", "--allow", "vocabulary", "--allow", "special_tokens", *models
    ) as up:
        yield up


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def models(client: Client) -> ModelList:
    return client.models()
