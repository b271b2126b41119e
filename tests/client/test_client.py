"""What a call sends, what it refuses to return, and how it tries again: over real sockets, for both clients."""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from densereward_client import (
    AsyncClient,
    BadRequest,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    DenseRewardError,
    InvalidAnswer,
    Message,
    MethodRequest,
    NotFound,
    Overloaded,
    Sample,
    ServerFailure,
    Unavailable,
)

if TYPE_CHECKING:
    from tests.client.conftest import MakeClient, ScriptedServer

SAMPLES = [{"prompt": "p", "response": "a b", "id": "first"}, {"prompt": "p", "response": "c d e"}]


# --- what is sent -------------------------------------------------------------------------------------------------


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


# --- what is never returned ---------------------------------------------------------------------------------------


def _set(item: int, key: str, value: Any) -> Callable[[Any], object]:
    return lambda answer: answer["data"][item].update({key: value})


AN_ERROR = {"code": "too_long", "message": "9 tokens, and 8 is the limit"}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda answer: answer["data"].pop(), "2 samples were sent and 1 items came back"),
        (lambda answer: answer["data"].reverse(), "item 0: index 1"),
        (_set(0, "id", "second"), "item 0: id 'second' came back for 'first'"),
        (_set(0, "id", None), "item 0: id None"),
        (_set(1, "reward", None), "item 1: it has neither a reward nor an error"),
        (_set(1, "reward", math.nan), "reward"),
        (_set(1, "error", AN_ERROR), "item 1: it has an error.*too_long: 9 tokens"),
        (_set(1, "token_rewards", {"abc": [0.25] * 3}), "item 1: no token rewards of red"),
        (_set(1, "token_rewards", {"red": [0.25, math.nan, 0.25]}), "item 1: red is not finite at 1"),
        (_set(1, "token_rewards", {"red": [0.25, None, 0.25]}), "item 1: red is not finite at 1"),
        (_set(1, "token_rewards", {"red": [math.inf, 0.0, 0.0]}), "item 1: red is not finite at 0"),
        (_set(1, "token_rewards", {"red": [[0.25] * 3]}), r"data\.1\.token_rewards\.red\n.*2 dimensions"),
        (_set(1, "token_rewards", {"red": 0.75}), "red"),
        (_set(1, "token_rewards", {"red": {"0": 0.75}}), "TokenRewardsResponse"),
        (_set(1, "token_rewards", {"red": "AAAA"}), "base64"),
        (_set(1, "token_rewards", {"red": [0.25] * 3, "abc": [1.25]}), "item 1: the methods disagree"),
        (_set(1, "token_rewards", {"red": [0.25, 0.25, 0.26]}), "sum to 1.26 and not to the reward, 1.25"),
        (_set(1, "baseline", {}), "sum to 0.75 and not to the reward, 1.25"),
        (_set(1, "prefix_scores", [0.5, math.nan]), "item 1: prefix_scores is not finite at 1"),
        (_set(1, "attention", [math.inf]), "item 1: attention is not finite at 0"),
        (lambda answer: answer.pop("fingerprint"), "fingerprint"),
        (lambda answer: answer.update(object="rewards"), "object"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_never_returned(
    client: Client, server: ScriptedServer, spoil: Callable[[Any], object], complaint: str
) -> None:
    server.will_answer_but(spoil)
    with pytest.raises(InvalidAnswer, match=complaint):
        client.token_rewards(SAMPLES, methods=["red"])
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("sample", "told_by"),
    [
        ({"prompt": "p", "response": "a b c", "response_spans": [[0, 2], [2, 5]]}, "2 response_spans"),
        ({"prompt": "p", "response_token_ids": [4, 5]}, "2 response_token_ids"),
        ({"prompt": "p", "response": "a b", "response_mask": [1, 1]}, "2 response_mask"),
    ],
)
def test_the_rewards_are_as_many_as_the_trainers_tokens(
    client: Client, server: ScriptedServer, sample: Any, told_by: str
) -> None:
    assert len(client.token_rewards([sample]).data[0].token_rewards["red"]) == 2
    server.will_answer_but(lambda answer: answer["data"][0].update(reward=1.25, token_rewards={"red": [0.25] * 3}))
    with pytest.raises(InvalidAnswer, match=f"item 0: red has 3 token rewards for {told_by}"):
        client.token_rewards([sample])


