"""TRL's GRPO and RLOO: the advantages that their losses get are computed from the server's rewards, token by token."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import policies
from densereward_client import BoundClient, Client
from serving import Json, serving

from .conftest import Train

pytestmark = pytest.mark.trainers

SUBJECTS = ("food", "long walk", "song", "film on Monday")
TEXTS = [f"How was the {subject}?" for subject in SUBJECTS]
DIALOGUES = [[{"role": "user", "content": text}] for text in TEXTS]
LONGEST = 12
TOLERANCE = 1e-4  # advantages are divided by deviations of about 0.1
JOB: Json = {
    "trainer": "dense",
    "methods": ["red"],
    "prompts": DIALOGUES,
    "alpha": 1.0,
    "eos": None,
    "length": False,
    "asynchronous": False,
    "changes": [{}],
    "config": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_steps": 4,
    },
}


def job(**changes: Any) -> Json:
    return JOB | changes | {"config": JOB["config"] | changes.get("config", {})}


@cache
def bound(client: Client) -> BoundClient:
    return client.bind(policies.make_tokenizer())


def scored(
    client: Client, prompt: Any, ids: list[int], method: str, mask: list[int] | None = None
) -> tuple[float, Any]:
    """The server's reward of one completion, and those of its tokens."""
    sample: Json = {"prompt" if isinstance(prompt, str) else "messages": prompt, "response_token_ids": ids}
    if mask is not None:
        sample["response_mask"] = mask
    (item,) = bound(client).token_rewards([sample], methods=[method]).data
    assert item.reward is not None
    return item.reward, item.token_rewards[method]


def completions(batch: Json) -> list[list[int]]:
    """The ids of each row of a loss without padding; rows that are left out have the greatest length."""
    pairs = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [ids[: sum(mask) or LONGEST] for ids, mask in pairs]


def prompts_of(batch: Json, prompts: list[Any]) -> list[Any]:
    return [prompts[next(i for i, each in enumerate(SUBJECTS) if each in text)] for text in batch["prompts"]]


def by_generation(losses: list[Json], size: int) -> list[list[Json]]:
    """The losses of each generation."""
    return [losses[start : start + size] for start in range(0, len(losses), size)]


def of_groups(prompts: list[Any], rewards: list[float]) -> np.ndarray[Any, Any]:
    """GRPO's advantages: rewards minus the group's mean, over its standard deviation."""
    advantages = np.zeros(len(rewards))
    for prompt in {str(each) for each in prompts}:
        group = [position for position, each in enumerate(prompts) if str(each) == prompt]
        assert len(group) == 4
        values = np.array(rewards)[group]
        advantages[group] = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    return advantages


def check(batches: list[Json], client: Client) -> None:
    """The loss got, for the rows of one generation, the advantages that the server's rewards give by the formula."""
    rows = [row for batch in batches for row in completions(batch)]
    prompts = [prompt for batch in batches for prompt in prompts_of(batch, DIALOGUES)]
    given = [row for batch in batches for row in batch["advantages"]]
    answers = [scored(client, prompt, ids, "red") for prompt, ids in zip(prompts, rows, strict=True)]
    sequence = of_groups(prompts, [reward for reward, _ in answers])
    for advantages, each, (_, rewards) in zip(given, sequence, answers, strict=True):
        np.testing.assert_allclose(advantages[: len(rewards)], each + rewards - rewards.mean(), atol=TOLERANCE)
        assert not any(advantages[len(rewards) :])


def test_each_token_has_its_completions_advantage_and_the_servers_reward(train: Train, client: Client) -> None:
    seen = train("trl_grpo", **job(config={"num_iterations": 2, "max_steps": 8}))
    assert (seen["errors"], seen["finite"], seen["names"]) == ([], True, ["densereward_red"])
    assert len(seen["losses"]) == 8
    for first, second, *again in by_generation(seen["losses"], 4):
        assert again == [first, second]
        check([first, second], client)


def test_a_group_that_is_spread_over_processes_keeps_its_rows(train: Train, client: Client) -> None:
    config = {"per_device_train_batch_size": 2, "steps_per_generation": 1, "max_steps": 2}
    seen = train("trl_grpo", processes=2, **job(config=config))["processes"]
    assert [each["errors"] for each in seen] == [[], []]
    for batches in zip(*(each["losses"] for each in seen), strict=True):
        check(list(batches), client)


def test_every_loss_that_is_not_refused_takes_advantages_of_tokens(train: Train, client: Client) -> None:
    losses = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo")
    config = {"steps_per_generation": 1, "max_steps": 1}
    seen = train("trl_grpo", **job(changes=[{"loss_type": each} for each in losses], config=config))
    assert (seen["errors"], seen["finite"], len(seen["losses"])) == ([], True, len(losses))
    for loss in seen["losses"]:
        check([loss], client)


def test_several_reward_functions_are_weighted_and_cut_completions_left_out(train: Train, client: Client) -> None:
    weights, alpha = [1.0, -0.5, 2.0], 0.3
    changes = {"reward_weights": weights, "mask_truncated_completions": True, "loss_type": "grpo"}
    config = changes | {"pad_to_multiple_of": 8, "gradient_accumulation_steps": 2}
    seen = train("trl_grpo", **job(methods=["red", "abc"], prompts=TEXTS, length=True, alpha=alpha, config=config))
    assert (seen["errors"], seen["finite"]) == ([], True)
    cut = 0
    for batches in by_generation(seen["losses"], 2):
        rows = [row for batch in batches for row in completions(batch)]
        prompts = [prompt for batch in batches for prompt in prompts_of(batch, TEXTS)]
        red = [scored(client, prompt, ids, "red") for prompt, ids in zip(prompts, rows, strict=True)]
        abc = [scored(client, prompt, ids, "abc")[1] for prompt, ids in zip(prompts, rows, strict=True)]
        totals = [0.5 * reward + 2 * len(ids) / 10 for (reward, _), ids in zip(red, rows, strict=True)]
        sequence = of_groups(prompts, totals)
        given = [row for batch in batches for row in batch["advantages"]]
        for position, advantages in enumerate(given):
            if rows[position][-1] != 2:
                cut += 1
                assert not any(advantages)
                continue
            rewards = red[position][1] - 0.5 * abc[position]
            expected = sequence[position] + alpha * (rewards - rewards.mean())
            np.testing.assert_allclose(advantages[: len(rewards)], expected, atol=TOLERANCE)
            assert not any(advantages[len(rewards) :])
    assert cut


