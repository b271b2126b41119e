"""Every request the server refuses, with its status, its code and its words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from serving import STEP, Api, Json, Server, refusal

GOOD: Json = {"prompt": "Why?", "response": "hello"}
PATHS = ("/token_rewards", "/rewards")


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be served, and the error it gets."""

    sample: Any
    message: str
    code: str = "invalid_request"
    details: Json = field(default_factory=dict)


def _without(*names: str, **more: Any) -> Json:
    return {name: value for name, value in (GOOD | more).items() if name not in names}


def _spans(spans: Any, number: int, shown: str) -> Bad:
    message = (
        f"response_spans[{number}] = {shown} must lie in order, without overlap, within the response's 5 UTF-8 bytes"
    )
    return Bad(GOOD | {"response_spans": spans}, message, "invalid_spans", {"field": "response_spans"})


def _length(name: str, values: list[Any], unit: str, expected: int, **more: Any) -> Bad:
    details = {"field": name, "given": len(values), "expected": expected}
    message = f"{name} has {len(values)} entries for {expected} {unit}"
    return Bad(GOOD | {name: values} | more, message, "length_mismatch", details)


def _stranger(token: int) -> str:
    return f"token id {token} is not in the model's vocabulary of 320; are these another model's tokens?"


PROMPTS = "give exactly one of prompt, messages, prompt_token_ids; got "
RESPONSES = "give exactly one of response, response_token_ids; got "