def test_a_masked_token_has_no_reward(client: Client, server: ScriptedServer) -> None:
    sample = {"prompt": "p", "response": "a b c", "response_mask": [1, 0, 1]}
    assert client.token_rewards([sample]).data[0].token_rewards["red"].tolist() == [0.25, 0.0, 0.25]
    server.will_answer_but(lambda answer: answer["data"][0]["token_rewards"].update(red=[0.25, 0.25, 0.0]))
    with pytest.raises(InvalidAnswer, match="response_mask leaves out"):
        client.token_rewards([sample])


def test_a_sum_may_be_off_by_what_float32_loses(client: Client, server: ScriptedServer) -> None:
    server.will_answer_but(lambda answer: answer["data"][0].update(reward=1.00005))
    server.will_answer_but(
        lambda answer: answer["data"][0].update(reward=0.6, token_rewards={"red": [5000.0, -5000.0]})
    )
    assert client.token_rewards(SAMPLES).data[0].reward == 1.00005
    assert client.token_rewards(SAMPLES).data[0].reward == 0.6


def test_a_label_is_the_key_of_its_rewards(client: Client, server: ScriptedServer) -> None:
    answer = client.token_rewards(SAMPLES, methods=[{"name": "abc", "label": "half", "beta": 0.5}])
    assert answer.data[0].token_rewards.keys() == {"half"}
    server.will_answer_but(lambda answer: answer["data"][0].update(token_rewards={"abc": [0.25, 0.25]}))
    with pytest.raises(InvalidAnswer, match="no token rewards of half"):
        client.token_rewards(SAMPLES, methods=[{"name": "abc", "label": "half", "beta": 0.5}])


def test_an_answer_without_any_method_is_never_returned(client: Client, server: ScriptedServer) -> None:
    server.will_answer_but(lambda answer: answer["data"][0].update(token_rewards={}))
    with pytest.raises(InvalidAnswer, match="item 0: no token rewards at all"):
        client.token_rewards(SAMPLES)


def test_an_item_may_carry_an_error_where_the_request_allows_it(client: Client, server: ScriptedServer) -> None:
    bad = {"index": 1, "error": AN_ERROR}
    server.will_answer_but(lambda answer: answer["data"].__setitem__(1, bad))
    answer = client.token_rewards(SAMPLES, on_error="item")
    assert answer.data[0].error is None
    assert answer.data[1].error is not None
    assert answer.data[1].error.code == "too_long"
    server.will_answer_but(lambda answer: answer["data"].__setitem__(1, bad))
    with pytest.raises(InvalidAnswer, match="too_long"):
        client.rewards(SAMPLES)


def test_a_page_that_calls_itself_a_success_is_no_answer(client: Client, server: ScriptedServer) -> None:
    server.will_reply(b"<html>Please sign in</html>")
    with pytest.raises(InvalidAnswer, match="<html>Please sign in"):
        client.rewards(SAMPLES)


def test_fields_that_this_client_does_not_know_are_kept(client: Client, server: ScriptedServer) -> None:
    server.will_answer_but(_set(0, "novelty", [{"start": 0}]))
    assert (client.token_rewards(SAMPLES).data[0].model_extra or {})["novelty"] == [{"start": 0}]


# --- trying again -------------------------------------------------------------------------------------------------


def test_a_full_queue_is_retried_after_the_time_the_server_names(client: Client, server: ScriptedServer) -> None:
    server.will_refuse(429, retry_after="0.3")
    assert len(client.token_rewards(SAMPLES).data) == 2
    (pause,) = server.pauses
    assert 0.3 <= pause < 1.5
    assert server.received[0].json == server.received[1].json


def test_a_draining_server_is_retried_after_the_date_it_names(client: Client, server: ScriptedServer) -> None:
    date = math.ceil(time.time() + 0.1)
    server.will_refuse(503, retry_after=formatdate(date, usegmt=True))
    client.rewards(SAMPLES)
    assert len(server.received) == 2
    assert date - 0.01 <= server.received[1].at < date + 1.5


def test_an_unavailable_server_is_retried_with_a_jittered_pause(client: Client, server: ScriptedServer) -> None:
    server.will_refuse(503)
    client.rewards(SAMPLES)
    (pause,) = server.pauses
    assert pause < 1.0


@pytest.mark.parametrize("loss", ["will_reset", "will_cut_short"])
def test_a_lost_connection_is_retried(client: Client, server: ScriptedServer, loss: str) -> None:
    getattr(server, loss)()
    assert len(client.token_rewards(SAMPLES).data) == 2
    assert len(server.received) == 2


def test_a_server_that_starts_late_is_found(make_client: MakeClient, server: ScriptedServer, unused_port: int) -> None:
    started: list[ScriptedServer] = []
    start = threading.Timer(0.1, lambda: started.append(type(server)(unused_port)))
    start.start()
    answer = make_client(f"http://127.0.0.1:{unused_port}").rewards(SAMPLES)
    start.join()
    started[0].close()
    assert len(answer.data) == 2


