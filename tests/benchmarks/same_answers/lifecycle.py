"""Answers of a server that is loading, full, too slow, or shutting down."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse

import httpx

from serving import PATIENCE, Server, until
from tests.benchmarks.same_answers.comparison import Answer
from tests.benchmarks.same_answers.samples import Json
from tests.benchmarks.same_answers.traffic import Request, posted

SAMPLE: Json = {"prompt_token_ids": [5], "response_token_ids": [6, 7]}


def _long(count: int) -> list[Json]:
    """Sequences of 2,000 tokens that share nothing."""
    return [{"prompt_token_ids": [*[5] * 97, 10 + i], "response_token_ids": [6] * 1900} for i in range(count)]


LOADING = [Request("loading", "GET", path) for path in ("/ready", "/v1/models", "/health")]
SMALL = posted("/rewards", {"samples": [SAMPLE]}, "limits")
SLOW = posted("/rewards", {"samples": _long(29)}, "limits")
"""It fills the queue, and takes longer than a request may."""

TOO_MUCH = posted("/rewards", {"samples": _long(31)}, "limits")
"""No queue is large enough."""


def send(http: httpx.Client, request: Request) -> Answer:
    """Send a request."""
    response = http.request(request.method, request.path, content=request.content, headers=request.headers)
    return Answer(response.status_code, dict(response.headers), response.content)


def from_start_to_end(server: Server) -> list[tuple[Request, Answer]]:
    """What a server says while it loads, to too much at once, when time runs out, and while it shuts down."""
    server.wait_until_listening()
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        answers = [(request, send(http, request)) for request in (*LOADING, SMALL)]
        server.wait_until_ready()
        answers += [(request, send(http, request)) for request in (SMALL, TOO_MUCH)]
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(send, http, SLOW)
            until(lambda: server.metrics()["densereward_queue_tokens"] > 0, "the queue to fill", every=0.02)
            answers.append((SLOW, send(http, SLOW)))
            answers.append((SLOW, slow.result()))
    until(lambda: server.metrics()["densereward_queue_tokens"] == 0, "the queue to empty", every=0.05)
    return [*answers, (SMALL, _late(server))]


def _late(server: Server) -> Answer:
    """The answer to a request whose body comes when the server is shutting down."""
    body = json.dumps({"samples": [SAMPLE]}).encode()
    head = f"POST /rewards HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(server.address, timeout=PATIENCE) as connection:
        connection.sendall(head + body[:5])
        until(lambda: server.get("/health").is_success, "the beginning to be read")
        server.terminate()
        until(lambda: "Shutting down" in server.log, "the shutdown to begin")
        connection.sendall(body[5:])
        response = HTTPResponse(connection)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())
