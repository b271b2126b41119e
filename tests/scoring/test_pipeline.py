"""From samples to answers on a real small model: sums, slots, order, and errors in their places."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import tiny
from densereward import methods
from densereward.checks.loading import load
from densereward.engines.base import Engine
from densereward.errors import DenseRewardError, InvalidRequest
from densereward.metrics import Metrics
from densereward.scheduling.batcher import Batcher
from densereward.scoring.pipeline import Pipeline, answer_to
from densereward.settings import ModelSettings
from densereward.tokenization.align import Aligner
from densereward_client.wire import TokenRewardsRequest, TokenRewardsResponse
from fakes import FakeEngine
from serving import NOT_BY_A_SCORE

CLOSED = {"name": "red", "prefix_mode": "closed", "label": "red_closed"}
VARYING = ["occlusion", "shapley"]
METHODS = [name for name in methods.METHODS if name not in (*VARYING, *NOT_BY_A_SCORE)]


class Offline:
    """A pipeline that is called without a running loop."""

    def __init__(self, engine: Engine, aligner: Aligner) -> None:
        self.engine, self.aligner = engine, aligner

    def __call__(self, samples: list[Any], **request: Any) -> TokenRewardsResponse:
        return asyncio.run(self._answer(samples, request))

    async def _answer(self, samples: list[Any], request: dict[str, Any]) -> TokenRewardsResponse:
        metrics = Metrics()
        batcher = Batcher(self.engine, max_batch_tokens=512, max_queue_tokens=10**6, metrics=metrics)
        pipeline = Pipeline("tiny", self.engine, self.aligner, batcher, metrics)
        parsed = TokenRewardsRequest.model_validate({"samples": samples} | request)
        try:
            answer = await answer_to(pipeline, parsed, parsed.samples)
        finally:
            await batcher.close()
        return TokenRewardsResponse.model_validate(answer)


@pytest.fixture(scope="module")
def score(tiny_llama: Path) -> Offline:
    return Offline(*load(ModelSettings(model=str(tiny_llama), device="cpu")))


@st.composite
def spans_of(draw: st.DrawFn, text: str) -> list[tuple[int, int]]:
    """Cuts anywhere in the bytes, characters split included."""
    size = len(text.encode())
    inner = sorted(draw(st.lists(st.integers(0, size), max_size=6)))
    points = [0, *inner, size]
    return list(itertools.pairwise(points))


@st.composite
def samples(draw: st.DrawFn) -> dict[str, Any]:
    text = draw(st.sampled_from(["ok", "😀👩‍👩‍👧", "東京へ", "e\u0301a\u0300", "Thank you", " a\n"]))
    text += draw(st.text(max_size=12))
    sample: dict[str, Any] = {"response": text, "finished": draw(st.booleans())}
    sample |= draw(
        st.sampled_from(
            [
                {"prompt": ""},
                {"prompt": "Why? "},
                {"messages": [{"role": "user", "content": ""}]},
                {"prompt_token_ids": [5]},
            ]
        )
    )
    if not draw(st.booleans()):
        sample["response_token_ids"] = draw(st.lists(st.integers(0, 319), min_size=1, max_size=20))
        del sample["response"]
        count = len(sample["response_token_ids"])
    else:
        sample["response_spans"] = draw(spans_of(text))
        count = len(sample["response_spans"])
    sample["weights"] = draw(st.lists(st.floats(0.1, 9), min_size=count, max_size=count))
    if draw(st.booleans()):
        mask = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count).filter(any))
        sample["response_mask"] = mask
    return sample


@settings(max_examples=60)
@given(batch=st.lists(samples(), min_size=1, max_size=4), beta=st.floats(0, 1))
def test_every_methods_rewards_and_baseline_sum_to_the_reward_on_the_trainers_tokens(
    score: Offline, batch: list[dict[str, Any]], beta: float
) -> None:
    answer = score(batch, methods=[*({"name": name, "beta": beta} for name in METHODS), CLOSED])
    for sample, item in zip(batch, answer.data, strict=True):
        slots = sample.get("response_spans") or sample["response_token_ids"]
        for name in (*METHODS, "red_closed"):
            rewards = item.token_rewards[name]
            assert rewards.shape == (len(slots),)
            assert np.isfinite(rewards).all()
            assert item.reward is not None
            total = rewards.sum(dtype=np.float64) + item.baseline[name]
            assert total == pytest.approx(item.reward, abs=1e-5 * max(1.0, float(np.abs(rewards).sum())))
            if "response_mask" in sample:
                assert not rewards[np.array(sample["response_mask"]) == 0].any()


@pytest.mark.parametrize("unit", ["sentence", "word", "token"])
@pytest.mark.parametrize("finished", [True, False])
def test_methods_that_leave_parts_out_keep_the_sum_too(score: Offline, unit: str, finished: bool) -> None:
    sample = {"prompt": "Well?", "response": "Thank you 😀. It is good food! " * 2, "finished": finished}
    item = score([sample, sample], methods=[{"name": name, "unit": unit} for name in VARYING]).data[1]
    for name in VARYING:
        total = item.token_rewards[name].sum(dtype=np.float64) + item.baseline[name]
        assert total == pytest.approx(item.reward, abs=1e-5)


def test_without_a_prompt_and_closing_tokens_not_all_can_be_left_out(score: Offline) -> None:
    sample = {"prompt": "", "response": "ok", "finished": False}
    with pytest.raises(InvalidRequest, match="give a prompt"):
        score([sample], methods=["occlusion"])
    assert score([sample | {"finished": True}], methods=["occlusion"]).data[0].error is None


def test_token_rewards_are_the_paper_formulas_on_an_independent_reading_of_the_model(
    score: Offline, tiny_llama: Path
) -> None:
    model = reference.eager(tiny_llama)
    prompt, response, closing = [5, 6, 7], [20, 30, 40, 50], [2, 201]
    item = score(
        [{"prompt_token_ids": prompt, "response_token_ids": response}],
        methods=["red", "abc", "uniform", "sparse"],
        include=["prefix_scores", "attention"],
    ).data[0]
    s = reference.prefix_scores(model, prompt, response)
    reward = reference.score(model, [*prompt, *response, *closing])
    assert item.reward == pytest.approx(reward, abs=1e-5)
    expected = [s[1] - s[0], s[2] - s[1], s[3] - s[2], reward - s[3]]
    np.testing.assert_allclose(item.token_rewards["red"], expected, atol=1e-5)
    assert item.baseline["red"] == pytest.approx(s[0], abs=1e-5)
    assert item.prompt_score == pytest.approx(s[0], abs=1e-5)
    assert item.prefix_scores is not None
    np.testing.assert_allclose(item.prefix_scores, np.array(s[1:]), atol=1e-5)
    row = reference.padded(model, [[*prompt, *response, *closing]])[0].rows[-1, 3:7].numpy()
    assert item.attention is not None
    np.testing.assert_allclose(item.attention, row, atol=1e-6)
    dense = row / row.sum() * reward
    np.testing.assert_allclose(item.token_rewards["abc"], 0.8 * dense + [0, 0, 0, 0.2 * reward], atol=1e-5)
    assert item.attention_mass is not None
    assert item.attention_mass["abc"] == pytest.approx(row.sum(), abs=1e-6)
    np.testing.assert_allclose(item.token_rewards["uniform"], [reward / 4] * 4, atol=1e-5)
    np.testing.assert_allclose(item.token_rewards["sparse"], [0, 0, 0, reward], atol=1e-5)


def test_what_else_is_read_off_the_pass_is_what_an_independent_reading_gives(score: Offline, tiny_llama: Path) -> None:
    prompt, response, closing = [5, 6, 7], [20, 30, 40, 50], [2, 201]
    ids = [*prompt, *response, *closing]
    asked = ["contribution", "future_attention", {"name": "message", "threshold": 0.0}]
    sample = {"prompt_token_ids": prompt, "response_token_ids": response}
    item = score([sample], methods=asked, include=["segments"]).data[0]
    model = reference.eager(tiny_llama).double()
    added = sum(reference.contributions(model, ids, layer)[3:7] for layer in range(3))
    np.testing.assert_allclose(item.token_rewards["contribution"], added, atol=1e-5)
    with torch.no_grad():
        last = model.base_model(input_ids=torch.tensor([ids]), output_attentions=True).attentions[-1][0].mean(0)
    means = [float(sum(last[later, t] for later in range(t + 1, 7))) / max(6 - t, 1) for t in range(3, 7)]
    shares = np.array(means) / sum(means) * (item.reward or 0.0)
    np.testing.assert_allclose(item.token_rewards["future_attention"], shares, atol=1e-5)
    s = [*reference.prefix_scores(reference.eager(tiny_llama), prompt, response)[:-1], item.reward or 0.0]
    starts = [0, *(t for t in range(1, 4) if (s[t] >= 0) != (s[t + 1] >= 0))]
    stops = [*starts[1:], 4]
    steps = [
        (s[stop] - s[start]) / (stop - start)
        for start, stop in zip(starts, stops, strict=True)
        for _ in range(start, stop)
    ]
    np.testing.assert_allclose(item.token_rewards["message"], steps, atol=1e-5)
    assert item.segments is not None
    assert [(each.start, each.end) for each in item.segments["message"]] == list(zip(starts, stops, strict=True))


@pytest.mark.parametrize("layers", [[0], [1], [2], [-3], [0, 2], [0, 1, 2], "last"], ids=str)
def test_abc_is_its_papers_formula_on_a_gpt2_with_left_over_prompts_and_pad_equal_to_eos(
    layers: list[int] | str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny.save(tmp_path_factory.mktemp("gpt2"), "gpt2")
    score = Offline(*load(ModelSettings(model=str(folder), device="cpu")))
    assert tiny.make_tokenizer().pad_token_id == tiny.make_tokenizer().eos_token_id
    # IMDb's way: the response goes on where the prompt's text was cut; ids of eos stand in both.
    samples = [([9, 2, 30, 31], [32, 2, 33, 34, 35]), ([12], [40, 41]), ([2, 2, 50, 51, 52, 53], [2, 54, 2, 55])]
    asked = {"name": "abc", "layers": layers, "beta": 0.6}
    answer = score(
        [{"prompt_token_ids": prompt, "response_token_ids": response} for prompt, response in samples], methods=[asked]
    )
    numbers = layers if isinstance(layers, list) else [-1]
    whole = [[*prompt, *response, *score.aligner.closing_ids] for prompt, response in samples]
    for (prompt, response), item, read in zip(
        samples, answer.data, reference.padded(reference.eager(folder), whole), strict=True
    ):
        row = np.mean([read.rows[layer].numpy() for layer in numbers], axis=0)[
            len(prompt) : len(prompt) + len(response)
        ]
        reward = float(read.scores[-1])
        expected = 0.6 * row / row.sum() * reward
        expected[-1] += 0.4 * reward
        np.testing.assert_allclose(item.token_rewards["abc"], expected, atol=1e-5)


def test_closed_prefixes_are_scored_as_if_the_response_ended_there(score: Offline, tiny_llama: Path) -> None:
    model = reference.eager(tiny_llama)
    prompt, response, closing = [5, 6, 7], [20, 30, 40, 50], [2, 201]
    sample = {"prompt_token_ids": prompt, "response_token_ids": response}
    asked = [{"name": "red", "prefix_mode": "closed"}, {"name": "red", "label": "open"}]
    item = score([sample, sample | {"finished": False}], methods=asked).data
    s = np.array(reference.prefix_scores(model, prompt, response, closing=closing))
    np.testing.assert_allclose(item[0].token_rewards["red"], np.diff(s), atol=1e-5)
    assert item[0].baseline["red"] == pytest.approx(s[0], abs=1e-5)
    assert item[0].reward == pytest.approx(s[-1], abs=1e-5)
    assert np.abs(item[0].token_rewards["red"] - item[0].token_rewards["open"]).max() > 1e-3
    assert item[1].warnings[0].startswith("unfinished:")


def test_ids_and_their_text_are_the_same_sample(score: Offline) -> None:
    vocabulary = score.aligner.vocabulary
    chat = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    prompt, response = vocabulary.encode(chat).ids, vocabulary.encode("Thank you 😀").ids
    answer = score(
        [
            {"messages": [{"role": "user", "content": "Why?"}], "response": "Thank you 😀"},
            {"prompt": chat, "response": "Thank you 😀"},
            {"prompt_token_ids": prompt, "response_token_ids": response},
            {"prompt_token_ids": prompt, "response": "Thank you 😀"},
        ],
        methods=["red", "abc"],
    )
    for item in answer.data[1:]:
        assert item.reward == pytest.approx(answer.data[0].reward, abs=1e-6)
        for method in ("red", "abc"):
            np.testing.assert_allclose(item.token_rewards[method], answer.data[0].token_rewards[method], atol=1e-6)


def test_one_slot_per_model_token_is_the_same_as_none(score: Offline) -> None:
    sample = {"prompt": "", "response": "Thank 😀 you"}
    plain = score([sample], include=["spans"]).data[0]
    mapped = score([sample | {"response_spans": plain.spans}]).data[0]
    np.testing.assert_allclose(mapped.token_rewards["red"], plain.token_rewards["red"], atol=1e-7)


def test_one_slot_for_the_whole_response_gets_the_whole_reward(score: Offline) -> None:
    sample = {"prompt": "Why?", "response": "So 😀", "response_spans": [(0, 7)]}
    item = score([sample], methods=["red", "abc"]).data[0]
    assert item.reward is not None
    assert item.token_rewards["red"][0] == pytest.approx(item.reward - item.baseline["red"], abs=1e-6)
    assert item.token_rewards["abc"][0] == pytest.approx(item.reward, abs=1e-6)


def test_an_empty_response_is_scored_and_says_that_nothing_could_be_shared_out(score: Offline) -> None:
    empty = score([{"prompt": "Why?", "response": ""}]).data[0]
    assert empty.token_rewards["red"].shape == (0,)
    assert empty.baseline["red"] == empty.reward
    assert empty.warnings[0].startswith("empty_response:")
    with_slot = score([{"prompt": "Why?", "response": "", "response_spans": [(0, 0)]}]).data[0]
    assert with_slot.token_rewards["red"] == pytest.approx([with_slot.reward])


def test_the_tokens_and_spans_included_are_the_responses(score: Offline) -> None:
    item = score([{"prompt": "Why? ", "response": "So it is."}], include=["tokens", "spans"]).data[0]
    assert item.tokens is not None
    assert "".join(item.tokens) == "So it is."
    assert item.spans is not None
    assert [stop - start for start, stop in item.spans] == [len(token) for token in item.tokens]


BAD = {"prompt": "", "response_token_ids": [99999], "id": "b"}
GOOD = {"prompt": "Why?", "response": "So."}


def test_one_bad_sample_fails_the_request_and_is_named(score: Offline) -> None:
    with pytest.raises(InvalidRequest, match=r"samples\[1\]: token id 99999") as refused:
        score([GOOD, BAD])
    assert refused.value.details["index"] == 1
    assert refused.value.details["id"] == "b"


def test_under_on_error_item_the_rest_are_served(score: Offline) -> None:
    answer = score([GOOD, BAD, GOOD], on_error="item")
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.data[1].error is not None
    assert answer.data[1].error.code == "id_out_of_vocabulary"
    assert answer.data[1].id == "b"
    assert answer.data[0].reward == answer.data[2].reward


@pytest.mark.parametrize(
    ("methods", "code"),
    [
        (["nonsense"], "unknown_method"),
        ([{"name": "abc", "layers": [7]}], "method_unavailable"),
        ([{"name": "abc", "betta": 1}], "invalid_params"),
        ([{"name": "red", "first_token": "x"}], "invalid_params"),
        (["red", "red"], "repeated_method"),
        (["weights"], "missing_weights"),
    ],
)
def test_methods_that_cannot_be_served_are_refused_before_anything_runs(
    score: Offline, methods: list[Any], code: str
) -> None:
    with pytest.raises(DenseRewardError) as refused:
        score([GOOD], methods=methods)
    assert (refused.value.error_code, refused.value.status) == (code, 422)


def test_one_method_twice_under_two_labels(score: Offline) -> None:
    asked = [{"name": "abc", "beta": 1.0}, {"name": "abc", "beta": 0.0, "label": "sparse_abc"}]
    item = score([GOOD], methods=asked).data[0]
    assert list(item.token_rewards) == ["abc", "sparse_abc"]
    assert item.token_rewards["sparse_abc"][-1] == pytest.approx(item.reward)


def test_base64_holds_the_same_numbers(score: Offline) -> None:
    plain = score([GOOD], include=["prefix_scores"]).data[0]
    encoded = score([GOOD], include=["prefix_scores"], encoding_format="base64").data[0]
    np.testing.assert_array_equal(plain.token_rewards["red"], encoded.token_rewards["red"])
    assert plain.prefix_scores is not None
    assert encoded.prefix_scores is not None
    np.testing.assert_array_equal(plain.prefix_scores, encoded.prefix_scores)


async def test_a_requests_priority_decides_over_who_came_first() -> None:
    engine = FakeEngine()
    tokenizer = tiny.make_tokenizer()
    metrics = Metrics()
    batcher = Batcher(engine, max_batch_tokens=4, max_queue_tokens=10**6, metrics=metrics)
    pipeline = Pipeline("fake", engine, Aligner(tokenizer, 64, 320), batcher, metrics)

    async def ask(mark: int, priority: int) -> None:
        sample = {"prompt_token_ids": [mark], "response_token_ids": [mark, mark]}
        body = {"samples": [sample] * 2, "priority": priority, "methods": ["sparse"]}
        request = TokenRewardsRequest.model_validate(body)
        await answer_to(pipeline, request, request.samples)

    engine.gate.clear()
    first = asyncio.create_task(ask(5, 0))
    await asyncio.to_thread(engine.started.wait, 10)
    others = [asyncio.create_task(ask(mark, priority)) for mark, priority in [(7, 9), (8, 0), (9, -9)]]
    while b"densereward_queue_sequences 7.0" not in metrics.render():  # all but the one that runs
        await asyncio.sleep(0.01)
    engine.gate.set()
    await asyncio.gather(first, *others)
    await batcher.close()
    marks = [ids[1] for batch in engine.batches for ids in batch]
    assert marks[1:3] == [9, 9]
    assert marks[-2:] == [7, 7]