def test_a_server_that_never_starts_is_reported_with_the_attempts_made(
    make_client: MakeClient, unused_port: int
) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        make_client(f"http://127.0.0.1:{unused_port}", retries=1).rewards(SAMPLES)
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
    assert "attempts made: 2" in caught.value.__notes__[0]


@pytest.mark.parametrize(("status", "kind"), [(400, BadRequest), (422, BadRequest), (404, NotFound)])
def test_a_refusal_is_not_retried(
    client: Client, server: ScriptedServer, status: int, kind: type[DenseRewardError]
) -> None:
    server.will_refuse(status, retry_after="0")
    with pytest.raises(kind):
        client.token_rewards(SAMPLES)
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_failure_of_the_server_is_not_retried(client: Client, server: ScriptedServer, status: int) -> None:
    server.will_refuse(status, retry_after="0")
    with pytest.raises(ServerFailure):
        client.token_rewards(SAMPLES)
    assert len(server.received) == 1


def test_no_more_retries_are_made_than_asked_for(make_client: MakeClient, server: ScriptedServer) -> None:
    for code in ("one", "two"):
        server.will_refuse(429, code, retry_after="0")
    with pytest.raises(Overloaded, match="two"):
        make_client(retries=1).rewards(SAMPLES)
    assert len(server.received) == 2


def test_the_pause_doubles_up_to_its_limit_and_never_uses_the_shared_random_numbers(
    make_client: MakeClient, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[float] = []

    def record(low: float, high: float) -> float:
        assert low == 0.0
        longest.append(high)
        return 0.0

    monkeypatch.setattr("densereward_client._attempts._jitter.uniform", record, raising=True)
    before = random.getstate()
    for _ in range(7):
        server.will_refuse(503)
    make_client(retries=7).rewards(SAMPLES)
    assert longest == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert random.getstate() == before


# --- the deadline -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stall", ["will_stay_silent", "will_trickle"])
def test_the_deadline_ends_an_attempt(make_client: MakeClient, server: ScriptedServer, stall: str) -> None:
    getattr(server, stall)()
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"within 0.3 s, in attempt 1"):
        make_client(timeout=0.3).rewards(SAMPLES)
    assert 0.29 <= time.monotonic() - began < 0.8


def test_the_deadline_covers_all_attempts_together(make_client: MakeClient, server: ScriptedServer) -> None:
    server.will_refuse(429, "queue_full", retry_after="0.2")
    server.will_stay_silent()
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"within 0.9 s, in attempt 2; before that: 429 queue_full"):
        make_client(timeout=0.9).rewards(SAMPLES)
    assert 0.89 <= time.monotonic() - began < 1.4


@pytest.mark.parametrize(("status", "kind"), [(429, Overloaded), (503, Unavailable)])
def test_a_time_to_wait_beyond_the_deadline_fails_at_once(
    make_client: MakeClient, server: ScriptedServer, status: int, kind: type[Overloaded | Unavailable]
) -> None:
    server.will_refuse(status, retry_after="3600")
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        make_client(timeout=5.0).rewards(SAMPLES)
    assert time.monotonic() - began < 1.0
    assert caught.value.retry_after == 3600
    assert len(server.received) == 1


def test_a_host_that_takes_no_connection_ends_with_the_deadline(make_client: MakeClient) -> None:
    # A full backlog drops further connections, as a host behind a firewall does.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(("127.0.0.1", port))
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                make_client(f"http://127.0.0.1:{port}", timeout=0.4).rewards(SAMPLES)
            assert time.monotonic() - began < 0.9


# --- readiness ----------------------------------------------------------------------------------------------------


def test_a_server_that_loads_or_is_not_there_is_not_ready(
    make_client: MakeClient, server: ScriptedServer, unused_port: int
) -> None:
    server.will_refuse(503, retry_after="60")
    assert make_client().ready() is False
    assert len(server.received) == 1
    assert make_client(f"http://127.0.0.1:{unused_port}").ready() is False


def test_a_server_that_says_nothing_is_not_ready(make_client: MakeClient, server: ScriptedServer) -> None:
    server.will_stay_silent()
    assert make_client(timeout=0.2).ready() is False


def test_something_else_than_a_densereward_server_is_not_called_unready(client: Client, server: ScriptedServer) -> None:
    server.will_refuse(404)
    with pytest.raises(NotFound):
        client.ready()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])
