"""Answers that break the contract or do not fit the request are never returned, by either client."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from densereward_client import (
    Client,
    InvalidAnswer,
)

if TYPE_CHECKING:
    from tests.client.conftest import ScriptedServer

SAMPLES = [{"prompt": "p", "response": "a b", "id": "first"}, {"prompt": "p", "response": "c d e"}]


def _set(item: int, key: str, value: Any) -> Callable[[Any], object]:
    return lambda answer: answer["data"][item].update({key: value})


AN_ERROR = {"code": "too_long", "message": "9 tokens, and 8 is the limit"}


@pytest.mark.parametrize(
    ("spoil", "message"),
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
    client: Client, server: ScriptedServer, spoil: Callable[[Any], object], message: str
) -> None:
    server.will_answer_but(spoil)
    with pytest.raises(InvalidAnswer, match=message):
        client.token_rewards(SAMPLES, methods=["red"])
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"prompt": "p", "response": "a b c", "response_spans": [[0, 2], [2, 5]]}, "2 response_spans"),
        ({"prompt": "p", "response_token_ids": [4, 5]}, "2 response_token_ids"),
        ({"prompt": "p", "response": "a b", "response_mask": [1, 1]}, "2 response_mask"),
    ],
)
def test_the_rewards_are_as_many_as_the_trainers_tokens(
    client: Client, server: ScriptedServer, sample: Any, expected: str
) -> None:
    assert len(client.token_rewards([sample]).data[0].token_rewards["red"]) == 2
    server.will_answer_but(lambda answer: answer["data"][0].update(reward=1.25, token_rewards={"red": [0.25] * 3}))
    with pytest.raises(InvalidAnswer, match=f"item 0: red has 3 token rewards for {expected}"):
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
