"""A server with more work than it can do: who is refused, who may leave, and what becomes of the work."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

import tiny
from serving import Api, Json, Server, refusal, serving, until

QUEUE = 60_000
SMALL: Json = {"prompt_token_ids": [5], "response_token_ids": [6, 7]}


def long_samples(count: int) -> list[Json]:
    """Sequences of 2000 tokens, closing ones included, that share nothing."""
    return [{"prompt_token_ids": [*[5] * 97, 10 + i], "response_token_ids": [6] * 1900} for i in range(count)]


BIG = long_samples(29)  # in a forward pass each: seconds of work
BIG_TOKENS = 58_000


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A slow model, a small queue, little time for a request, and less to drain."""
    folder = tmp_path_factory.mktemp("busy")
    tiny.save(folder / "model", num_hidden_layers=16)
    limits = ("--max-batch-tokens", "2000", "--max-queue-tokens", str(QUEUE), "--request-timeout", "1.5")
    with serving(folder / "log", "--model", str(folder / "model"), *limits, "--drain-timeout", "1") as running:
        yield running
        print(running.log[-3000:])


@pytest.fixture(scope="module")
def api(busy: Server) -> Iterator[Api]:
    with httpx.Client(base_url=busy.url, timeout=60, trust_env=False) as http:
        yield Api(http)


@contextmanager
def _big_request(busy: Server) -> Iterator[Future[httpx.Response]]:
    """A request whose work has begun, and is far from done."""

    def send() -> httpx.Response:
        return httpx.post(busy.url + "/rewards", json={"samples": BIG}, timeout=60, trust_env=False)

    _wait_until_idle(busy)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        until(lambda: busy.metrics()["densereward_queue_tokens"] > 0, "the queue to fill", every=0.05)
        yield sent


def _wait_until_idle(busy: Server) -> None:
    until(lambda: busy.metrics()["densereward_queue_tokens"] == 0, "the queue to empty", every=0.05)


def _leave(busy: Server, body: bytes, length: int) -> None:
    """Begin a request whose body has `length` bytes, send `body`, wait until it is read, and go away."""
    head = f"POST /rewards HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()
    with socket.create_connection(busy.address, timeout=10) as connection:
        connection.sendall(head + body)
        if len(body) == length:
            until(lambda: busy.metrics()["densereward_queue_tokens"] > 0, "the queue to fill", every=0.05)


def _counted(busy: Server, status: int) -> float:
    return busy.metrics().get(f'densereward_requests_total{{route="/rewards",status="{status}"}}', 0.0)


def test_a_request_that_the_queue_can_never_hold_is_a_413(api: Api) -> None:
    message = f"the request holds 62000 tokens and the queue {QUEUE}; send it in parts"
    expected = {"code": "too_large", "message": message, "details": {"tokens": 62_000, "limit": QUEUE}}
    assert api.refusal(long_samples(31), "/rewards") == (413, expected)


def test_a_full_queue_is_a_429_that_says_when_to_come_back(api: Api, busy: Server) -> None:
    with _big_request(busy):
        response = api.post(BIG, "/rewards")
        assert busy.get("/health").status_code == busy.get("/ready").status_code == 200
        status, error = refusal(response)
    assert (status, error["code"]) == (429, "overloaded")
    assert error["details"] == {"tokens": BIG_TOKENS, "limit": QUEUE}
    words = rf"\d+ tokens are waiting and the queue holds {QUEUE}; try again in [\d.]+ s"
    assert re.fullmatch(words, error["message"])
    assert 1 <= int(response.headers["Retry-After"]) < 60


def test_a_request_out_of_time_is_a_504_and_its_work_is_dropped(busy: Server) -> None:
    before = busy.metrics()["densereward_dropped_sequences_total"]
    with _big_request(busy) as sent:
        response = sent.result()
    request_id = response.headers["X-Request-ID"]
    message = "the request took longer than 1.5 s; send fewer samples, or raise the limit"
    expected = {"code": "deadline_exceeded", "message": message, "details": {"request_id": request_id}}
    assert refusal(response) == (504, expected)
    assert f"WARNING densereward: {request_id} deadline_exceeded" in busy.log
    metrics = busy.metrics()
    assert metrics["densereward_queue_tokens"] == metrics["densereward_queue_sequences"] == 0
    assert 0 < metrics["densereward_dropped_sequences_total"] - before < len(BIG)


def test_a_caller_who_stops_sending_is_out_of_time_too(busy: Server) -> None:
    with socket.create_connection(busy.address, timeout=10) as connection:
        connection.sendall(b'POST /rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"samples')
        assert connection.recv(65536).startswith(b"HTTP/1.1 504 ")


def test_a_caller_who_leaves_is_a_499_and_its_work_is_dropped(busy: Server) -> None:
    _wait_until_idle(busy)
    dropped, gone = busy.metrics()["densereward_dropped_sequences_total"], _counted(busy, 499)
    body = httpx.Request("POST", busy.url, json={"samples": BIG}).read()
    _leave(busy, body, len(body))
    until(lambda: _counted(busy, 499) == gone + 1, "the 499 to be counted")
    metrics = busy.metrics()
    assert metrics["densereward_queue_tokens"] == metrics["densereward_queue_sequences"] == 0
    assert 0 < metrics["densereward_dropped_sequences_total"] - dropped < len(BIG)
    assert "client_gone: the caller left before the answer was ready" in busy.log


def test_a_caller_who_leaves_while_sending_is_a_499(busy: Server) -> None:
    gone = _counted(busy, 499)
    _leave(busy, b'{"samples', 100)
    until(lambda: _counted(busy, 499) == gone + 1, "the 499 to be counted")
    assert "client_gone: the caller left while sending the request" in busy.log


def test_work_of_those_who_left_delays_nobody(api: Api, busy: Server) -> None:
    _wait_until_idle(busy)
    body = httpx.Request("POST", busy.url, json={"samples": BIG}).read()
    _leave(busy, body, len(body))
    timing = api.answer([SMALL], "/rewards")["timing"]
    assert timing["queue_ms"] < 1000  # the pass that was running, and none of the others


def test_requests_that_outlast_the_drain_are_cut_and_the_server_ends(busy: Server) -> None:
    with _big_request(busy) as sent:
        busy.terminate()
        assert busy.exit_status() == 0
        assert sent.exception() is not None or sent.result().status_code >= 500
    assert "timeout graceful shutdown exceeded" in busy.log
