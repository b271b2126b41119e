"""Retries, the deadline of a call, and readiness: over real sockets, for both clients."""

from __future__ import annotations

import math
import random
import socket
import threading
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import httpx
import pytest

from densereward_client import (
    BadRequest,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    DenseRewardError,
    NotFound,
    Overloaded,
    ServerFailure,
    Unavailable,
)

if TYPE_CHECKING:
    from tests.client.conftest import MakeClient, ScriptedServer

SAMPLES = [{"prompt": "p", "response": "a b", "id": "first"}, {"prompt": "p", "response": "c d e"}]


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
