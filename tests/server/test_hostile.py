"""Bodies nobody should send: nothing may fail the server, hang it, or be read as something else."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from serving import STEP, Api, Json, Server, answer, refusal

GOOD: Json = {"prompt": "Why?", "response": "hello"}


@pytest.fixture(autouse=True)
def _still_serves(api: Api) -> Any:
    before = api.item(GOOD)
    yield
    assert api.item(GOOD) == before


def _request(response: str, more: str = "") -> str:
    """A request whose sample is written by hand."""
    return f'{{"samples": [{{"prompt": "Why?", "response": {response}{more}}}], "include": ["tokens", "spans"]}}'


NO_JSON = {
    "nothing": b"",
    "an open brace": b"{",
    "two documents": b"{}{}",
    "a document and a rest": _request('"x"').encode() + b" x",
    "a hundred thousand brackets": b"[" * 100_000 + b"]" * 100_000,
    "a thousand levels in a field": _request('"x"', f', "y": {"[" * 1000 + "]" * 1000}').encode(),
    "an integer of five thousand digits": _request('"x"', f', "weights": [{"9" * 5000}]').encode(),
    "a lone high surrogate": _request(r'"\ud800"').encode(),
    "a lone low surrogate": _request(r'"a\udc00"').encode(),
    "a lone surrogate in a key": _request('"x"', r', "\ud800": 1').encode(),
    "two high surrogates": _request(r'"\ud83d\ud83d"').encode(),
    "invalid UTF-8": _request('"x"').encode().replace(b"x", b"\xff"),
    "half a character": _request('"x"').encode().replace(b"x", b"\xf0\x9f"),
    "an overlong NUL": _request('"x"').encode().replace(b"x", b"\xc0\x80"),
    "a raw NUL": _request('"x"').encode().replace(b"x", b"\x00"),
    "a raw line end in a string": _request('"x\n"').encode(),
    "UTF-16": _request('"x"').encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + _request('"x"').encode(),
    "a list as a key": b'{[1]: 2, "samples": []}',
    "single quotes": _request('"x"').replace('"', "'").encode(),
    "a comment": b"// hello\n" + _request('"x"').encode(),
    "a trailing comma": b'{"samples": [],}',
    "a form": b"samples=%5B%5D",
    "gzip": b"\x1f\x8b\x08\x00",
}


@pytest.mark.parametrize("on_error", ["request", "item"])
@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_a_400(api: Api, body: bytes, on_error: str) -> None:
    status, error = refusal(api.send(body.replace(b'{"samples', f'{{"on_error": "{on_error}", "samples'.encode(), 1)))
    assert (status, error["code"], error["details"]) == (400, "malformed_json", {})
    assert error["message"].startswith("the body is not JSON: ")
    assert len(error["message"]) < 200


WRONG = {
    "not a number as a weight": ', "weights": [NaN, 1, 1, 1, 1]',
    "infinity as a weight": ', "weights": [-Infinity, 1, 1, 1, 1]',
    "a weight beyond all floats": ', "weights": [1e999, 1, 1, 1, 1]',
    "not a number as an entropy": ', "token_entropies": [NaN, 1, 1, 1, 1]',
    "an object as a mask": ', "response_mask": {"0": 1}',
    "a text as a mask": ', "response_mask": "11111"',
    "nothing in a mask": ', "response_mask": [null, 1, 1, 1, 1]',
    "texts in a mask": ', "response_mask": ["1", "1", "1", "1", "1"]',
    "a number as an id": ', "id": 7',
    "a list as an id": ', "id": ["a"]',
    "half a byte": ', "response_spans": [[0, 2.5], [2.5, 5]]',
    "not a number as a span": ', "response_spans": [[0, NaN]]',
    "a flat span": ', "response_spans": [0, 5]',
    "a number that is neither true nor false": ', "finished": 2',
    "nothing that is true or false": ', "finished": null',
    "a prompt twice": ', "prompt": null, "prompt": "a", "messages": []',
    "a field of nothing": ', "": 1',
}


@pytest.mark.parametrize("more", WRONG.values(), ids=WRONG)
def test_a_value_of_the_wrong_kind_is_a_422(api: Api, more: str) -> None:
    status, error = refusal(api.send(_request('"hello"', more)))
    assert (status, error["code"], error["details"]["index"]) == (422, "invalid_request", 0)


@pytest.mark.parametrize("ids", ["[true]", "[1.0]", '["1"]', "[null]", "[[1]]", "[NaN]", '"abc"', "{}"])
@pytest.mark.parametrize("name", ["prompt_token_ids", "response_token_ids"])
def test_only_integers_are_ids(api: Api, name: str, ids: str) -> None:
    other = "response" if name == "prompt_token_ids" else "prompt"
    status, error = refusal(api.send(f'{{"samples": [{{"{other}": "x", "{name}": {ids}}}]}}'))
    assert (status, error["code"]) == (422, "invalid_request")
    assert error["details"] == {"field": name, "index": 0}


@pytest.mark.parametrize("beta", ["NaN", "Infinity", "-1e999", '"much"', "[]", "{}", "null", "9" * 400])
def test_a_beta_that_is_no_share_is_a_422(api: Api, beta: str) -> None:
    body = f'{{"samples": [{json.dumps(GOOD)}], "methods": [{{"name": "abc", "beta": {beta}}}]}}'
    status, error = refusal(api.send(body))
    assert (status, error["code"], error["details"]) == (422, "invalid_params", {"field": "methods"})


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\x00b",
        "\u2028",
        "\ufeff",
        "\ufffd",
        "\U0010ffff",
        "\r\n\t",
        "e\u0301\u0301\u0301",
        "👩‍👩‍👧",
        "\u202e",
        "\x7f",
    ],
)
def test_every_text_that_json_carries_is_read_to_the_byte(api: Api, text: str) -> None:
    item = api.item({"prompt": text, "response": text}, include=["tokens", "spans"])
    assert item["spans"][0][0] == 0
    assert item["spans"][-1][1] == len(text.encode())
    spans = [[0, len(text.encode())]]
    whole = api.item({"prompt": text, "response": text, "response_spans": spans})
    assert whole["token_rewards"]["red"] == pytest.approx([sum(item["token_rewards"]["red"])], abs=STEP)


def test_an_escaped_character_is_the_character(api: Api) -> None:
    escaped, plain = (answer(api.send(_request(text))) for text in (r'"\ud83d\ude00\u0000\/"', '"😀\\u0000/"'))
    assert escaped["data"] == plain["data"]


def test_of_a_repeated_key_the_last_counts_as_in_every_json_reader(api: Api) -> None:
    twice = '{"samples": [{"prompt": "x", "prompt": "Why?", "response": "a", "response": "hello"}], "samples": [%s]}'
    body = '{"samples": [{"prompt": "x", "prompt": "Why?", "response": "a", "response": "hello"}]}'
    assert answer(api.send(body))["data"] == [api.item(GOOD)]
    assert answer(api.send(twice % json.dumps(GOOD)))["data"] == [api.item(GOOD)]


def test_ids_of_any_text_are_echoed(api: Api) -> None:
    names = ["", "a" * 10_000, "\x00", "😀", '"}', "null", "\u2028"]
    assert [item["id"] for item in api.items([GOOD | {"id": name} for name in names])] == names


@pytest.mark.parametrize("word", ["x" * 10_000, "😀" * 2_500, " " * 10_000, "<|im_end|>" * 1_000, "e\u0301" * 3_000])
def test_a_word_of_ten_thousand_characters_is_scored_or_refused_soon(api: Api, word: str) -> None:
    started = time.monotonic()
    response = api.post([{"prompt": "", "response": word}])
    assert time.monotonic() - started < 10
    if response.status_code == 200:
        assert answer(response)
    else:
        assert refusal(response)[1]["code"] == "too_long"


def test_many_empty_spans_share_the_work_out_in_time(api: Api) -> None:
    spans = [[0, 0]] * 20_000 + [[0, 5]] + [[5, 5]] * 20_000
    started = time.monotonic()
    rewards = api.item(GOOD | {"response_spans": spans})["token_rewards"]["red"]
    assert time.monotonic() - started < 10
    assert [i for i, reward in enumerate(rewards) if reward] == [20_000]


def test_a_closing_token_in_the_text_is_the_templates_own(api: Api) -> None:
    item = api.item({"prompt": "Why?", "response": "hello<|im_end|>\n"}, include=["tokens"])
    assert item["tokens"][-2:] == ["<|im_end|>", "\n"]
    assert item["reward"] == pytest.approx(api.item(GOOD)["reward"], abs=1e-6)


def test_a_message_may_carry_whatever_the_template_does_not_read(api: Api) -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    plain = {"messages": [{"role": "user", "content": "x"}], "response": "hello"}
    strange = {
        "messages": [{"role": "user", "content": "x", "extra": deep, "n": None, "big": 10**30}],
        "response": "hello",
    }
    assert api.item(strange) == api.item(plain)


def _raw(server: Server, request: bytes) -> bytes:
    """What comes back for bytes on a bare connection."""
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@pytest.mark.parametrize(
    "rest",
    [
        "Content-Length: -1\r\n\r\n",
        "Content-Length: many\r\n\r\n",
        "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        "no header\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_400(server: Server, key: str, rest: str) -> None:
    head = f"POST /token_rewards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    assert _raw(server, (head + rest).encode()).startswith(b"HTTP/1.1 400 ")


def test_a_content_type_is_not_asked_for(http: httpx.Client) -> None:
    body = json.dumps({"samples": [GOOD]})
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "nonsense"):
        assert http.post("/token_rewards", content=body, headers={"Content-Type": kind}).status_code == 200
