"""Base64 in requests, bodies cut into their samples, and an event loop that stays free meanwhile."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from densereward.errors import DenseRewardError, InvalidRequest, MalformedJSON, TooLarge
from densereward.server.routes import openrlhf, reading, vllm
from densereward.server.routes.openrlhf import GetRewardRequest
from densereward.server.routes.reading import read, read_lists
from densereward.server.routes.vllm import ClassifyRequest, PoolingRequest
from densereward_client import Client
from densereward_client.wire import RewardsRequest, Sample, TokenRewardsRequest
from serving import Api, Server, refusal

IDS = [5 + i % 300 for i in range(100)]
GOOD = {"prompt": "Why?", "response": "hello"}


def test_base64_and_lists_get_the_same_answer(server: Server, key: str) -> None:
    text = "word " * 80
    spans = [(5 * i, 5 * i + 5) for i in range(80)]
    samples: list[dict[str, Any]] = [
        {"prompt_token_ids": IDS, "response_token_ids": IDS, "weights": [0.5, 2.0] * 50, "response_mask": [0, 1] * 50},
        {"prompt": "", "response": text, "response_spans": spans, "weights": [1.0] * 80},
    ]
    with Client(server.url, api_key=key, trust_env=False) as client:
        compact, plain = (
            client.token_rewards(samples, methods=["red", "abc", "weights"], encoding_format=form)
            for form in ("base64", "float")
        )
        assert (
            client.rewards(samples, encoding_format="base64").data
            == client.rewards(samples, encoding_format="float").data
        )
    for one, same in zip(compact.data, plain.data, strict=True):
        assert one.reward == same.reward
        assert {name: rewards.tolist() for name, rewards in one.token_rewards.items()} == {
            name: rewards.tolist() for name, rewards in same.token_rewards.items()
        }


def test_bad_base64_is_a_422_that_names_sample_and_field(api: Api) -> None:
    status, error = refusal(api.post([GOOD, {"prompt": "", "response_token_ids": "AAA="}]))
    message = "samples[1]: response_token_ids: neither a list nor base64 of little-endian int32 values"
    assert (status, error["message"], error["details"]) == (
        422,
        message,
        {"field": "response_token_ids", "index": 1},
    )


BODIES = [
    {"samples": [GOOD]},
    {"methods": ["red"], "samples": [GOOD, {"prompt": 'a]}"', "response": "\\[{,"}], "include": ["tokens"]},
    {"samples": [GOOD | {"messages": []}, None, GOOD], "on_error": "item"},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("body", BODIES)
def test_a_body_read_in_parts_is_the_body_read_whole(body: dict[str, Any], indent: int | None) -> None:
    request, samples = read(json.dumps(body, indent=indent).encode(), TokenRewardsRequest, 10)
    assert request.model_dump(exclude={"samples"}) == TokenRewardsRequest.model_validate(
        body | {"samples": [GOOD]}
    ).model_dump(exclude={"samples"})
    for sample, sent in zip(samples, body["samples"], strict=True):
        assert isinstance(sample, DenseRewardError) or sample == Sample.model_validate(sent)


def test_of_two_lists_of_samples_the_last_one_counts() -> None:
    body = b'{"samples": [{"bad": 1}], "samples": [{"prompt": "a", "response": "b"}]}'
    _, samples = read(body, RewardsRequest, 1)
    assert samples == list(RewardsRequest.model_validate_json(body).samples)


def test_too_many_samples_are_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_sample", pytest.fail)
    with pytest.raises(TooLarge):
        read(json.dumps({"samples": [GOOD] * 3}).encode(), RewardsRequest, 2)


def test_no_parser_sees_more_than_a_sample_of_a_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser holds the interpreter until it is done: the event loop waits for the longest text that one gets."""
    body = json.dumps({"samples": [{"prompt": "", "response_token_ids": IDS}] * 500}).encode()
    longest: list[int] = []
    one = reading._sample

    def observed(text: str) -> Any:
        longest.append(len(text))
        return one(text)

    monkeypatch.setattr(reading, "_sample", observed)
    monkeypatch.setattr(reading, "read_whole", pytest.fail)
    _, samples = read(body, RewardsRequest, 500)
    assert len(samples) == 500
    assert max(longest) < len(body) / 400


def test_health_is_answered_while_a_large_body_is_read(server: Server, http: Any) -> None:
    """Loosely: the time itself is measured in the benchmarks."""
    body = json.dumps({"samples": [{"prompt": "", "response_token_ids": IDS}] * 64, "on_error": "item"}).encode()
    sending = threading.Thread(target=lambda: [http.post("/rewards", content=body) for _ in range(5)])
    sending.start()
    waits = []
    while sending.is_alive():
        began = time.perf_counter()
        assert server.get("/health").status_code == 200
        waits.append(time.perf_counter() - began)
    sending.join()
    assert sorted(waits)[len(waits) // 2] < 2.0


# --- other servers' bodies ------------------------------------------------------------------------------------------

QUERIES: dict[str, Any] = {"query": ["ab", "ac]"], "prompts": ["a", "a"]}
SPANS = [[[0, 1], [1, 1]], "AAAAAAEAAAA="]
LISTS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (GetRewardRequest, QUERIES),
    (GetRewardRequest, QUERIES | {"labels": ["4", None], "response_spans": SPANS, "finished": [True, False]}),
    (GetRewardRequest, QUERIES | {"labels": [4, 5], "response_spans": None, "model": "x", "token_rewards": False}),
    (GetRewardRequest, QUERIES | {"prompts": [], "response_spans": [[], []], "method": {"name": "red", "beta": 0.5}}),
    (ClassifyRequest, {"input": "text", "user": "me"}),
    (ClassifyRequest, {"input": ["text", [1, 2], '\\"]'], "user": [1, ["x"]]}),
    (ClassifyRequest, {"input": [[1, 2], [3]], "model": "x"}),
    (PoolingRequest, {"input": [1, 2, 3], "task": "classify"}),
    (PoolingRequest, {"messages": [{"role": "user", "content": "x"}], "input": None}),
]