BAD_SAMPLES = {
    "no prompt": Bad(_without("prompt"), PROMPTS + "none"),
    "two prompts": Bad(GOOD | {"messages": []}, PROMPTS + "prompt, messages"),
    "three prompts": Bad(
        GOOD | {"messages": [], "prompt_token_ids": []}, PROMPTS + "prompt, messages, prompt_token_ids"
    ),
    "no response": Bad(_without("response"), RESPONSES + "none"),
    "two responses": Bad(GOOD | {"response_token_ids": [5]}, RESPONSES + "response, response_token_ids"),
    "a misspelt field": Bad(
        GOOD | {"respnse": "x"}, "respnse: Extra inputs are not permitted", details={"field": "respnse"}
    ),
    "a field of the wrong type": Bad(
        _without("response", response_token_ids=[5, "6"]),
        "response_token_ids.1: Input should be a valid integer",
        details={"field": "response_token_ids"},
    ),
    "no object": Bad("hello", "Input should be an object"),
    "null": Bad(None, "Input should be an object"),
    "several wrong fields": Bad(
        {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5},
        "a: Extra inputs are not permitted; b: Extra inputs are not permitted; "
        "c: Extra inputs are not permitted; and 2 more",
        details={"field": "a"},
    ),
    "a mask too short": _length("response_mask", [1, 0, 1, 1], "the response's tokens", 5),
    "a mask too long": _length("response_mask", [1] * 6, "the response's tokens", 5),
    "a mask that does not fit the spans": _length(
        "response_mask", [1] * 5, "response_spans", 2, response_spans=[[0, 2], [2, 5]]
    ),
    "too few weights": _length("weights", [1.0], "the response's tokens", 5),
    "too many entropies": _length("token_entropies", [0.5] * 9, "the response's tokens", 5),
    "a mask that keeps nothing": Bad(
        GOOD | {"response_mask": [0] * 5},
        "response_mask keeps no token, so the reward has nowhere to go",
        "empty_mask",
    ),
    "a mask of another number": Bad(
        GOOD | {"response_mask": [1, 1, 2, 1, 1]},
        "response_mask.2: Input should be 0 or 1",
        details={"field": "response_mask"},
    ),
    "an id out of the vocabulary": Bad(
        _without("prompt", prompt_token_ids=[5, 320]), _stranger(320), "id_out_of_vocabulary", {"limit": 320}
    ),
    "a negative id": Bad(
        _without("prompt", prompt_token_ids=[5, -1]), _stranger(-1), "id_out_of_vocabulary", {"limit": 320}
    ),
    "an id beyond all machine integers": Bad(
        _without("prompt", prompt_token_ids=[10**40]), _stranger(10**40), "id_out_of_vocabulary", {"limit": 320}
    ),
    "more tokens than the model reads": Bad(
        _without("prompt", prompt_token_ids=[5] * 2042),
        "2049 tokens with the closing tokens, and the model reads 2048; shorten the prompt or the response "
        "(nothing is truncated here)",
        "too_long",
        {"tokens": 2049, "limit": 2048},
    ),
    "spans out of order": _spans([[2, 4], [0, 2]], 1, "[0, 2]"),
    "overlapping spans": _spans([[0, 3], [2, 5]], 1, "[2, 5]"),
    "a span that ends before it starts": _spans([[3, 2]], 0, "[3, 2]"),
    "a span beyond the end": _spans([[0, 2], [2, 6]], 1, "[2, 6]"),
    "a span far beyond the end": _spans([[0, 10**30]], 0, f"[0, {10**30}]"),
    "no span at all": Bad(
        GOOD | {"response_spans": []}, "response_spans is empty", "invalid_spans", {"field": "response_spans"}
    ),
    "a span before the beginning": Bad(
        GOOD | {"response_spans": [[-1, 5]]},
        "response_spans.0.0: Input should be greater than or equal to 0",
        details={"field": "response_spans"},
    ),
    "a span of three": Bad(
        GOOD | {"response_spans": [[0, 1, 2]]},
        "response_spans.0: Tuple should have at most 2 items after validation, not 3",
        details={"field": "response_spans"},
    ),
    "spans with ids": Bad(
        _without("response", response_token_ids=[5], response_spans=[[0, 5]]),
        "response_spans are byte spans of `response`: give the response as text",
    ),
    "a dialogue that the template refuses": Bad(
        _without("prompt", messages=[{"role": "critic", "content": "x"}]),
        "the model's chat template refuses these messages: no critics here",
        "template_error",
        {"field": "messages"},
    ),
    "a message without content": Bad(
        _without("prompt", messages=[{"role": "user"}]),
        "messages.0.content: Field required",
        details={"field": "messages"},
    ),
    "a message with content in parts": Bad(
        _without("prompt", messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        "messages.0.content: Input should be a valid string",
        details={"field": "messages"},
    ),
    "nothing to score": Bad(
        {"prompt": "", "response": "", "finished": False},
        "prompt and response hold no token, so there is nothing to score",
        "empty_sample",
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_one_bad_sample_fails_the_request_and_its_index_is_named(api: Api, bad: Bad, path: str) -> None:
    expected = {"code": bad.code, "message": f"samples[1]: {bad.message}", "details": bad.details | {"index": 1}}
    assert api.refusal([GOOD, bad.sample, GOOD], path) == (422, expected)


@pytest.fixture(scope="module")
def good(api: Api) -> Json:
    return api.item(GOOD)


@pytest.mark.parametrize("bad", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_on_error_item_serves_the_rest(api: Api, bad: Bad, good: Json) -> None:
    name = "nobody" if isinstance(bad.sample, dict) else None
    sample = bad.sample | {"id": name} if isinstance(bad.sample, dict) else bad.sample
    samples = [GOOD | {"id": "a"}, sample, GOOD | {"id": "b"}]
    first, error, last = api.items(samples, on_error="item")
    details = bad.details | {"index": 1} | ({"id": name} if name else {})
    expected = {"code": bad.code, "message": f"samples[1]: {bad.message}", "details": details}
    assert error == {"index": 1, "id": name, "error": expected}
    for item, index, identity in ((first, 0, "a"), (last, 2, "b")):
        assert item["token_rewards"]["red"] == pytest.approx(good["token_rewards"]["red"], abs=STEP)
        assert item | {"reward": 0, "token_rewards": 0, "baseline": 0} == good | {
            "index": index, "id": identity, "reward": 0, "token_rewards": 0, "baseline": 0,
        }  # fmt: skip


@pytest.mark.parametrize("token", [-1, 2**32, 10**40])
def test_an_id_that_no_vocabulary_holds_is_refused_in_a_response_too(api: Api, token: int) -> None:
    sample = _without("response", response_token_ids=[5, token])
    details = {"index": 0, "limit": 320}
    expected = {"code": "id_out_of_vocabulary", "message": f"samples[0]: {_stranger(token)}", "details": details}
    assert api.refusal([sample]) == (422, expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_request_of_bad_samples_alone_is_answered_under_on_error_item(api: Api, path: str) -> None:
    answer = api.answer([bad.sample for bad in BAD_SAMPLES.values()], path, on_error="item")
    assert [item["error"]["code"] for item in answer["data"]] == [bad.code for bad in BAD_SAMPLES.values()]
    assert answer["usage"] == {"prompt_tokens": 0, "response_tokens": 0, "forward_tokens": 0}


@pytest.mark.parametrize(
    ("weights", "code", "message"),
    [
        (None, "missing_weights", "the method weights needs the sample's `weights`, one per token"),
        ([0.0] * 5, "invalid_weights", "weights must be finite, not negative, and not all zero"),
        ([2.0, -1.0, 1.0, 1.0, 1.0], "invalid_weights", "weights must be finite, not negative, and not all zero"),
        ([1e308] * 5, "invalid_weights", "weights must be finite, not negative, and not all zero"),
    ],
)
def test_weights_that_share_nothing_out_are_refused(api: Api, weights: Any, code: str, message: str) -> None:
    expected = {"code": code, "message": f"samples[0]: {message}", "details": {"index": 0}}
    assert api.refusal([GOOD | {"weights": weights}], methods=["weights"]) == (422, expected)


@pytest.mark.parametrize(
    ("request_", "name", "message"),
    [
        ({"samples": []}, "samples", "samples: List should have at least 1 item after validation, not 0"),
        ({}, "samples", "samples: Field required"),
        ({"samples": {"0": GOOD}}, "samples", "samples: Input should be a valid array"),
        ({"samples": [GOOD], "sampels": []}, "sampels", "sampels: Extra inputs are not permitted"),
        ({"samples": [GOOD], "on_error": "skip"}, "on_error", "on_error: Input should be 'request' or 'item'"),
        (
            {"samples": [None], "model": 3},
            "model",
            "model.str: Input should be a valid string; model.list[str]: Input should be a valid array",
        ),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_request_with_a_bad_field_is_refused(api: Api, request_: Json, name: str, message: str, path: str) -> None:
    expected = {"code": "invalid_request", "message": message, "details": {"field": name}}
    assert refusal(api.http.post(path, json=request_)) == (422, expected)
    assert refusal(api.http.post(path, json={"on_error": "item"} | request_)) == (422, expected)


@pytest.mark.parametrize("body", ["[]", "null", "3", '"samples"', "true"])
def test_a_body_that_is_no_object_is_refused(api: Api, body: str) -> None:
    expected = {"code": "invalid_request", "message": "Input should be an object", "details": {}}
    assert refusal(api.send(body)) == (422, expected)


def test_fields_of_token_rewards_are_refused_by_rewards(api: Api) -> None:
    message = "methods: Extra inputs are not permitted; include: Extra inputs are not permitted"
    expected = {"code": "invalid_request", "message": message, "details": {"field": "methods"}}
    assert api.refusal([GOOD], "/rewards", methods=["red"], include=["tokens"]) == (422, expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_not_json_is_a_400(api: Api, path: str) -> None:
    message = "the body is not JSON: Invalid JSON: EOF while parsing a list at line 1 column 13"
    expected = {"code": "malformed_json", "message": message, "details": {}}
    assert refusal(api.send('{"samples": [', path)) == (400, expected)


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_model_is_a_404(api: Api, path: str) -> None:
    message = "no model named 'other' is served here; there is 'tiny'"
    expected = {"code": "unknown_model", "message": message, "details": {"field": "model"}}
    assert api.refusal([GOOD], path, model="other") == (404, expected)


@pytest.mark.parametrize("model", [None, "default", "tiny"])
def test_the_model_may_be_named_or_left_out(api: Api, model: str | None, good: Json) -> None:
    assert api.item(GOOD, model=model) == good


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/token_reward", "/%00", "/v1/models/tiny"])
def test_an_unknown_route_is_a_404(http: httpx.Client, path: str) -> None:
    expected = {"code": "not_found", "message": "Not Found; GET /docs lists the routes", "details": {}}
    for response in (http.get(path), http.post(path, content=b"x")):
        assert refusal(response) == (404, expected)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/token_rewards", "POST"),
        ("PUT", "/rewards", "POST"),
        ("OPTIONS", "/token_rewards", "POST"),
        ("POST", "/health", "GET"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/metrics", "GET"),
    ],
)
def test_a_wrong_method_is_a_405(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = http.request(method, path)
    expected = {
        "code": "method_not_allowed",
        "message": "Method Not Allowed; GET /docs lists the routes",
        "details": {},
    }
    assert refusal(response) == (405, expected)
    assert response.headers["Allow"] == allowed


def test_head_answers_without_a_body(http: httpx.Client) -> None:
    assert [(response.status_code, response.content) for response in map(http.head, ("/token_rewards", "/docs"))] == [
        (405, b""),
        (200, b""),
    ]


# --- the key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer {key}x", "Basic {key}", "{key}"])
def test_a_scoring_route_without_the_key_is_a_401(server: Server, key: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.format(key=key)}
    response = httpx.post(server.url + path, content=b"not even JSON", headers=headers, trust_env=False)
    message = "this server asks for its key: send the header Authorization: Bearer KEY"
    assert refusal(response) == (401, {"code": "unauthorized", "message": message, "details": {}})
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert key not in response.text


def test_the_schemes_name_is_read_in_any_case(server: Server, key: str) -> None:
    headers = {"Authorization": f"bearer {key}"}
    assert httpx.post(server.url + "/rewards", json={"samples": [GOOD]}, headers=headers, trust_env=False).is_success


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/docs", "/openapi.json"])
def test_an_operators_route_needs_no_key(server: Server, path: str) -> None:
    assert server.get(path).status_code == 200


# --- sizes --------------------------------------------------------------------------------------------------------


def _body_of(size: int) -> bytes:
    body = json.dumps({"samples": [GOOD]}).encode()
    return body + b" " * (size - len(body))


def _in_chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 50_000):
        yield body[start : start + 50_000]


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_over_the_limit_is_a_413(http: httpx.Client, chunked: bool) -> None:
    for size in (400_001, 4_000_000):
        body = _body_of(size)
        response = http.post("/token_rewards", content=_in_chunks(body) if chunked else body)
        message = "the body is larger than 400000 bytes; send the samples in parts"
        assert refusal(response) == (413, {"code": "too_large", "message": message, "details": {"limit": 400_000}})
        assert ("Content-Length" in response.request.headers) is not chunked


def test_a_body_at_the_limit_is_served(http: httpx.Client) -> None:
    for body in (_body_of(400_000), _in_chunks(_body_of(400_000))):
        assert http.post("/token_rewards", content=body).status_code == 200


def test_too_many_samples_are_a_413(api: Api) -> None:
    message = "65 samples in one request, and the server takes 64; send them in parts"
    expected = {"code": "too_large", "message": message, "details": {"samples": 65, "limit": 64}}
    assert api.refusal([GOOD] * 65) == (413, expected)
    assert len(api.items([GOOD] * 64)) == 64


# --- a model that fails -------------------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_is_a_500_that_names_the_request(api: Api, server: Server, poison: str) -> None:
    response = api.post([GOOD, GOOD | {"response": poison}])
    request_id = response.headers["X-Request-ID"]
    assert re.fullmatch("req-[0-9a-f]{32}", request_id)
    message = "samples[1]: the model gave a number that is not finite"
    details = {"index": 1, "request_id": request_id}
    assert refusal(response) == (500, {"code": "not_finite", "message": message, "details": details})
    assert f"WARNING densereward: {request_id} not_finite: {message}" in server.log


def test_a_number_that_is_not_finite_spoils_no_other_sample(api: Api, good: Json, poison: str) -> None:
    first, error, last = api.items([GOOD, GOOD | {"response": poison}, GOOD], on_error="item")
    message = "samples[1]: the model gave a number that is not finite"
    assert error["error"] == {"code": "not_finite", "message": message, "details": {"index": 1}}
    for item in (first, last):
        assert item["token_rewards"]["red"] == pytest.approx(good["token_rewards"]["red"], abs=STEP)


def test_a_sample_whose_forward_pass_failed_keeps_its_id(api: Api, poison: str) -> None:
    item = api.item(GOOD | {"response": poison, "id": "bad"}, on_error="item")
    assert item["id"] == "bad"
