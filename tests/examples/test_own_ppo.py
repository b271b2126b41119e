"""The example of a training loop: it trains, its rewards and its advantages are right, and it is short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from densereward_client import Client, ConnectionFailed
from examples import own_ppo as example
from serving import Server, serving


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("own_ppo") / "log", "--model", str(tiny_llama), "--device", "cpu") as running:
        yield running


def test_a_reader_can_follow_it() -> None:
    assert len(Path(example.__file__).read_text().splitlines()) < 150


def test_it_trains_on_what_the_server_says(server: Server) -> None:
    torch.manual_seed(0)
    policy, tokenizer = example.small_policy()
    before = [parameter.clone() for parameter in policy.parameters()]
    with Client(server.url, trust_env=False) as client:
        history = example.train(policy, tokenizer, client.bind(tokenizer), "red", 2, 8)
    assert len(history) == 2
    assert np.isfinite(history).all()
    assert any(not torch.equal(one, two) for one, two in zip(before, policy.parameters(), strict=True))


def test_a_reward_stands_where_its_token_stands(server: Server) -> None:
    _, tokenizer = example.small_policy()
    texts = ["Good food.", "So", "No, thank you 😀"]
    rows = [[*tokenizer(text).input_ids, *([tokenizer.eos_token_id] if i else [])] for i, text in enumerate(texts)]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    with Client(server.url, trust_env=False) as client:
        rewards = example.token_rewards(client.bind(tokenizer), example.PROMPTS[:3], ids, mask, "red")
        for prompt, text, row, earned, ended in zip(example.PROMPTS, texts, rows, rewards, (0, 1, 1), strict=False):
            spans = np.cumsum([0, *[len(tokenizer.decode([token]).encode()) or 1 for token in row[: len(row) - ended]]])
            sample = {"messages": [{"role": "user", "content": prompt}], "response": text, "finished": bool(ended)}
            item = client.token_rewards([sample], methods=["red"], include=["prefix_scores"]).data[0]
            assert len(spans) == len(row) - ended + 1
            total = float(item.reward or 0) - float(item.baseline["red"])
            assert float(earned.sum()) == pytest.approx(total, abs=1e-5)
            if ended and item.prefix_scores is not None:
                step = float(item.reward or 0) - float(item.prefix_scores[-1])
                assert float(earned[len(row) - 1]) == pytest.approx(step, abs=1e-5)
            assert not earned[len(row) :].any()


def test_its_estimates_are_sums_of_discounted_errors() -> None:
    torch.manual_seed(1)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    rewards, values = torch.randn(3, 4) * mask, torch.randn(3, 4)
    estimates = example.advantages(rewards, values, mask)
    for row, length in enumerate((4, 2, 1)):
        for t in range(length):
            next_values = [*values[row, 1:length].tolist(), 0.0]
            errors = [rewards[row, k] + next_values[k] - values[row, k] for k in range(length)]
            expected = sum(example.LAMBDA ** (k - t) * errors[k] for k in range(t, length))
            assert float(estimates[row, t]) == pytest.approx(float(expected), abs=1e-5)
        assert not estimates[row, length:].any()


def test_a_server_that_is_gone_ends_it(server: Server) -> None:
    policy, tokenizer = example.small_policy()
    with (
        Client(server.url, trust_env=False) as client,
        Client("http://127.0.0.1:9", retries=0, trust_env=False) as gone,
    ):
        bound = client.bind(tokenizer)
        bound._client = gone
        with pytest.raises(ConnectionFailed):
            example.train(policy, tokenizer, bound, "red", 1, 4)
