"""verl 0.9.1: what its own code makes of the token rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import policies
from densereward_client import Client
from serving import Json, Server, serving
from tests.trainers.programs import ids_of, run_program

DIALOGUE = [{"role": "user", "content": "How was the evening?"}]
METHOD = {"name": "red", "label": "r"}
ANSWERS = ["Thank you, it was a good evening.", "Thank you, it was a dull evening.", "Zürich was", "good food"]


pytestmark = pytest.mark.trainers


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return policies.make_tokenizer(pad="<unk>")


def responses_of(tokenizer: Any) -> list[list[int]]:
    return [ids_of(tokenizer, text, ended=text != "Zürich was") for text in ANSWERS]


@pytest.fixture(scope="module")
def job(server: Server, tokenizer: Any) -> Json:
    return {"url": server.url, "messages": DIALOGUE, "method": METHOD, "responses": responses_of(tokenizer)}


@pytest.fixture(scope="module")
def items(client: Client, tokenizer: Any) -> list[Any]:
    """The server's own answer, with the baseline added to the last token."""
    samples = [{"messages": DIALOGUE, "response_token_ids": ids} for ids in responses_of(tokenizer)]
    found = client.bind(tokenizer).token_rewards(samples, methods=[METHOD]).data
    for item in found:
        item.token_rewards["r"][-1] += item.baseline["r"]
    return found


@pytest.fixture(scope="module")
def made(job: Json, tmp_path_factory: pytest.TempPathFactory) -> Json:
    return run_program("verl", tmp_path_factory.mktemp("verl"), job | {"do": "rollouts"})


def test_token_rewards_are_verls_scores_at_their_tokens(made: Json, items: list[Any], tokenizer: Any) -> None:
    assert made["response_ids"] == responses_of(tokenizer)
    assert made["reward_score"] == pytest.approx([item.reward for item in items], abs=1e-5)
    for row, mask, item in zip(made["rm_scores"], made["mask"], items, strict=True):
        rewards = item.token_rewards["r"]
        assert sum(mask) == len(rewards)
        np.testing.assert_allclose(row[: len(rewards)], rewards, atol=1e-5)
        assert not any(row[len(rewards) :])


def test_returns_are_what_is_still_to_come(made: Json, items: list[Any]) -> None:
    for returns, item in zip(made["returns"], items, strict=True):
        rewards = item.token_rewards["r"]
        expected = np.cumsum(rewards[::-1])[::-1]
        np.testing.assert_allclose(returns[: len(rewards)], expected, atol=1e-4)


def test_grpo_sees_the_sequences_reward(made: Json, items: list[Any]) -> None:
    rewards = np.array([item.reward for item in items])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(made["grpo"], expected, atol=1e-3)


def test_another_word_moves_the_reward_at_its_place(made: Json, tokenizer: Any) -> None:
    good, dull = (np.asarray(row) for row in made["rm_scores"][:2])
    ids = responses_of(tokenizer)[:2]
    position = next(i for i, (one, other) in enumerate(zip(*ids, strict=False)) if one != other)
    np.testing.assert_allclose(good[:position], dull[:position], atol=1e-5)
    assert abs(good[position] - dull[position]) > 1e-4


def test_all_rollouts_of_a_process_share_one_client(made: Json) -> None:
    assert made["rewarders"] == 1


def test_what_tools_wrote_gets_nothing(tmp_path: Path, job: Json, client: Client, tokenizer: Any) -> None:
    tool = ids_of(tokenizer, "The tool says good.", ended=False)
    before, after = ids_of(tokenizer, "I look it up.", ended=False), ids_of(tokenizer, "It was good.")
    ids, mask = [*before, *tool, *after], [1] * len(before) + [0] * len(tool) + [1] * len(after)
    made = run_program("verl", tmp_path, job | {"do": "tools", "responses": [ids], "mask": mask})
    sample = {"messages": DIALOGUE, "response_token_ids": ids, "response_mask": mask}
    item = client.bind(tokenizer).token_rewards([sample], methods=["red"]).data[0]
    rewards = item.token_rewards["red"]
    rewards[-1] += item.baseline["red"]
    np.testing.assert_allclose(made["rm_scores"], rewards, atol=1e-5)
    assert not np.asarray(made["rm_scores"])[np.equal(mask, 0)].any()
    assert sum(made["rm_scores"]) == pytest.approx(made["reward_score"], abs=1e-5)


def test_the_reward_manager_gives_one_number_at_the_last_token(
    tmp_path: Path, job: Json, items: list[Any], tokenizer: Any
) -> None:
    made = run_program("verl", tmp_path, job | {"do": "manager"})
    assert made["scored"] == {"reward_score": pytest.approx(items[0].reward, abs=1e-5), "reward_extra_info": {}}
    last = len(responses_of(tokenizer)[0]) - 1
    assert np.flatnonzero(made["row"]).tolist() == [last]
    assert made["row"][last] == pytest.approx(items[0].reward, abs=1e-5)


def test_its_own_reward_loop_can_ask_the_server_as_it_asks_vllm(
    tmp_path: Path, server: Server, client: Client, job: Json
) -> None:
    made = run_program("verl", tmp_path, job | {"do": "classify"})
    sample = {"messages": DIALOGUE, "response": ANSWERS[0]}
    expected = client.rewards([sample]).data[0].reward
    assert made["scored"] == {"reward_score": pytest.approx(expected, abs=1e-5)}, made["text"]


def test_a_killed_server_ends_the_rollout(tmp_path: Path, tiny_llama: Path, job: Json) -> None:
    with serving(tmp_path / "log", "--device", "cpu", "--model", str(tiny_llama)) as short_lived:
        request = job | {"do": "outage", "url": short_lived.url, "pid": short_lived.process.pid}
        assert run_program("verl", tmp_path, request)["raised"] == "ConnectionFailed"


def test_the_old_trainer_which_would_drop_token_rewards_is_refused(tmp_path: Path, job: Json) -> None:
    assert "use_v1=True" in run_program("verl", tmp_path, job | {"do": "old_trainer"})["raised"]
