"""One sample said in several ways, and what spans, masks, lengths and cuts do to its rewards."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from serving import STEP, Api, Json

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? 😀"}]
PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy? 😀<|im_end|>\n<|im_start|>assistant\n"
RESPONSE = "Thank you 😀, e\u0301 and 東京.\n"
METHODS = ["red", "abc", "uniform", "sparse"]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Prompt and response, rendered and read by the tokenizer itself."""
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == PROMPT
    prompt_ids, response_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (rendered, RESPONSE))
    return prompt_ids, response_ids


@pytest.fixture(scope="module")
def expected(api: Api, ids: tuple[list[int], list[int]]) -> Json:
    return api.item({"prompt_token_ids": ids[0], "response_token_ids": ids[1]}, methods=METHODS)


@pytest.mark.parametrize("response", ["text", "ids"])
@pytest.mark.parametrize("prompt", ["text", "messages", "ids"])
def test_a_sample_gets_the_same_rewards_however_it_is_given(
    api: Api, ids: tuple[list[int], list[int]], expected: Json, prompt: str, response: str
) -> None:
    prompts: Json = {
        "text": {"prompt": PROMPT},
        "messages": {"messages": MESSAGES},
        "ids": {"prompt_token_ids": ids[0]},
    }
    responses: Json = {"text": {"response": RESPONSE}, "ids": {"response_token_ids": ids[1]}}
    item = api.item(prompts[prompt] | responses[response], methods=METHODS)
    assert item == expected
    assert len(item["token_rewards"]["red"]) == len(ids[1])


def test_closing_tokens_given_in_the_ids_are_not_added_again(
    api: Api, ids: tuple[list[int], list[int]], expected: Json
) -> None:
    closed = {"prompt_token_ids": ids[0], "response_token_ids": [*ids[1], 2, 201]}
    item = api.item(closed)
    assert item["reward"] == pytest.approx(expected["reward"], abs=1e-6)
    assert len(item["token_rewards"]["red"]) == len(ids[1]) + 2


def test_an_unfinished_response_is_scored_without_closing_tokens(api: Api) -> None:
    sample = {"prompt": PROMPT, "response": RESPONSE}
    finished, cut = api.answer([sample]), api.answer([sample | {"finished": False}], include=["prefix_scores"])
    assert finished["usage"]["forward_tokens"] - cut["usage"]["forward_tokens"] == 2
    [item] = cut["data"]
    assert item["reward"] == pytest.approx(item["prefix_scores"][-1], abs=1e-6)
    assert item["reward"] != pytest.approx(finished["data"][0]["reward"], abs=1e-3)


def _bytes_of_each(text: str) -> list[list[int]]:
    return [list(span) for span in pairwise(range(len(text.encode()) + 1))]


def test_spans_that_are_the_models_own_tokens_change_nothing(api: Api, expected: Json) -> None:
    sample = {"prompt": PROMPT, "response": RESPONSE}
    spans = api.item(sample, include=["spans"])["spans"]
    assert api.item(sample | {"response_spans": spans}, methods=METHODS) == expected


def test_spans_that_split_an_emoji_share_out_its_rewards(api: Api, expected: Json) -> None:
    sample = {"prompt": PROMPT, "response": RESPONSE, "response_spans": _bytes_of_each(RESPONSE)}
    items = api.item(sample, include=["spans"])
    rewards, spans = items["token_rewards"]["red"], items["spans"]
    assert len(rewards) == len(RESPONSE.encode())
    whole = [sum(rewards[start:stop]) for start, stop in spans]
    assert whole == pytest.approx(expected["token_rewards"]["red"], abs=STEP)


def test_two_spans_that_cut_an_emoji_in_half_share_its_token(api: Api) -> None:
    sample = {"prompt": PROMPT, "response": "😀"}
    [whole] = api.item(sample | {"response_spans": [[0, 4]]})["token_rewards"]["red"]
    halves = api.item(sample | {"response_spans": [[0, 2], [2, 4]]})["token_rewards"]["red"]
    assert sum(halves) == pytest.approx(whole, abs=STEP)


