"""Base64 in requests, bodies cut into their samples, and an event loop that stays free meanwhile."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from densereward.errors import DenseRewardError, TooLarge
from densereward.routes import reading
from densereward.routes.reading import read
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