def test_tokens_of_tools_get_nothing_and_their_share_moves_on(train: Train, client: Client) -> None:
    tokenizer = policies.make_tokenizer()
    ids = tokenizer("Thank you, that was good", add_special_tokens=False).input_ids
    rows = [[*ids, 2], ids, ids[:-3], [*ids[:-2], 2]]
    masks = [[int(not 2 <= position < 5) for position in range(len(row))] for row in rows]
    seen = train("trl_grpo", **job(completions=rows, masks=masks, config={"max_steps": 2}))
    assert seen["errors"] == []
    for batches in by_generation(seen["losses"], 2):
        written = [row for batch in batches for row in completions(batch)]
        prompts = [prompt for batch in batches for prompt in prompts_of(batch, DIALOGUES)]
        kept = [masks[rows.index(row)] for row in written]
        answers = [
            scored(client, prompt, ids, "red", mask) for prompt, ids, mask in zip(prompts, written, kept, strict=True)
        ]
        sequence = of_groups(prompts, [reward for reward, _ in answers])
        given = [row for batch in batches for row in batch["advantages"]]
        for advantages, each, mask, (_, rewards) in zip(given, sequence, kept, answers, strict=True):
            expected = (each + rewards - rewards[np.array(mask, bool)].mean()) * mask
            np.testing.assert_allclose(advantages[: len(rewards)], expected, atol=TOLERANCE)


def test_a_token_that_is_flipped_moves_its_own_advantage(train: Train) -> None:
    tokenizer = policies.make_tokenizer()
    ids = [*tokenizer("Thank you, that was good", add_special_tokens=False).input_ids, 2]
    position = len(ids) // 2
    flipped = [*ids[:position], tokenizer.convert_tokens_to_ids("z"), *ids[position + 1 :]]
    config = {"num_generations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 1, "max_steps": 1}
    seen = train("trl_grpo", **job(completions=[ids, flipped], config=config))
    (loss,) = seen["losses"]
    pairs = zip(loss["completion_ids"], loss["advantages"], strict=True)
    rows = {row[position]: np.array(advantages) for row, advantages in pairs}
    # Relative to the first token's, what is left of an advantage is its token's reward.
    before, after = (rows[each[position]] - rows[each[position]][0] for each in (ids, flipped))
    np.testing.assert_allclose(before[:position], after[:position], atol=TOLERANCE)
    assert abs(before[position] - after[position]) > 100 * TOLERANCE


@pytest.mark.parametrize(("trainer", "asynchronous"), [("grpo", True), ("rloo", False)])
def test_whole_completions_get_the_servers_number(
    trainer: str, asynchronous: bool, train: Train, client: Client
) -> None:
    config = {"max_steps": 2, "steps_per_generation": 1, "beta": 0.0}
    seen = train("trl_grpo", **job(trainer=trainer, asynchronous=asynchronous, config=config))
    assert (seen["errors"], seen["finite"]) == ([], True)
    assert len(seen["rewards"]) == 2
    for call in seen["rewards"]:
        expected = [scored(client, *each, "red")[0] for each in zip(call["prompts"], call["ids"], strict=True)]
        np.testing.assert_allclose(np.ravel(call["rewards"]), expected, atol=TOLERANCE)


@pytest.mark.parametrize(("trainer", "asynchronous"), [("dense", False), ("grpo", True)])
def test_a_server_that_is_gone_ends_the_training(
    trainer: str, asynchronous: bool, train: Train, tiny_llama: Path, tmp_path: Path
) -> None:
    with serving(tmp_path / "log", "--device", "cpu", "--model", str(tiny_llama)) as short_lived:
        request = job(trainer=trainer, asynchronous=asynchronous, config={"steps_per_generation": 1})
        seen = train("trl_grpo", **request | {"url": short_lived.url, "server": short_lived.process.pid})
    (error,) = seen["errors"]
    assert error.startswith("ConnectionFailed")
    assert len(seen["losses"]) == 1


def test_what_takes_no_advantages_of_tokens_is_refused_by_name(train: Train) -> None:
    changes: list[Json] = [
        {"loss_type": "vespo"},
        {"importance_sampling_level": "sequence"},
        {"off_policy_mask_threshold": 0.5},
    ]
    seen = train("trl_grpo", **job(changes=changes))
    assert seen["losses"] == []
    for change, error in zip(changes, seen["errors"], strict=True):
        assert error.startswith(f"ValueError: {next(iter(change))} ")


def test_an_end_of_responses_that_the_client_does_not_know_is_refused(train: Train) -> None:
    (error,) = train("trl_grpo", **job(eos=[0]))["errors"]
    assert error.startswith("ValueError: completions also end with [2]")
    (error,) = train("trl_grpo", **job(methods=[], length=True))["errors"]
    assert error.startswith("ValueError: no reward function is a TokenReward")