def test_a_masked_token_gets_zero_and_its_share_moves_to_the_next_kept_one(api: Api) -> None:
    sample = {"prompt_token_ids": [5, 6], "response_token_ids": [10, 11, 12, 13, 14]}
    free = api.item(sample)
    masked = api.item(sample | {"response_mask": [0, 1, 0, 1, 0]})
    first, second, third, fourth, fifth = free["token_rewards"]["red"]
    moved = [0.0, first + second, 0.0, third + fourth + fifth, 0.0]
    assert masked["token_rewards"]["red"] == pytest.approx(moved, abs=STEP)
    assert [masked["token_rewards"]["red"][i] for i in (0, 2, 4)] == [0.0, 0.0, 0.0]
    assert masked["reward"] == free["reward"]


def test_a_mask_counts_the_policys_tokens_where_there_are_spans(api: Api) -> None:
    sample = {"prompt": PROMPT, "response": "one two", "response_spans": [[0, 3], [3, 7]], "response_mask": [1, 0]}
    item = api.item(sample, methods=["uniform"])
    assert item["token_rewards"]["uniform"] == pytest.approx([item["reward"], 0.0])


def test_weights_share_the_reward_out(api: Api) -> None:
    sample = {"prompt_token_ids": [5, 6], "response_token_ids": [10, 11, 12], "weights": [1, 0, 3]}
    item = api.item(sample, methods=["weights"])
    expected = [item["reward"] * share for share in (0.25, 0.0, 0.75)]
    assert item["token_rewards"]["weights"] == pytest.approx(expected, abs=1e-6)


def test_an_empty_prompt_is_scored_and_said_to_have_no_score_of_its_own(api: Api) -> None:
    item = api.item({"prompt": "", "response": "fine"})
    assert item["baseline"] == {"red": 0.0}
    assert item["warnings"] == [
        "no_prompt_score: the prompt is empty and has no score to subtract; s_0 = 0 was used",
    ]


def test_an_empty_response_leaves_its_reward_in_the_baseline(api: Api) -> None:
    for sample in ({"prompt": PROMPT, "response": ""}, {"prompt": PROMPT, "response_token_ids": []}):
        item = api.item(sample)
        assert item["token_rewards"] == {"red": []}
        assert item["baseline"] == {"red": item["reward"]}
        assert item["warnings"] == [
            "empty_response: the response holds no token, so no method could redistribute the reward",
        ]


def test_a_prompt_of_no_messages_is_the_template_alone(api: Api) -> None:
    bare = api.item({"prompt": "<|im_start|>assistant\n", "response": "fine"})
    assert api.item({"messages": [], "response": "fine"}) == bare


def test_a_samples_rewards_do_not_depend_on_its_company(api: Api) -> None:
    samples = [{"prompt": PROMPT, "response": "word " * count} for count in range(1, 33)]
    alone = [api.item(sample) for sample in samples]
    for order in (samples, samples[::-1]):
        together = api.items(order)
        pairs = zip(alone, together if order is samples else together[::-1], strict=True)
        for one, same in pairs:
            assert same["reward"] == pytest.approx(one["reward"], abs=1e-6)
            assert same["token_rewards"]["red"] == pytest.approx(one["token_rewards"]["red"], abs=STEP)


def test_tokens_and_spans_spell_the_response(api: Api) -> None:
    item = api.item({"messages": MESSAGES, "response": RESPONSE}, include=["tokens", "spans"])
    assert [stop for _, stop in item["spans"]] == list(accumulate(stop - start for start, stop in item["spans"]))
    assert item["spans"][-1][1] == len(RESPONSE.encode())
    assert len(item["tokens"]) == len(item["spans"]) == len(item["token_rewards"]["red"])
    ascii_only = api.item({"messages": MESSAGES, "response": "Thank you"}, include=["tokens"])
    assert "".join(ascii_only["tokens"]) == "Thank you"
