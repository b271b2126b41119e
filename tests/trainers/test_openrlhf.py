"""OpenRLHF 0.11.2: what its own code makes of the token rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import policies
from densereward_client import Client
from serving import Json, Server, serving
from tests.trainers.programs import ids_of, run_program

pytestmark = pytest.mark.trainers

DIALOGUE = [{"role": "user", "content": "How was the evening?"}]
METHOD = {"name": "red", "label": "r"}
ALPHA = 0.5
ANSWERS = ["Thank you, it was a good evening.", "Thank you, it was a dull evening.", "Zürich was", "good food"]
GROUP = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")


def case_of(tokenizer: Any, text: str, *, ended: bool = True) -> Json:
    return {
        "prompt": "How was the evening?\n",
        "label": DIALOGUE,
        "turns": [ids_of(tokenizer, text, ended=ended)],
        "finish_reason": "stop" if ended else "length",
    }


def cases_of(tokenizer: Any) -> list[Json]:
    return [case_of(tokenizer, text, ended=text != "Zürich was") for text in ANSWERS]


def direct(client: Client, tokenizer: Any, cases: list[Json]) -> list[Any]:
    """The server's own answers, with the baseline added to the last token."""
    samples = [
        {"messages": each["label"], "response_token_ids": each["turns"][0], "finished": each["finish_reason"] == "stop"}
        for each in cases
    ]
    items = client.bind(tokenizer).token_rewards(samples, methods=[METHOD]).data
    for item in items:
        item.token_rewards["r"][-1] += item.baseline["r"]
    return items


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return policies.make_tokenizer(pad="<unk>")


