"""TRL's experimental PPO: the rewards that it uses are the server's, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import policies
from densereward_client import Client
from serving import Json, serving

from .conftest import Train, run

pytestmark = pytest.mark.trainers

SUBJECTS = ("food", "long walk", "song", "film on Monday")
TEXTS = [f"How was the {subject}?" for subject in SUBJECTS]
DIALOGUES = [[{"role": "user", "content": text}] for text in TEXTS]
TOLERANCE = 1e-5
EOS = 2
JOB: Json = {
    "method": "red",
    "pad": "</s>",
    "column": True,
    "prompts": DIALOGUES * 2,
    "config": {"stop_token": "eos", "num_sample_generations": 0, "kl_coef": 0.05},
}


def job(**changes: Any) -> Json:
    return JOB | changes | {"config": JOB["config"] | changes.get("config", {})}


def expected(client: Client, update: Json, request: Json) -> np.ndarray[Any, Any]:
    """The server's rewards of each response in the trainer's columns, minus the penalty for a missing EOS."""
    tokenizer = policies.make_tokenizer(request["pad"])
    bound = client.bind(tokenizer)
    shown = [tokenizer.decode(query, skip_special_tokens=True) for query in update["queries"]]
    samples: list[Json] = []
    for text, row in zip(shown, update["responses"], strict=True):
        position = next(i for i, each in enumerate(SUBJECTS) if each in text)
        ends = [i for i, token in enumerate(row) if token in (EOS, tokenizer.pad_token_id)]
        ids = row[: ends[0] + (row[ends[0]] == EOS)] if ends else row
        prompt = {"messages": DIALOGUES[position]} if request["column"] else {"prompt": TEXTS[position]}
        samples.append(prompt | {"response_token_ids": ids})
    answer = bound.token_rewards(samples, methods=[request["method"]])
    rewards = np.zeros(np.shape(update["responses"]))
    penalty = request["config"].get("missing_eos_penalty", 0.0)
    for row, item, sample, score in zip(rewards, answer.data, samples, update["scores"], strict=True):
        ids = sample["response_token_ids"]
        row[: len(ids)] = item.token_rewards[request["method"]]
        missing = penalty * (EOS not in ids)
        assert score == pytest.approx((item.reward or 0.0) - missing, abs=TOLERANCE)
        # TRL adds the score of a cut response in the last column, or at the first pad.
        row[min(len(ids), len(row) - 1)] -= missing
    return rewards


def gae(rewards: Any, values: Any, gamma: float = 1.0, decay: float = 0.95) -> np.ndarray[Any, Any]:
    advantages, latest = [], np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        latest = rewards[:, t] + gamma * next_values - values[:, t] + gamma * decay * latest
        advantages.append(latest)
    return np.stack(advantages[::-1], axis=1)


@pytest.mark.parametrize(("pad", "column"), [("</s>", True), ("<s>", False)])
def test_each_token_has_the_servers_reward_before_advantages_are_made(
    pad: str, column: bool, train: Train, client: Client
) -> None:
    prompts = DIALOGUES if column else TEXTS
    request = job(pad=pad, column=column, prompts=prompts * 2, config={"missing_eos_penalty": 1.0})
    request["config"]["num_sample_generations"] = 1
    seen = train("trl_ppo", **request)
    assert (seen["errors"], seen["finite"], len(seen["updates"])) == ([], True, 2)
    for update in seen["updates"]:
        rewards = np.array(update["rewards"])
        added = rewards - np.array(update["non_score_reward"])
        np.testing.assert_allclose(added, expected(client, update, request), atol=TOLERANCE)
        np.testing.assert_allclose(update["advantages"], gae(rewards, np.array(update["values"])), atol=TOLERANCE)


@pytest.mark.parametrize("pad", ["</s>", "<s>"])
def test_responses_that_end_anywhere_are_rewarded_up_to_their_end(pad: str, train: Train, client: Client) -> None:
    tokenizer = policies.make_tokenizer(pad)
    ids = tokenizer("Thank you, that was good", add_special_tokens=False).input_ids[:12]
    position = 4
    flipped = [*ids[:position], tokenizer.convert_tokens_to_ids("z"), *ids[position + 1 :]]
    ended = [*ids[:5], EOS, *ids[6:]]  # tokens after an EOS do not count
    responses = [ids, flipped, ended, [EOS] + [tokenizer.pad_token_id] * 11]
    request = job(pad=pad, prompts=DIALOGUES[:1] * 8, responses=responses, config={"missing_eos_penalty": 0.5})
    seen = train("trl_ppo", **request)
    assert seen["errors"] == []
    for update in seen["updates"]:
        added = np.array(update["rewards"]) - np.array(update["non_score_reward"])
        np.testing.assert_allclose(added, expected(client, update, request), atol=TOLERANCE)
        np.testing.assert_allclose(added[0, :position], added[1, :position], atol=TOLERANCE)
        assert abs(added[0, position] - added[1, position]) > 100 * TOLERANCE
        assert not added[2, 6:].any()
        assert not added[3, 1:].any()


def test_a_stop_token_of_ones_own_ends_a_response_as_well(train: Train, client: Client) -> None:
    tokenizer = policies.make_tokenizer("<s>")
    ids = tokenizer("Thank you. That was it", add_special_tokens=False).input_ids[:12]
    stop = tokenizer.convert_tokens_to_ids(".")
    written = ids[: ids.index(stop) + 1]
    config = {"stop_token": None, "stop_token_id": stop}
    seen = train("trl_ppo", **job(pad="<s>", prompts=DIALOGUES[:1] * 8, responses=[ids], config=config))
    sample = {"messages": DIALOGUES[0], "response_token_ids": written, "finished": True}
    (item,) = client.bind(tokenizer).token_rewards([sample], methods=["red"]).data
    for update in seen["updates"]:
        added = np.array(update["rewards"]) - np.array(update["non_score_reward"])
        np.testing.assert_allclose(added[:, : len(written)], [item.token_rewards["red"]] * 4, atol=TOLERANCE)
        assert not added[:, len(written) :].any()
    assert (seen["errors"], len(seen["updates"])) == ([], 2)


def test_a_server_that_is_gone_ends_the_training(train: Train, tiny_llama: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--device", "cpu", "--model", str(tiny_llama)) as short_lived:
        seen = train("trl_ppo", **job() | {"url": short_lived.url, "server": short_lived.process.pid})
    (error,) = seen["errors"]
    assert error.startswith("ConnectionFailed")
    assert len(seen["updates"]) == 1


def test_another_version_of_trl_is_refused() -> None:
    ended = run("trl_grpo", "-c", "import densereward_client.trainers.trl_ppo")
    assert "ImportError: this adapter rewrites a line of TRL 1.12.0; there is TRL 1.16.0" in ended.stderr