def lists_of(kind: type[BaseModel]) -> reading.Lists:
    return openrlhf._LISTS if kind is GetRewardRequest else vllm._LISTS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(("kind", "body"), LISTS)
def test_lists_read_entry_by_entry_are_the_lists_read_whole(
    kind: type[BaseModel], body: dict[str, Any], indent: int | None
) -> None:
    found = read_lists(json.dumps(body, indent=indent).encode(), kind, lists_of(kind), 3)
    whole = kind.model_validate(body)
    unread = {"labels"}
    assert found.model_dump(exclude=unread) == whole.model_dump(exclude=unread)
    assert found.model_fields_set == whole.model_fields_set


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (GetRewardRequest, {"query": ["a", 3], "prompts": ["", ""]}, ("query", 1)),
        (GetRewardRequest, QUERIES | {"finished": [True, 1]}, ("finished", 1)),
        (GetRewardRequest, QUERIES | {"response_spans": [[[0, 1]], [[0, -1]]]}, ("response_spans", 1)),
        (GetRewardRequest, {"query": [], "prompts": []}, ("query",)),
        (ClassifyRequest, {"input": ["a", None]}, ("input", 1)),
        (ClassifyRequest, {"input": ["a", [True]]}, ("input", 1)),
        (ClassifyRequest, {"input": [1, "a"]}, ("input",)),
        (ClassifyRequest, {"input": [None]}, ("input", 0)),
    ],
)
def test_a_bad_entry_is_named_by_its_list_and_its_place(kind: type[BaseModel], body: Any, field: tuple[Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_lists(json.dumps(body).encode(), kind, lists_of(kind), 3)
    assert refused.value.details == {"field": field[0]}
    assert refused.value.message.startswith(".".join(map(str, field)))
    with pytest.raises(ValidationError):
        kind.model_validate(body)


@pytest.mark.parametrize("last", ['["x"]', "null", '"x"', "[1]"])
def test_of_two_lists_of_entries_the_last_one_counts(last: str) -> None:
    body = f'{{"input": ["a", "b"], "input": {last}, "messages": null}}'.encode()
    try:
        expected = ClassifyRequest.model_validate_json(body).input
    except ValidationError:
        with pytest.raises(InvalidRequest):
            read_lists(body, ClassifyRequest, vllm._LISTS, 3)
    else:
        assert read_lists(body, ClassifyRequest, vllm._LISTS, 3).input == expected


@pytest.mark.parametrize("name", ["query", "prompts", "labels"])
def test_too_many_entries_are_not_even_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What follows the first that is too many may be anything."""
    monkeypatch.setattr(reading, "_entry", pytest.fail)
    monkeypatch.setattr(reading, "read_whole", pytest.fail)
    body = f'{{"{name}": ["a", "b", "c", "d", nonsense'.encode()
    with pytest.raises(TooLarge, match=f"^{name} has more than 3 entries"):
        read_lists(body, GetRewardRequest, openrlhf._LISTS, 3)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ClassifyRequest, {"input": [IDS] * 500}),
        (
            GetRewardRequest,
            {"query": ["ab"] * 500, "prompts": ["a"] * 500, "response_spans": [[[i, i] for i in IDS]] * 500},
        ),
    ],
)
def test_no_parser_sees_more_than_an_entry_of_a_large_body(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseModel], body: dict[str, Any]
) -> None:
    sent = json.dumps(body).encode()
    longest: list[int] = []
    one, whole = reading._entry, kind.model_validate_json

    def observed(read_one: Any, text: str, *place: Any) -> Any:
        longest.append(len(text))
        return one(read_one, text, *place)

    def envelope(text: str) -> Any:
        longest.append(len(text))
        return whole(text)

    monkeypatch.setattr(reading, "_entry", observed)
    monkeypatch.setattr(kind, "model_validate_json", envelope)
    read_lists(sent, kind, lists_of(kind), 500)
    assert len(longest) > 500
    assert max(longest) < len(sent) / 400


@pytest.mark.parametrize(
    "rest",
    [
        '"finished": [true',
        '"finished": [true,]}',
        '"x" 1}',
        '"model": "x"} x',
        '"model": "\\ud800"}',
        "[" * 100_000,
        "5: 1}",
        "[1]: 2}",
    ],
)
@pytest.mark.parametrize("small", [True, False])
def test_what_is_no_json_is_told_of_large_bodies_without_reading_them_whole(
    monkeypatch: pytest.MonkeyPatch, rest: str, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(reading, "_SMALL", 10)
        monkeypatch.setattr(reading, "read_whole", pytest.fail)
    body = f'{{"query": ["ab"], "prompts": ["a"], {rest}'.encode()
    with pytest.raises(MalformedJSON, match=r"^the body is not JSON: .{5,150}$"):
        read_lists(body, GetRewardRequest, openrlhf._LISTS, 3)


@pytest.mark.parametrize("more", [{"model": 3}, {"token_reward": True}, {"eos": ""}, {"response_spans": 5}])
def test_a_bad_field_is_told_of_large_bodies_too(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    monkeypatch.setattr(reading, "_SMALL", 10)
    with pytest.raises(InvalidRequest) as refused:
        read_lists(json.dumps(QUERIES | more).encode(), GetRewardRequest, openrlhf._LISTS, 3)
    assert refused.value.details == {"field": next(iter(more))}
    assert not isinstance(refused.value, MalformedJSON)