@pytest.fixture(scope="module")
def made(server: Server, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Json:
    job = {"do": "rollouts", "url": server.url, "method": METHOD, "alpha": ALPHA, "cases": cases_of(tokenizer)}
    return run_program("openrlhf", tmp_path_factory.mktemp("openrlhf"), job)


def test_token_rewards_are_where_the_policys_tokens_are(made: Json, client: Client, tokenizer: Any) -> None:
    items = direct(client, tokenizer, cases_of(tokenizer))
    for item, output, prompt in zip(items, made["outputs"], made["prompts"], strict=True):
        assert output["reward"] == output["scores"] == pytest.approx(item.reward, abs=1e-5)
        token_rewards = np.asarray(output["extra_logs"]["token_rewards"])
        np.testing.assert_allclose(token_rewards[prompt - 1 :], item.token_rewards["r"], atol=1e-5)
        assert not token_rewards[: prompt - 1].any()
    for estimator in ("gae", "reinforce"):
        kept = made["dense"][estimator]
        for item, returns, mask in zip(items, kept["returns"], kept["action_mask"], strict=True):
            earned = -np.diff([*returns, 0.0])  # a return is what is still to come
            np.testing.assert_allclose(earned[np.equal(mask, 1)], item.token_rewards["r"], atol=1e-5)
        assert "token_rewards" not in kept["logged"]


def test_what_a_response_earns_in_all_is_what_it_was_without_token_rewards(made: Json) -> None:
    for estimator in ("gae", "reinforce"):
        dense, plain = made["dense"][estimator], made["plain"][estimator]
        first = [mask.index(1) for mask in plain["action_mask"]]
        for row, position in enumerate(first):
            assert dense["returns"][row][position] == pytest.approx(plain["returns"][row][position], abs=1e-5)


@pytest.mark.parametrize("estimator", GROUP)
def test_a_groups_advantages_get_the_differences_within_a_response(
    estimator: str, made: Json, client: Client, tokenizer: Any
) -> None:
    dense, plain = made["dense"][estimator], made["plain"][estimator]
    for row, item in enumerate(direct(client, tokenizer, cases_of(tokenizer))):
        kept = np.equal(plain["action_mask"][row], 1)
        added = np.subtract(dense["advantages"][row], plain["advantages"][row])
        rewards = item.token_rewards["r"]
        np.testing.assert_allclose(added[kept], ALPHA * (rewards - rewards.mean()), atol=1e-5)
        assert not added[~kept].any()


def test_another_word_moves_the_reward_at_its_place(made: Json, tokenizer: Any) -> None:
    good, dull = (np.asarray(output["extra_logs"]["token_rewards"]) for output in made["outputs"][:2])
    ids = [ids_of(tokenizer, text) for text in ANSWERS[:2]]
    position = next(i for i, (one, other) in enumerate(zip(*ids, strict=False)) if one != other)
    at = made["prompts"][0] - 1 + position
    np.testing.assert_allclose(good[:at], dull[:at], atol=1e-5)
    assert abs(good[at] - dull[at]) > 1e-4


def test_one_half_of_the_adapter_without_the_other_stops_at_the_first_step(made: Json) -> None:
    assert "generate with TokenRewardsExecutor" in made["without_executor"]
    assert made["without_maker"].startswith("ValueError: only one element tensors")


def test_what_the_environment_wrote_gets_nothing(
    tmp_path: Path, server: Server, client: Client, tokenizer: Any
) -> None:
    case = case_of(tokenizer, "") | {
        "turns": [ids_of(tokenizer, "I look it up.", ended=False), ids_of(tokenizer, "It was good.")],
        "feedback": ["The tool says good.\n", ""],
    }
    output = run_program("openrlhf", tmp_path, {"do": "turns", "url": server.url, "cases": [case]})
    (begin, stop), (second_begin, end) = output["action_ranges"]
    token_rewards = np.asarray(output["extra_logs"]["token_rewards"])
    assert second_begin > stop
    assert not token_rewards[stop - 1 : second_begin - 1].any()
    sample = {
        "messages": DIALOGUE,
        "response_token_ids": output["observation_tokens"][begin:end],
        "response_mask": [1] * (stop - begin) + [0] * (second_begin - stop) + [1] * (end - second_begin),
    }
    item = client.bind(tokenizer).token_rewards([sample], methods=["red"]).data[0]
    assert item.reward is not None
    assert output["reward"] == pytest.approx(item.reward + 0.25, abs=1e-5)  # with the environment's own reward
    expected = item.token_rewards["red"]
    expected[-1] += item.baseline["red"]
    np.testing.assert_allclose(token_rewards[begin - 1 : end - 1], expected, atol=1e-5)


def test_a_killed_server_ends_the_rollout(tmp_path: Path, tiny_llama: Path, tokenizer: Any) -> None:
    with serving(tmp_path / "log", "--device", "cpu", "--model", str(tiny_llama)) as short_lived:
        job = {"do": "outage", "url": short_lived.url, "pid": short_lived.process.pid, "cases": cases_of(tokenizer)[:1]}
        assert run_program("openrlhf", tmp_path, job)["raised"] == "ConnectionFailed"


def test_the_trainers_actor_makes_its_experiences_with_token_rewards(tmp_path: Path) -> None:
    answer = run_program("openrlhf", tmp_path, {"do": "installed"})
    assert answer == {"actor": "PPOTrainer", "maker": "TokenRewardsExperienceMaker"}


def test_its_remote_url_gets_one_reward_for_each_response(
    tmp_path: Path, server: Server, client: Client, tokenizer: Any
) -> None:
    cases = [case_of(tokenizer, text) for text in ANSWERS[:2]]
    url = f"{server.url}/get_reward?token_rewards=false&eos={tokenizer.eos_token}"
    made = run_program("openrlhf", tmp_path, {"do": "remote_url", "remote_url": url, "cases": cases})
    for reward, case in zip(made["rewards"], cases, strict=True):
        prompt = ids_of(tokenizer, case["prompt"], ended=False)
        text = tokenizer.decode([*prompt, *case["turns"][0]]).removeprefix(case["prompt"])
        ended, written = text.endswith(tokenizer.eos_token), text.removesuffix(tokenizer.eos_token)
        sample = {"prompt": case["prompt"], "response": written, "finished": ended}
        item = client.rewards([sample]).data[0]
        assert np.ravel(reward) == pytest.approx([item.reward], abs=1e-5)
    assert len(made["made"]["returns"]) == len(cases)


def test_its_remote_url_has_no_reward_where_there_is_no_server(tmp_path: Path, tokenizer: Any) -> None:
    """OpenRLHF tries five times and then goes on with None, at which its next step fails; it never takes zero."""
    job = {"do": "remote_url", "remote_url": "http://127.0.0.1:9/get_reward", "cases": cases_of(tokenizer)[:1]}
    made = run_program("openrlhf", tmp_path, job)
    assert made["rewards"] == [None]
    assert made["failed"].startswith("AttributeError: 'NoneType'")
