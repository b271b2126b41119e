"""The package's own clients against a real server, many at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from densereward_client import (
    AsyncClient,
    BadRequest,
    Client,
    NotFound,
    ServerFailure,
    Unauthorized,
    to_padded,
)
from densereward_client.wire import SampleTokenRewards, TokenRewardsResponse
from serving import STEP, Json, Server

METHODS = ["red", "abc"]


def sample(number: int) -> Json:
    """Samples of mixed sizes, each with rewards of its own."""
    text = " ".join(["fox", "dog", "café", "😀", "lazy"][(number * step) % 5] for step in range(1 + number * 7 % 60))
    return {"id": str(number), "prompt": f"Question {number}?", "response": text}


@pytest.fixture(scope="module")
def client(server: Server, key: str) -> Iterator[Client]:
    with Client(server.url, api_key=key, timeout=60, trust_env=False) as running:
        yield running


@pytest.fixture(scope="module")
def alone(client: Client) -> list[SampleTokenRewards]:
    return [client.token_rewards([sample(number)], methods=METHODS).data[0] for number in range(64)]


def _same(item: SampleTokenRewards, expected: SampleTokenRewards) -> bool:
    assert item.reward is not None
    close = [np.allclose(item.token_rewards[name], expected.token_rewards[name], rtol=0, atol=STEP) for name in METHODS]
    return item.id == expected.id and item.reward == pytest.approx(expected.reward, abs=1e-6) and all(close)


def test_an_answer_is_typed(client: Client) -> None:
    answer = client.token_rewards([sample(3)], methods=METHODS, include=["tokens", "spans", "prefix_scores"])
    [item] = answer.data
    assert isinstance(item.reward, float)
    assert item.tokens is not None
    assert item.spans is not None
    arrays = [*item.token_rewards.values(), item.prefix_scores]
    assert all(isinstance(array, np.ndarray) and array.dtype == np.float32 for array in arrays)
    assert {len(array) for array in arrays if array is not None} == {len(item.tokens)}
    assert client.models().data[0].id == answer.model == "tiny"
    assert client.ready()
    assert client.rewards([sample(3)]).data[0].reward == pytest.approx(item.reward, abs=1e-6)


def test_both_encodings_give_the_same_arrays(client: Client) -> None:
    packed, plain = (
        client.token_rewards([sample(9)], encoding_format=encoding).data[0] for encoding in ("base64", "float")
    )
    assert np.array_equal(packed.token_rewards["red"], plain.token_rewards["red"])


@pytest.mark.parametrize(
    ("kind", "status", "code", "call"),
    [
        (BadRequest, 422, "unknown_method", {"methods": ["rde"]}),
        (BadRequest, 422, "length_mismatch", {"samples": [sample(1) | {"response_mask": [1]}]}),
        (BadRequest, 413, "too_large", {"samples": [sample(1)] * 65}),
        (NotFound, 404, "unknown_model", {"model": "other"}),
    ],
)
def test_an_error_of_the_server_becomes_the_clients(
    client: Client, kind: type[Exception], status: int, code: str, call: dict[str, Any]
) -> None:
    with pytest.raises(kind) as exc_info:
        client.token_rewards(**({"samples": [sample(1)]} | call))
    assert (exc_info.value.status, exc_info.value.code) == (status, code)  # type: ignore[attr-defined]


def test_a_failure_of_the_model_becomes_a_server_failure(client: Client, poison: str) -> None:
    with pytest.raises(
        ServerFailure, match=r"500 not_finite: samples\[0\]: the model gave a number that is not finite"
    ):
        client.token_rewards([sample(1) | {"response": poison}])


def test_a_wrong_key_is_unauthorized(server: Server) -> None:
    with Client(server.url, api_key="guess", trust_env=False) as stranger:
        with pytest.raises(Unauthorized, match="401 unauthorized: this server asks for its key"):
            stranger.rewards([sample(1)])
        assert stranger.ready()


def test_a_bad_sample_under_on_error_item_is_an_error_among_results(client: Client) -> None:
    good, bad = client.token_rewards([sample(1), sample(2) | {"weights": []}], on_error="item").data
    assert good.error is None
    assert bad.id == "2"
    assert bad.error is not None
    assert bad.error.code == "length_mismatch"


def test_a_request_that_cannot_be_meant_is_not_sent(client: Client) -> None:
    with pytest.raises(ValidationError, match="give exactly one of response, response_token_ids; got none"):
        client.rewards([{"prompt": "Why?"}])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_becomes_padded_arrays(client: Client, alone: list[SampleTokenRewards], side: Any) -> None:
    answer = client.token_rewards([sample(number) for number in range(8)], methods=METHODS)
    rewards, mask = to_padded(answer, "red", padding_side=side)
    lengths = [len(item.token_rewards["red"]) for item in alone[:8]]
    assert rewards.shape == mask.shape == (8, max(lengths))
    assert mask.sum(axis=1).tolist() == lengths
    for row, kept, item in zip(rewards, mask, alone[:8], strict=True):
        assert np.allclose(row[kept.astype(bool)], item.token_rewards["red"], atol=STEP)
        assert not row[~kept.astype(bool)].any()


def test_32_threads_each_get_their_own_answers(client: Client, alone: list[SampleTokenRewards]) -> None:
    start = threading.Barrier(32)

    def call(thread: int) -> TokenRewardsResponse:
        start.wait(30)
        return client.token_rewards([sample(number) for number in _numbers(thread)], methods=METHODS)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(call, range(32)))
    assert len({answer.id for answer in answers}) == 32
    for thread, answer in enumerate(answers):
        expected = [alone[number] for number in _numbers(thread)]
        assert all(map(_same, answer.data, expected))
        assert len(answer.data) == len(expected)


def _numbers(thread: int) -> list[int]:
    """From one to six samples."""
    return [(thread * 5 + step * 11) % 64 for step in range(1 + thread % 6)]


async def test_64_concurrent_calls_each_get_their_own_answer(
    server: Server, key: str, alone: list[SampleTokenRewards]
) -> None:
    before = server.metrics()["densereward_batch_tokens_count"]
    async with AsyncClient(server.url, api_key=key, timeout=60, trust_env=False) as client:
        calls = [client.token_rewards([sample(number)], methods=METHODS) for number in range(64)]
        answers = await asyncio.gather(*calls)
        assert await client.ready()
    assert all(_same(answer.data[0], expected) for answer, expected in zip(answers, alone, strict=True))
    assert server.metrics()["densereward_batch_tokens_count"] - before < 64  # callers shared their passes
