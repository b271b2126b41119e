"""A policy's tokens bound to a reward model's: what is sent, and what comes back on each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densereward_client import AsyncClient, BoundClient, Client, InvalidAnswer
from densereward_client.binding import Binding
from densereward_client.wire import ModelList
from families import POLICIES, TOKENS
from serving import Json, Server

from .conftest import LETTERS, MESSAGES, bindings, ids_of

CLOSED = {"name": "red", "label": "closed", "prefix_mode": "closed"}
METHODS: list[Any] = ["red", "abc", "uniform", "sparse", CLOSED]
text = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("model", ["closed", "bare"])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_token_is_rewarded_and_sums_are_kept(policy: str, model: str, client: Client) -> None:
    bound = client.bind(TOKENS[policy], model=model)
    texts = ["Thank you, it was good.", "Zürich: 東京 😀!", "a\tb\n\x07", ""]
    eos = POLICIES[policy].eos_token_id is not None
    samples: list[Json] = [
        {"prompt": "How was it?", "response_token_ids": ids_of(POLICIES[policy], written, eos=end and eos)}
        for written in texts
        for end in (True, False)
        if not (policy == "bert" and "東" in written)  # in its vocabulary, and not the smiley
    ]
    answer = bound.token_rewards(samples, methods=METHODS)
    for sample, item in zip(samples, answer.data, strict=True):
        for name, rewards in item.token_rewards.items():
            assert len(rewards) == len(sample["response_token_ids"])
            total = float(rewards.sum(dtype=np.float64)) + item.baseline[name]
            assert total == pytest.approx(item.reward, abs=1e-5)


def test_ids_are_sent_as_they_are_where_the_tokens_are_the_same(client: Client, models: ModelList) -> None:
    tokenizer = POLICIES["tiny"]
    binding = Binding(tokenizer, models, "closed")
    assert binding.same_tokens
    assert not Binding(TOKENS["qwen"], models, "closed").same_tokens
    ids = ids_of(tokenizer, "Thank you")
    sent = binding.bind({"messages": MESSAGES, "response_token_ids": ids}).sample
    assert (sent.response_token_ids, sent.response, sent.finished) == (ids, None, True)
    bound = client.bind(tokenizer, model="closed").token_rewards(
        [{"messages": MESSAGES, "response_token_ids": ids}], methods=METHODS
    )
    direct = client.token_rewards([{"messages": MESSAGES, "response_token_ids": ids}], methods=METHODS, model="closed")
    for name, rewards in direct.data[0].token_rewards.items():
        np.testing.assert_array_equal(bound.data[0].token_rewards[name], rewards)


@pytest.mark.parametrize("policy", ["qwen", "llama", "deepseek", "tiny sentencepiece"])
def test_what_closing_tokens_add_is_the_reward_of_the_policys_eos(policy: str, client: Client) -> None:
    written = "Thank you, it was good."
    ids = ids_of(POLICIES[policy], written)
    sample = {"messages": MESSAGES, "response_token_ids": ids}
    item = client.bind(TOKENS[policy], model="closed").token_rewards([sample], methods=["red"]).data[0]
    plain = {"messages": MESSAGES, "response": written}
    direct = client.token_rewards([plain], methods=["red"], include=["prefix_scores"], model="closed").data[0]
    assert item.reward == pytest.approx(direct.reward, abs=1e-5)
    assert direct.prefix_scores is not None
    step = float(direct.reward or 0.0) - float(direct.prefix_scores[-1])
    assert float(item.token_rewards["red"][-1]) == pytest.approx(step, abs=1e-5)


def test_an_eos_that_is_not_how_closing_tokens_begin_stands_for_them_all(client: Client) -> None:
    ids = ids_of(POLICIES["tiny"], "Thank you", eos=False)
    other_eos = 0  # a BOS, which this policy ends with
    [card] = [card for card in client.models().data if card.id == "closed"]
    closed = [*ids, card.closing_token_ids[0]]
    direct = client.token_rewards(
        [{"messages": MESSAGES, "response_token_ids": closed}], methods=METHODS, model="closed"
    ).data[0]
    bound = client.bind(TOKENS["tiny"], model="closed", eos_token_ids=[other_eos])
    sample = {"messages": MESSAGES, "response_token_ids": [*ids, other_eos, other_eos]}
    item = bound.token_rewards([sample], methods=METHODS).data[0]
    assert item.reward == pytest.approx(direct.reward, abs=1e-6)
    for name, rewards in direct.token_rewards.items():
        np.testing.assert_allclose(item.token_rewards[name], [*rewards, 0], atol=1e-6)


@pytest.mark.parametrize("policy", ["tiny", "qwen"])
def test_a_response_without_an_eos_was_cut_unless_it_says_otherwise(policy: str, models: ModelList) -> None:
    tokenizer = POLICIES[policy]
    binding = Binding(tokenizer, models, "closed")
    cut, ended = ids_of(tokenizer, "Thank", eos=False), ids_of(tokenizer, "Thank")
    finished = [
        binding.bind({"prompt": "", "response_token_ids": ids} | more).sample.finished
        for ids, more in ((cut, {}), (ended, {}), (cut, {"finished": True}), (ended, {"finished": False}))
    ]
    assert finished == [False, True, True, False]


def test_masked_and_special_tokens_get_nothing(client: Client) -> None:
    tokenizer = POLICIES["qwen"]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [*ids_of(tokenizer, "Thank you", eos=False), start, *ids_of(tokenizer, " tool says so. Good")]
    tool = [0 if tokenizer.decode([token]).strip() in ("tool", "says", "so") else 1 for token in ids]
    sample = {"messages": MESSAGES, "response_token_ids": ids, "response_mask": tool}
    item = client.bind(tokenizer, model="closed").token_rewards([sample], methods=METHODS).data[0]
    for rewards in item.token_rewards.values():
        assert rewards[ids.index(start)] == 0
        assert not rewards[np.equal(tool, 0)].any()


@pytest.mark.parametrize("policy", ["qwen", "llama", "deepseek", "mon", "tiny"])
@settings(max_examples=15, deadline=None)
@given(written=text, ended=st.booleans())
def test_sums_are_kept_whatever_is_written(
    policy: str, written: str, ended: bool, models: ModelList, client: Client
) -> None:
    """The first model's tokens are tiny's alone."""
    ids = ids_of(POLICIES[policy], written, eos=ended)
    bound = BoundClient(client, bindings(policy, models))
    item = bound.token_rewards([{"messages": MESSAGES, "response_token_ids": ids}], methods=METHODS).data[0]
    for name, rewards in item.token_rewards.items():
        assert len(rewards) == len(ids)
        total = float(rewards.sum(dtype=np.float64)) + item.baseline[name]
        assert total == pytest.approx(item.reward, abs=1e-5)


def test_a_prompt_in_the_policys_special_tokens_is_refused_where_those_mean_nothing(models: ModelList) -> None:
    tokenizer = POLICIES["qwen"]
    binding = Binding(tokenizer, models, "closed")
    plain = ids_of(tokenizer, "How was it?", eos=False)
    sample: Json = {"prompt_token_ids": plain, "response_token_ids": plain}
    assert binding.bind(sample).sample.prompt == "How was it?"
    with pytest.raises(ValueError, match="hold the policy's special tokens"):
        binding.bind(sample | {"prompt_token_ids": [tokenizer.eos_token_id, *plain]})
    same = Binding(TOKENS["tiny"], models, "closed")
    ids = ids_of(POLICIES["tiny"], "How")
    assert same.bind({"prompt_token_ids": ids, "response_token_ids": ids}).sample.prompt_token_ids == ids


def test_what_is_not_given_as_ids_is_refused(models: ModelList, client: Client) -> None:
    with pytest.raises(ValueError, match="give the response as response_token_ids"):
        Binding(TOKENS["tiny"], models).bind({"prompt": "a", "response": "b"})
    with pytest.raises(ValueError, match="has no model 'lost'; there are closed, bare"):
        client.bind(TOKENS["tiny"], model="lost")


def test_an_ensemble_gets_text_since_its_models_have_other_tokens(client: Client) -> None:
    bound = client.bind(TOKENS["tiny"], model=["closed", "bare"])
    assert not bound.binding.same_tokens
    ids = ids_of(POLICIES["tiny"], "Thank you")
    item = bound.token_rewards([{"prompt": "How?", "response_token_ids": ids}], methods=["red"]).data[0]
    assert len(item.token_rewards["red"]) == len(ids)
    assert set(item.rewards or {}) == {"closed", "bare"}


def test_a_server_whose_model_was_replaced_is_noticed(models: ModelList) -> None:
    binding = Binding(TOKENS["tiny"], models, "closed")
    assert not binding.is_known("fp-1")
    binding.compare(models, "fp-1")
    assert binding.is_known("fp-1")
    replaced = models.model_copy(deep=True)
    replaced.data[0].tokenizer_fingerprint = "another"
    with pytest.raises(InvalidAnswer, match="tokenizer_fingerprint changed"):
        binding.compare(replaced, "fp-2")


def test_rewards_of_sequences_are_those_of_their_tokens(client: Client) -> None:
    bound = client.bind(TOKENS["tiny"], model="bare")
    responses = [ids_of(POLICIES["tiny"], written) for written in ("Thank you", "a\n😀")]
    samples = [{"prompt": "How?", "response_token_ids": ids} for ids in responses]
    rewards = [item.reward for item in bound.rewards(samples).data]
    others = [item.reward for item in bound.token_rewards(samples, methods=["sparse"]).data]
    assert rewards == pytest.approx(others, abs=1e-6)
    broken = {"prompt": "a", "response_token_ids": [POLICIES["tiny"].convert_tokens_to_ids("Ł")]}
    assert bound.rewards([broken]).data[0].warnings[0].startswith("invalid_utf8")


def test_bad_samples_keep_their_places(client: Client) -> None:
    tokenizer = POLICIES["qwen"]
    good = {"messages": MESSAGES, "response_token_ids": ids_of(tokenizer, "Thank you"), "id": "good"}
    long = good | {"response_token_ids": ids_of(tokenizer, "Thank you " * 2000), "id": "long"}
    lost = good | {"response_token_ids": [10**7], "id": "lost"}
    bound = client.bind(tokenizer, model="closed")
    for call in (bound.token_rewards, bound.rewards):
        data = call([lost, good, long, good], on_error="item").data
        assert [item.index for item in data] == [0, 1, 2, 3]
        assert [item.error and item.error.code for item in data] == ["invalid_tokens", None, "too_long", None]
    with pytest.raises(ValueError, match="sample 1: the tokenizer has no token 10000000"):
        bound.token_rewards([good, lost])
    with pytest.raises(ValueError, match="sample 0: the tokenizer has no token"):
        bound.token_rewards([lost], on_error="item")


@pytest.mark.parametrize("name", ["response_mask", "weights", "token_entropies"])
def test_lists_of_another_length_than_the_ids_are_refused(name: str, models: ModelList) -> None:
    ids = ids_of(POLICIES["tiny"], "Thank you")
    for policy in (bindings("tiny", models), bindings("qwen", models)):
        for length in (len(ids) - 1, len(ids) + 1):
            with pytest.raises(ValueError, match=f"{name} has {length} entries for {len(ids)} response_token_ids"):
                policy.bind({"prompt": "a", "response_token_ids": ids, name: [1] * length})


@pytest.mark.parametrize("model", ["closed", "bare"])
@pytest.mark.parametrize("policy", ["tiny", "tiny sentencepiece", "qwen"])
def test_what_follows_the_first_eos_gets_nothing_and_changes_nothing(policy: str, model: str, client: Client) -> None:
    ids = ids_of(POLICIES[policy], "Thank you")
    padding = min(Binding(TOKENS[policy], client.models(), model)._tokens.special - {ids[-1]}, default=ids[-1])
    bound = client.bind(TOKENS[policy], model=model)
    plain = bound.token_rewards([{"prompt": "How?", "response_token_ids": ids}], methods=METHODS).data[0]
    for more in ([ids[-1]] * 3, [padding] * 2, [ids[-1], padding]):
        sample = {"prompt": "How?", "response_token_ids": [*ids, *more]}
        item = bound.token_rewards([sample], methods=METHODS).data[0]
        assert item.reward == pytest.approx(plain.reward, abs=1e-6)
        for name, rewards in plain.token_rewards.items():
            np.testing.assert_allclose(item.token_rewards[name], [*rewards, *[0] * len(more)], atol=2e-6)


def test_both_ways_put_the_reward_on_the_same_token(client: Client, models: ModelList) -> None:
    """Tiny's ids are sent as they are to `closed`; as another policy's, they would be sent as text."""
    tokenizer = POLICIES["tiny"]
    ids = ids_of(tokenizer, "Thank you")
    as_ids, as_text = Binding(tokenizer, models, "closed"), Binding(tokenizer, models, "closed")
    as_text.same_tokens = False
    answers = [
        BoundClient(client, binding)
        .token_rewards([{"messages": MESSAGES, "response_token_ids": [*ids, ids[-1]]}], methods=METHODS)
        .data[0]
        for binding in (as_ids, as_text)
    ]
    for name, rewards in answers[0].token_rewards.items():
        np.testing.assert_allclose(answers[1].token_rewards[name], rewards, atol=2e-6)


def test_special_tokens_at_the_end_that_are_no_eos_are_named(client: Client) -> None:
    ids = ids_of(POLICIES["qwen"], "Thank you", eos=False)
    start = POLICIES["qwen"].convert_tokens_to_ids("<|im_start|>")
    eos = POLICIES["qwen"].eos_token_id
    bound = client.bind(TOKENS["qwen"], model="closed")
    ends, within = (
        bound.token_rewards([{"messages": MESSAGES, "response_token_ids": each}], methods=["red"]).data[0].warnings
        for each in ([*ids, start], [*ids, eos, *ids])
    )
    assert any(warning.startswith("ends_special") for warning in ends)
    assert any(warning.startswith("eos_within") for warning in within)


async def test_the_asynchronous_client_gives_the_same(server: Server, client: Client) -> None:
    sample = {"messages": MESSAGES, "response_token_ids": ids_of(POLICIES["qwen"], "Thank you 😀")}
    expected = client.bind(POLICIES["qwen"]).token_rewards([sample]).data[0]
    async with AsyncClient(server.url, trust_env=False) as other:
        bound = await other.bind(POLICIES["qwen"])
        item = (await bound.token_rewards([sample])).data[0]
        assert (await bound.rewards([sample])).data[0].reward == pytest.approx(item.reward, abs=1e-6)
    np.testing.assert_array_equal(item.token_rewards["red"], expected.token_rewards["red"])
