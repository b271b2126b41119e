"""A small HTTP server that follows a script, and both clients with the same blocking methods."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest

from densereward_client import AsyncClient, Client
from densereward_client.wire import encode_base64

Json = dict[str, Any]

TEST_SECONDS = 120  # the slowest test takes 5 on a machine that does nothing else


@dataclass(frozen=True)
class Received:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    json: Any
    at: float  # time.time()


class ScriptedServer:
    """Answers the first requests as scripted by the `will_...` methods, in order, and every later one correctly."""

    def __init__(self, port: int = 0) -> None:
        self.received: list[Received] = []
        self._script: list[Callable[[_Handler, Any], None]] = []
        self._closing = threading.Event()
        self._http = _Listener(("127.0.0.1", port), _Handler)
        self._http.scripted = self
        serve = partial(self._http.serve_forever, poll_interval=0.01)
        self._thread = threading.Thread(target=serve, daemon=True)  # a test that fails may leave it open
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def pauses(self) -> list[float]:
        """Seconds between the requests."""
        times = [request.at for request in self.received]
        return [later - earlier for earlier, later in pairwise(times)]

    def will_reply(self, body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._script.append(lambda handler, _: handler.reply(body, status, headers or {}))

    def will_refuse(self, status: int, code: str = "scripted", **headers: str) -> None:
        """`retry_after="1"` sends the header Retry-After."""
        body = {"error": {"code": code, "message": "as scripted", "details": {}}}
        self.will_reply(body, status=status, headers={name.replace("_", "-"): headers[name] for name in headers})

    def will_answer_but(self, spoil: Callable[[Json], object]) -> None:
        """Answers correctly, but for what `spoil` changes in the answer."""

        def step(handler: _Handler, request: Json) -> None:
            answer = correct_answer(handler.path, request)
            spoil(answer)
            handler.reply(answer, 200, {})

        self._script.append(step)

    def will_reset(self) -> None:
        """Sends RST once the request is read."""
        self._script.append(lambda handler, _: handler.reset())

    def will_cut_short(self) -> None:
        """Promises more bytes than it sends."""
        self._script.append(lambda handler, _: handler.cut_short())

    def will_trickle(self, every: float = 0.05) -> None:
        """Sends a byte of the body every so many seconds, for longer than any test waits."""
        self._script.append(lambda handler, _: handler.trickle(every, self._closing))

    def will_stay_silent(self) -> None:
        """Never answers."""
        self._script.append(lambda handler, _: handler.stay_silent(self._closing))

    def follow(self, handler: _Handler, received: Received) -> None:
        self.received.append(received)
        if self._script:
            self._script.pop(0)(handler, received.json)
        else:
            handler.reply(correct_answer(received.path, received.json), 200, {})

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    scripted: ScriptedServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the second answer on a connection waits 40 ms for an acknowledgement
    server: _Listener

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class names it)
        pass

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(content) if content else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.scripted.follow(self, Received(self.command, self.path, headers, body, time.time()))

    do_POST = do_GET

    def reply(self, body: Any, status: int, headers: dict[str, str]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._begin(status, {"Content-Length": str(len(content)), **headers})
        self.wfile.write(content)

    def reset(self) -> None:
        # With a linger time of 0, closing sends RST; shutting down first, as the base class does, would send FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def cut_short(self) -> None:
        self._begin(200, {"Content-Length": "1000"})
        self.wfile.write(b'{"id": ')
        self.close_connection = True

    def trickle(self, every: float, closing: threading.Event) -> None:
        self._begin(200, {"Content-Length": "1000"})
        while not closing.wait(every):
            self.wfile.write(b" ")

    def stay_silent(self, closing: threading.Event) -> None:
        closing.wait()
        self.close_connection = True

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def correct_answer(path: str, request: Json | None) -> Json:
    """A correct answer: 0.25 for each token, and a baseline of 0.5; words are tokens."""
    if path == "/v1/models":
        return {"object": "list", "data": [MODEL_CARD]}
    if request is None:
        return {"status": "ready"}
    kind = path.removeprefix("/")
    data = [_item(index, kind, request) for index in range(len(request["samples"]))]
    usage = {"prompt_tokens": 1, "response_tokens": 1, "forward_tokens": 2}
    timing = {"queue_ms": 0.0, "forward_ms": 1.0, "total_ms": 1.0}
    about = {"id": "tr-1", "object": kind, "model": "default", "fingerprint": "f", "created": 1}
    return {**about, "data": data, "usage": usage, "timing": timing}


def _item(index: int, kind: str, request: Json) -> Json:
    sample = request["samples"][index]
    tokens = len(sample.get("response_spans") or sample.get("response_token_ids") or sample["response"].split())
    rewards = 0.25 * np.asarray(sample.get("response_mask") or [1] * tokens, dtype=np.float32)
    item = {"index": index, "id": sample.get("id"), "reward": float(rewards.sum()) + 0.5}
    if kind == "rewards":
        return item
    methods = request.get("methods", ["red"])
    keys = [method if isinstance(method, str) else method.get("label") or method["name"] for method in methods]
    encoded = encode_base64(rewards) if request["encoding_format"] == "base64" else rewards.tolist()
    return {**item, "token_rewards": dict.fromkeys(keys, encoded), "baseline": dict.fromkeys(keys, 0.5)}


MODEL_CARD = {
    "id": "default",
    "object": "model",
    "family": "llama",
    "head": "bradley_terry",
    "engine": "torch",
    "dtype": "float32",
    "max_length": 2048,
    "closing_token_ids": [2],
    "adds_bos": False,
    "prefix_modes": ["open", "closed"],
    "tokenizer_fingerprint": "t",
    "template_fingerprint": None,
    "methods": {"red": {"available": True, "passes": 1}, "x": {"available": False, "reason": "no such head"}},
}


class BlockingAsyncClient:
    """An AsyncClient with the blocking methods of Client, so that every test covers both."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._client = AsyncClient(*args, **options)
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **options: self._runner.run(method(*args, **options))

    def __enter__(self) -> BlockingAsyncClient:
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.run(self._client.__aexit__(*error))

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


MakeClient = Callable[..., Client]


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Fails a test that would never end, as it can if a retry or a deadline is broken."""

    def stop(*_: object) -> None:
        pytest.fail(f"not done after {TEST_SECONDS} s")  # not an Exception, so that no code under test catches it

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS, TEST_SECONDS)  # repeated, in case the clean-up hangs too
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


@pytest.fixture(params=[Client, BlockingAsyncClient], ids=["sync", "async"])
def make_client(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[MakeClient]:
    """Makes clients of the scripted server; the options are those of `Client`."""
    made: list[Client] = []

    def make(base_url: str = server.url, **options: Any) -> Client:
        # No proxy from the environment, and no certificates, which take longer to load than a test takes to run.
        client = request.param(base_url, **{"trust_env": False, "verify": False, "timeout": 10.0, **options})
        made.append(cast("Client", client))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(make_client: MakeClient) -> Client:
    return make_client()
