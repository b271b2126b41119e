"""The parts of the adapters that need no trainer: rewards that sum to the sequence's, and the samples of SkyRL."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from densereward_client import AsyncClient, ConnectionFailed, Error, SampleTokenRewards
from densereward_client.trainers._rewards import Rewarder, rewarded
from densereward_client.trainers.skyrl import samples_of, token_rewards_of, with_token_rewards

from .conftest import ScriptedServer
from .test_tensors import answer_of

PROMPTS = [[{"role": "user", "content": "How was it?"}]] * 2
OUTPUT: dict[str, Any] = {
    "prompt_token_ids": [[5], [5]],
    "response_ids": [[7, 8, 9], [7, 8]],
    "loss_masks": [[1, 0, 1], [1, 1]],
    "rewards": [[0.0, 0.0, 0.5], [0.0, 0.0]],
    "stop_reasons": ["stop", "length"],
}


def item_of(rewards: list[float], baseline: float, **more: Any) -> SampleTokenRewards:
    scale = (more.get("scale") or {}).get("red", 1.0)
    reward = (sum(rewards) + baseline) / scale
    arrays = {"red": np.asarray(rewards, dtype=np.float32)}
    return SampleTokenRewards(index=0, reward=reward, token_rewards=arrays, baseline={"red": baseline}, **more)


@given(
    rows=st.lists(st.tuples(st.floats(-10, 10, width=32), st.booleans()), min_size=1, max_size=9),
    baseline=st.floats(-10, 10, width=32),
)
def test_rewards_sum_to_the_sequences_where_the_policy_wrote(rows: list[tuple[float, bool]], baseline: float) -> None:
    mask = [int(kept) for _, kept in rows]
    rewards = [reward if kept else 0.0 for reward, kept in rows]
    item = item_of(rewards, baseline)
    if not any(mask):
        with pytest.raises(ValueError, match="no token that the policy wrote"):
            rewarded(item, "red", mask)
        return
    made = rewarded(item, "red", mask)
    assert made.token_rewards.sum(dtype=np.float64) == pytest.approx(made.reward, abs=1e-4)
    assert not made.token_rewards[np.equal(mask, 0)].any()
    last = max(i for i, kept in enumerate(mask) if kept)
    assert (
        np.delete(made.token_rewards, last).tolist() == np.delete(np.asarray(rewards, dtype=np.float32), last).tolist()
    )


def test_a_scaled_reward_is_what_the_scaled_token_rewards_sum_to() -> None:
    made = rewarded(item_of([1.0, 2.0], 1.0, scale={"red": 0.5}), "red")
    assert made.reward == 4.0
    assert made.token_rewards.tolist() == [1.0, 3.0]


def test_what_was_not_served_is_no_reward() -> None:
    bad = SampleTokenRewards(index=1, error=Error(code="too_long", message="9 tokens"))
    with pytest.raises(ValueError, match="was not served: too_long"):
        rewarded(bad, "red")


async def test_a_server_that_is_not_there_raises_every_time_and_is_found_when_it_is(server: ScriptedServer) -> None:
    rewarder = Rewarder("http://127.0.0.1:9", retries=0, trust_env=False)
    sample = {"prompt": "a", "response_token_ids": [5, 6]}
    for _ in range(2):
        with pytest.raises(ConnectionFailed):
            await rewarder.reward(tiny.make_tokenizer(), sample)
    rewarder._base_url = server.url
    both = await asyncio.gather(*(rewarder.reward(tiny.make_tokenizer(), sample) for _ in range(2)))
    await rewarder.aclose()
    assert [made.reward for made in both] == [1.0, 1.0]
    assert [made.token_rewards.tolist() for made in both] == [[0.25, 0.75]] * 2


def test_skyrls_responses_say_what_the_environment_wrote_and_what_was_cut() -> None:
    first, second = samples_of(OUTPUT, PROMPTS)
    assert first == {
        "messages": PROMPTS[0],
        "response_token_ids": [7, 8, 9],
        "response_mask": [1, 0, 1],
        "finished": True,
    }
    assert second["finished"] is False
    assert all("finished" not in sample for sample in samples_of({**OUTPUT, "stop_reasons": None}, PROMPTS))


def test_skyrls_rewards_are_lists_as_long_as_the_responses_beside_what_the_environment_gave() -> None:
    answer = answer_of(item_of([1.0, 0.0, 2.0], 0.25), item_of([1.0, -1.0], 0.5))
    assert token_rewards_of(answer, "red", OUTPUT) == [[1.0, 0.0, 2.75], [1.0, -0.5]]
    assert token_rewards_of(answer, "red", {**OUTPUT, "rewards": [0.5, 0.0]}) == [[1.0, 0.0, 2.75], [1.0, -0.5]]


async def test_skyrls_output_is_asked_for_in_one_call(server: ScriptedServer) -> None:
    async with AsyncClient(server.url, trust_env=False, retries=0) as client:
        policy = await client.bind(tiny.make_tokenizer())
        output = await with_token_rewards(OUTPUT, PROMPTS, policy)
        calls = [request.path for request in server.received].count("/token_rewards")
        server.will_reset()
        with pytest.raises(ConnectionFailed):
            await with_token_rewards(OUTPUT, PROMPTS, policy)
    assert output["rewards"] == [[0.25, 0.0, 1.25], [0.25, 0.75]]
    assert {**output, "rewards": OUTPUT["rewards"]} == OUTPUT
    assert calls == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"is_last_step": [True, True]}, "step_wise_trajectories"), ({"loss_masks": [[1]]}, "do not belong together")],
)
def test_an_output_that_could_be_misread_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samples_of({**OUTPUT, **change}, PROMPTS)
