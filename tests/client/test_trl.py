"""The parts of the TRL adapters that need no TRL: rollouts as samples, token rewards as advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densereward_client import BoundClient, ConnectionFailed, InvalidAnswer
from densereward_client.trainers._rewards import centred
from densereward_client.trainers._trl import AsyncTokenReward, TokenReward, dense_advantages, padded, rollouts

PAD, EOS = 0, 2


class Bound:
    """Answers as a bound client does: one reward per id, which sum to the reward."""

    def __init__(self) -> None:
        self.sent: list[Mapping[str, Any]] = []
        self.gone = False
        self.unserved = False

    def token_rewards(self, samples: Sequence[Mapping[str, Any]], *, methods: Any, truncate: Any) -> Any:
        if self.gone:
            raise ConnectionFailed("refused")
        self.sent += samples
        key = methods[0] if isinstance(methods[0], str) else methods[0].get("label", methods[0]["name"])
        return SimpleNamespace(data=[self._item(each["response_token_ids"], key) for each in samples])

    def _item(self, ids: list[int], key: str) -> Any:
        rewards = np.array(ids, np.float32)
        return SimpleNamespace(reward=None if self.unserved else float(rewards.sum()), token_rewards={key: rewards})


def bound() -> tuple[Bound, BoundClient]:
    fake = Bound()
    return fake, cast("BoundClient", fake)


def test_a_reward_function_scores_ids_and_keeps_their_tokens_rewards() -> None:
    fake, client = bound()
    function = TokenReward(client, {"name": "red", "label": "closed", "prefix_mode": "closed"})
    dialogue = [{"role": "user", "content": "How was it?"}]
    given = function(prompts=[dialogue, "How?"], completions=["", ""], completion_ids=[[5, EOS], [7]], trainer_state=0)
    assert given == [7.0, 7.0]
    assert function.__name__ == "densereward_closed"
    assert [each.tolist() for each in function.token_rewards or []] == [[5, EOS], [7]]
    assert fake.sent == [
        {"messages": dialogue, "response_token_ids": [5, EOS]},
        {"prompt": "How?", "response_token_ids": [7]},
    ]


def test_the_mask_of_tools_is_sent_to_the_server() -> None:
    fake, client = bound()
    TokenReward(client)(prompts=["a"], completion_ids=[[5, 6]], response_mask=[[1, 0]])
    assert fake.sent[0]["response_mask"] == [1, 0]


async def test_an_asynchronous_reward_function_gives_the_same() -> None:
    function = AsyncTokenReward(bound()[1], name="tone")
    assert await function(prompts=["a"], completion_ids=[[5, 6]]) == [11.0]
    assert function.__name__ == "tone"


def test_a_call_that_fails_raises_and_leaves_no_earlier_rewards() -> None:
    fake, client = bound()
    function = TokenReward(client)
    function(prompts=["a"], completion_ids=[[5]])
    fake.gone = True
    with pytest.raises(ConnectionFailed):
        function(prompts=["a"], completion_ids=[[5]])
    assert function.token_rewards is None
    fake.gone, fake.unserved = False, True
    with pytest.raises(InvalidAnswer, match="0 rewards for 1 responses"):
        function(prompts=["a"], completion_ids=[[5]])


def test_a_prompt_that_begins_the_answer_is_refused() -> None:
    prompt = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "It"}]
    with pytest.raises(ValueError, match="goes on writing"):
        TokenReward(bound()[1])(prompts=[prompt], completion_ids=[[5]])


numbers = st.floats(-10, 10, width=32)
rectangles = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        st.lists(numbers, min_size=shape[0], max_size=shape[0]),
        *(
            st.lists(st.lists(each, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
            for each in (numbers, st.integers(0, 1))
        ),
    )
)


@given(rectangle=rectangles, alpha=st.floats(0, 2))
def test_token_rewards_move_advantages_within_a_completion_and_add_none(rectangle: Any, alpha: float) -> None:
    sequence, rewards, mask = (torch.tensor(each, dtype=torch.float64) for each in rectangle)
    advantages = dense_advantages(sequence, rewards, mask.long(), alpha)
    assert not advantages[mask == 0].any()
    torch.testing.assert_close(advantages.sum(1), sequence * mask.sum(1), atol=1e-6, rtol=0)
    for row, kept, each, a in zip(advantages, mask.bool(), rewards, sequence, strict=True):
        if kept.any():
            torch.testing.assert_close(row[kept], a + alpha * (each[kept] - each[kept].mean()), atol=1e-6, rtol=0)


def test_rollouts_lose_their_padding_and_nothing_else() -> None:
    rows = [
        [PAD, PAD, 5, 6, 7, EOS, PAD],
        [5, PAD, 6, 7, 8, 9, 4],
        [PAD, 5, 6, 7, PAD, PAD, PAD],
        [PAD, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert rollouts(rows, 4, PAD, frozenset({EOS})) == [
        ((5, 6), [7, EOS]),
        ((5, PAD, 6, 7), [8, 9, 4]),
        ((5, 6, 7), []),
        ((), []),
    ]


def test_a_pad_that_is_the_eos_ends_a_response_and_belongs_to_it() -> None:
    rows = [[EOS, 5, 7, EOS, EOS], [EOS, 5, EOS, EOS, EOS], [EOS, 5, 7, 8, 9]]
    assert rollouts(rows, 2, EOS, frozenset({EOS})) == [((5,), [7, EOS]), ((5,), [EOS]), ((5,), [7, 8, 9])]


def test_rows_are_padded_on_the_right_in_the_tensors_own_type() -> None:
    rows = [np.array([1, 2], np.float32), np.array([3], np.float32)]
    tensor = padded(rows, like=torch.ones(2, 3, dtype=torch.float64))
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == [[1, 2, 0], [3, 0, 0]]


def test_what_is_masked_does_not_reach_the_mean() -> None:
    rewards, mask = torch.tensor([[1.0, 3.0, torch.nan], [torch.inf, 5.0, 5.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert centred(rewards, mask).tolist() == [[-1, 1, 0], [0, 0, 0]]
