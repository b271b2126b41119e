"""What a call sends, and how clients are made and closed: over real sockets, for both clients."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import ValidationError

from densereward_client import (
    AsyncClient,
    Client,
    Message,
    MethodRequest,
    NotFound,
    Sample,
)

if TYPE_CHECKING:
    from tests.client.conftest import MakeClient, ScriptedServer

SAMPLES = [{"prompt": "p", "response": "a b", "id": "first"}, {"prompt": "p", "response": "c d e"}]


def test_a_batch_is_one_request_with_exactly_what_was_given(client: Client, server: ScriptedServer) -> None:
    client.token_rewards(
        [
            {"prompt": "p", "response": "a b", "response_spans": [(0, 1), (1, 3)], "id": "first"},
            Sample(messages=[Message(role="user", content="hi")], response_token_ids=[5, 6], finished=False),
        ],
        methods=["red", {"name": "abc", "beta": 0.8}, MethodRequest(name="abc", label="abc0", beta=0.0)],
        include=["tokens"],
        model="other",
        on_error="item",
    )
    (request,) = server.received
    assert (request.method, request.path) == ("POST", "/token_rewards")
    assert request.headers["content-type"] == "application/json"
    assert "authorization" not in request.headers
    assert request.json == {
        "model": "other",
        "samples": [
            {"prompt": "p", "response": "a b", "response_spans": [[0, 1], [1, 3]], "id": "first"},
            {"messages": [{"role": "user", "content": "hi"}], "response_token_ids": [5, 6], "finished": False},
        ],
        "methods": ["red", {"name": "abc", "beta": 0.8}, {"name": "abc", "label": "abc0", "beta": 0.0}],
        "include": ["tokens"],
        "on_error": "item",
        "encoding_format": "base64",
    }


def test_a_clients_priority_goes_with_every_call(make_client: MakeClient, server: ScriptedServer) -> None:
    client = make_client(priority=10)
    client.rewards([{"prompt": "p", "response": "a"}])
    client.token_rewards([{"prompt": "p", "response": "a"}])
    assert [request.json["priority"] for request in server.received] == [10, 10]


def test_defaults_leave_the_model_and_the_methods_to_the_server(client: Client, server: ScriptedServer) -> None:
    client.token_rewards([{"prompt": "", "response": "a"}])
    assert server.received[0].json == {
        "samples": [{"prompt": "", "response": "a"}],
        "include": [],
        "on_error": "request",
        "encoding_format": "base64",
    }


def test_a_none_inside_a_message_or_a_method_is_sent_as_it_is(client: Client, server: ScriptedServer) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": None}
    client.token_rewards([{"messages": [message], "response": "a"}], methods=[{"name": "red", "first_token": None}])
    assert server.received[0].json["samples"][0]["messages"] == [message]
    assert server.received[0].json["methods"] == [{"name": "red", "first_token": None}]


def test_sequence_rewards_models_and_readiness_have_their_own_routes(client: Client, server: ScriptedServer) -> None:
    rewards = client.rewards(SAMPLES, model="default", on_error="item")
    models = client.models()
    assert client.ready() is True
    assert [item.reward for item in rewards.data] == [1.0, 1.25]
    assert models.data[0].methods["x"].reason == "no such head"
    assert [(request.method, request.path) for request in server.received] == [
        ("POST", "/rewards"),
        ("GET", "/v1/models"),
        ("GET", "/ready"),
    ]
    assert server.received[0].json == {"model": "default", "samples": SAMPLES, "on_error": "item"}


def test_the_key_goes_with_every_request_as_a_bearer_token(make_client: MakeClient, server: ScriptedServer) -> None:
    client = make_client(api_key="k-1", headers={"X-Team": "blue"})
    client.rewards(SAMPLES)
    client.models()
    assert [request.headers["authorization"] for request in server.received] == ["Bearer k-1", "Bearer k-1"]
    assert server.received[0].headers["x-team"] == "blue"


def test_a_base_url_may_have_a_path_of_its_own(make_client: MakeClient, server: ScriptedServer) -> None:
    server.will_refuse(404)
    with pytest.raises(NotFound):
        make_client(f"{server.url}/rm/").rewards(SAMPLES)
    assert server.received[0].path == "/rm/rewards"


@pytest.mark.parametrize("encoding_format", ["base64", "float"])
def test_rewards_are_float32_arrays_whatever_the_encoding(client: Client, encoding_format: Any) -> None:
    answer = client.token_rewards(SAMPLES, methods=["red"], encoding_format=encoding_format)
    for item, tokens in zip(answer.data, (2, 3), strict=True):
        assert item.token_rewards["red"].dtype == np.float32
        assert item.token_rewards["red"].tolist() == [0.25] * tokens


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [{"prompt": "p"}],
        [{"prompt": "p", "response": "a", "respones_mask": [1]}],
        [{"prompt": "p", "response": "a", "weights": [math.nan]}],
    ],
)
def test_a_wrong_request_is_refused_before_it_is_sent(client: Client, server: ScriptedServer, samples: Any) -> None:
    with pytest.raises(ValidationError):
        client.token_rewards(samples)
    assert server.received == []


def test_a_method_given_without_a_list_is_refused(client: Client) -> None:
    with pytest.raises(ValidationError, match="methods"):
        client.token_rewards(SAMPLES, methods="red")


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "127.0.0.1:8000"},
        {"base_url": "ftp://somewhere"},
        {"timeout": 0.0},
        {"timeout": math.inf},
        {"retries": -1},
        {"api_key": "k\n"},
    ],
)
def test_a_client_that_could_never_work_is_not_made(make_client: MakeClient, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))) as caught:
        make_client(**options)
    assert "k\n" not in str(caught.value)


def test_both_clients_have_the_same_methods_with_the_same_signatures() -> None:
    for name in ("__init__", "token_rewards", "rewards", "models", "ready"):
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name))


def test_a_client_is_a_context_manager_that_closes_its_connections(server: ScriptedServer) -> None:
    with Client(server.url, trust_env=False) as client:
        client.models()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()


async def test_an_async_client_is_a_context_manager_and_serves_calls_at_once(server: ScriptedServer) -> None:
    async with AsyncClient(server.url, trust_env=False) as client:
        answers = await asyncio.gather(*(client.token_rewards(SAMPLES[:n]) for n in (1, 2, 1, 2)))
    assert [len(answer.data) for answer in answers] == [1, 2, 1, 2]
    with pytest.raises(RuntimeError, match="closed"):
        await client.models()


def test_one_client_serves_several_threads(server: ScriptedServer) -> None:
    lengths: list[int] = []
    with Client(server.url, trust_env=False) as client:
        threads = [threading.Thread(target=lambda: lengths.append(len(client.rewards(SAMPLES).data))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert lengths == [2] * 8
