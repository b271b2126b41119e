"""Methods of a request: the default, several, their parameters and names, and what `include` adds."""

from __future__ import annotations

import base64
import itertools
import time
from typing import Any

import numpy as np
import pytest

from densereward.methods import METHODS
from serving import NOT_BY_A_SCORE, STEP, Api, Json, Server

SAMPLE: Json = {"prompt_token_ids": [5, 6, 7], "response_token_ids": [10, 11, 12, 13]}
NAMES = ", ".join(METHODS)
SERVED = [name for name in METHODS if name not in NOT_BY_A_SCORE]
TEXT: Json = {"prompt": "Well?\n", "response": "The dog is lazy. The fox is quick! Thank you"}


def rewards(item: Json, method: str) -> Any:
    return pytest.approx(item["token_rewards"][method], abs=STEP)


def test_red_is_the_default(api: Api) -> None:
    assert api.item(SAMPLE) == api.item(SAMPLE, methods=["red"]) == api.item(SAMPLE, methods=None)


def test_several_methods_share_one_forward_pass(api: Api) -> None:
    one = api.answer([SAMPLE])
    several = api.answer([SAMPLE], methods=["red", "abc", "uniform", "sparse"])
    assert several["usage"] == one["usage"]
    [item] = several["data"]
    assert item["reward"] == pytest.approx(one["data"][0]["reward"], abs=1e-6)
    assert list(item["token_rewards"]) == list(item["baseline"]) == ["red", "abc", "uniform", "sparse"]
    assert item["attention_mass"].keys() == {"abc"}
    assert rewards(item, "uniform") == [item["reward"] / 4] * 4
    assert item["token_rewards"]["sparse"] == pytest.approx([0, 0, 0, item["reward"]])
    assert len({tuple(values) for values in item["token_rewards"].values()}) == 4


def test_red_is_the_differences_of_the_prefix_scores(api: Api) -> None:
    item = api.item(SAMPLE, include=["prefix_scores"])
    scores = [item["prompt_score"], *item["prefix_scores"][:-1], item["reward"]]
    assert rewards(item, "red") == np.diff(scores).tolist()
    assert item["baseline"]["red"] == item["prompt_score"]


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_red_takes_the_steps_between_the_rewards_of_the_cut_responses(api: Api, mode: str) -> None:
    ids = SAMPLE["response_token_ids"]
    prefixes = [SAMPLE | {"response_token_ids": ids[:length], "finished": mode == "closed"} for length in range(4)]
    scores = [item["reward"] for item in api.items([*prefixes, SAMPLE], "/rewards")]
    item = api.item(SAMPLE, methods=[{"name": "red", "prefix_mode": mode}])
    assert rewards(item, "red") == np.diff(scores).tolist()
    assert item["baseline"]["red"] == pytest.approx(scores[0], abs=1e-6)


@pytest.mark.parametrize(("first_token", "baseline"), [("subtract", "s_0"), ("zero", "s_1"), ("fold", "nothing")])
def test_red_treats_the_first_token_as_asked(api: Api, first_token: str, baseline: str) -> None:
    item = api.item(SAMPLE, methods=[{"name": "red", "first_token": first_token}], include=["prefix_scores"])
    left_out = {"s_0": item["prompt_score"], "s_1": item["prefix_scores"][0], "nothing": 0.0}[baseline]
    assert item["baseline"]["red"] == pytest.approx(left_out, abs=1e-6)
    first = item["prefix_scores"][0] - left_out
    assert item["token_rewards"]["red"][0] == pytest.approx(first, abs=STEP)


def test_abc_is_the_attention_row_times_the_reward(api: Api) -> None:
    item = api.item(SAMPLE, methods=[{"name": "abc", "beta": 1}], include=["attention"])
    row = np.array(item["attention"])
    assert item["attention_mass"]["abc"] == pytest.approx(row.sum(), abs=1e-6)
    assert rewards(item, "abc") == (row / row.sum() * item["reward"]).tolist()


def test_beta_gives_the_rest_to_the_last_token(api: Api) -> None:
    half = {"name": "uniform", "beta": 0.5}
    item = api.item(SAMPLE, methods=[half])
    each = item["reward"] / 8
    assert rewards(item, "uniform") == [each, each, each, each + item["reward"] / 2]


def test_a_label_lets_one_method_be_asked_for_twice(api: Api) -> None:
    item = api.item(
        SAMPLE, methods=["abc", {"name": "abc", "beta": 0, "label": "end"}, {"name": "sparse", "label": ""}]
    )
    assert item["token_rewards"].keys() == item["baseline"].keys() == {"abc", "end", "sparse"}
    assert item["token_rewards"]["end"] == item["token_rewards"]["sparse"]
    assert item["attention_mass"].keys() == {"abc", "end"}


def test_abc_averages_the_layers_it_is_asked_for(api: Api) -> None:
    rows = [api.item(SAMPLE, methods=[{"name": "abc", "layers": layers}]) for layers in ([0], [2], [0, 2], "last")]
    masses = [item["attention_mass"]["abc"] for item in rows]
    assert masses[2] == pytest.approx((masses[0] + masses[1]) / 2, abs=1e-6)
    assert masses[3] == pytest.approx(masses[1], abs=1e-6)
    assert masses[0] != pytest.approx(masses[1], abs=1e-3)


@pytest.mark.parametrize(
    ("include", "keys"),
    [
        ("tokens", {"tokens"}),
        ("spans", {"spans"}),
        ("prefix_scores", {"prefix_scores", "prompt_score"}),
        ("attention", {"attention"}),
        ("segments", {"segments"}),
    ],
)
def test_include_adds_only_what_it_names(api: Api, include: str, keys: set[str]) -> None:
    bare, item = api.item(SAMPLE), api.item(SAMPLE, include=[include])
    assert item.keys() - bare.keys() == keys
    assert {key: item[key] for key in bare} == bare


def test_everything_can_be_included_at_once(api: Api) -> None:
    item = api.item(SAMPLE, include=["tokens", "spans", "prefix_scores", "attention", "segments"])
    assert {len(item[key]) for key in ("tokens", "spans", "prefix_scores", "attention")} == {4}
    assert 0 < sum(item["attention"]) < 1


def test_base64_carries_the_same_numbers_as_lists(api: Api) -> None:
    request: Json = {"methods": ["red", "abc"], "include": ["prefix_scores", "attention"]}
    plain, packed = api.item(SAMPLE, **request), api.item(SAMPLE, encoding_format="base64", **request)
    for item in (plain, packed):
        item |= item.pop("token_rewards")
    arrays = ("red", "abc", "prefix_scores", "attention")
    unpacked = {key: np.frombuffer(base64.b64decode(packed.pop(key)), "<f4") for key in arrays}
    for key, array in unpacked.items():
        assert np.array_equal(array, np.array(plain.pop(key), "f4"))
    assert packed == plain


@pytest.mark.parametrize(
    ("methods", "code", "message"),
    [
        (["redd"], "unknown_method", f"no method named 'redd'; there are {NAMES}"),
        (["red", "red"], "repeated_method", "methods: red asked for twice; give each a `label` of its own"),
        (
            ["red", {"name": "abc", "label": "red"}],
            "repeated_method",
            "methods: red asked for twice; give each a `label` of its own",
        ),
        ([{"name": "red", "bta": 1}], "invalid_params", "method red: bta: Extra inputs are not permitted"),
        (
            [{"name": "abc", "beta": 1.5}],
            "invalid_params",
            "method abc: beta: Input should be less than or equal to 1",
        ),
        (
            [{"name": "red", "first_token": "add"}],
            "invalid_params",
            "method red: first_token: Input should be 'subtract', 'zero' or 'fold'",
        ),
        ([], "invalid_request", "methods: List should have at least 1 item after validation, not 0"),
        ("red", "invalid_request", "methods: Input should be a valid array"),
        (
            [{"beta": 1}],
            "invalid_request",
            "methods.0.str: Input should be a valid string; methods.0.MethodRequest.name: Field required",
        ),
    ],
)
def test_methods_that_cannot_be_served_are_refused(api: Api, methods: Any, code: str, message: str) -> None:
    expected = {"code": code, "message": message, "details": {"field": "methods"}}
    assert api.refusal([SAMPLE], methods=methods) == (422, expected)


def test_sentences_carry_the_sum_of_reds_rewards_over_them(api: Api) -> None:
    item = api.item(TEXT, methods=["red", "sentence"], include=["segments", "spans"])
    red, segments = item["token_rewards"]["red"], item["segments"]["sentence"]
    assert [TEXT["response"].encode()[: item["spans"][each["end"] - 1][1]].decode()[-1] for each in segments] == list(
        ".!u"
    )
    for each in segments:
        steps = red[each["start"] : each["end"]]
        assert each["score"] == pytest.approx(sum(steps), abs=STEP)
        shares = item["token_rewards"]["sentence"][each["start"] : each["end"]]
        assert shares == pytest.approx([sum(steps) / len(steps)] * len(steps), abs=STEP)
    assert item["baseline"]["sentence"] == item["baseline"]["red"]


def test_closed_sentences_score_the_response_cut_after_each(api: Api) -> None:
    cuts = ["", "The dog is lazy.", "The dog is lazy. The fox is quick!", TEXT["response"]]
    scores = [item["reward"] for item in api.items([TEXT | {"response": cut} for cut in cuts], "/rewards")]
    item = api.item(TEXT, methods=[{"name": "sentence", "prefix_mode": "closed"}], include=["segments"])
    assert [each["score"] for each in item["segments"]["sentence"]] == pytest.approx(np.diff(scores).tolist(), abs=STEP)


def test_messages_give_a_mask_on_the_trainers_own_tokens(api: Api) -> None:
    spans = [[0, 3], [3, 16], [16, 34], [34, 44]]
    trainer_mask = [1, 1, 0, 1]
    sample = TEXT | {"response_spans": spans, "response_mask": trainer_mask}
    threshold = api.item(TEXT, "/rewards")["reward"] - 0.01
    asked = {"name": "message", "threshold": threshold}
    item = api.item(sample, methods=[asked], include=["segments"])
    segments = item["segments"]["message"]
    assert [segments[0]["start"], segments[-1]["end"]] == [0, 4]
    assert all(first["end"] == second["start"] for first, second in itertools.pairwise(segments))
    kept = [each["keep"] for each in segments for _ in range(each["start"], each["end"])]
    assert item["mask"]["message"] == [int(keep and mask) for keep, mask in zip(kept, trainer_mask, strict=True)]


def test_entropies_cut_segments(api: Api) -> None:
    sample = SAMPLE | {"token_entropies": [0.1, 3.0, 0.2, 0.1]}
    item = api.item(sample, methods=["segment"], include=["segments", "prefix_scores"])
    values = [item["prefix_scores"][0], item["reward"]]
    assert item["token_rewards"]["segment"] == pytest.approx([values[0], *[values[1] / 3] * 3], abs=STEP)
    assert [each["score"] for each in item["segments"]["segment"]] == pytest.approx(values, abs=STEP)


def test_contributions_and_what_they_leave_out_are_the_reward(api: Api) -> None:
    item = api.item(TEXT, methods=["contribution", {"name": "contribution", "rescale": True, "label": "all of it"}])
    rewards = item["token_rewards"]
    assert min(rewards["contribution"]) < 0 < max(rewards["contribution"])
    assert sum(rewards["contribution"]) + item["baseline"]["contribution"] == pytest.approx(item["reward"], abs=STEP)
    assert sum(rewards["all of it"]) == pytest.approx(item["reward"], abs=STEP)
    assert item["baseline"]["all of it"] == 0


@pytest.mark.parametrize("absent", ["remove", "blank"])
def test_occlusion_scores_the_response_without_each_sentence(api: Api, absent: str) -> None:
    asked = {"name": "occlusion", "unit": "sentence", "absent": absent}
    item = api.item(TEXT, methods=[asked, "red"], include=["segments"])
    assert item["passes"] == {"occlusion": 4}
    values = [each["score"] for each in item["segments"]["occlusion"]]
    if absent == "remove":
        without = [" The fox is quick! Thank you", "The dog is lazy. Thank you", "The dog is lazy. The fox is quick!"]
        scores = [each["reward"] for each in api.items([TEXT | {"response": text} for text in without], "/rewards")]
        assert values == pytest.approx([item["reward"] - score for score in scores], abs=STEP)
    assert sum(item["token_rewards"]["occlusion"]) == pytest.approx(sum(values), abs=STEP)


def test_shapley_values_sum_to_what_the_response_adds_to_an_empty_one(api: Api) -> None:
    empty = api.item(TEXT | {"response": ""}, "/rewards")["reward"]
    exact, drawn = {"name": "shapley", "unit": "sentence"}, {"name": "shapley", "label": "words"}
    answer = api.answer([TEXT], methods=[exact, drawn])
    [item] = answer["data"]
    for name in ("shapley", "words"):
        assert sum(item["token_rewards"][name]) == pytest.approx(item["reward"] - empty, abs=STEP)
        assert item["baseline"][name] == pytest.approx(empty, abs=STEP)
    assert item["passes"]["shapley"] == 8
    assert 8 < item["passes"]["words"] <= 1 + 2 * 4 * 9
    assert item["standard_error"].keys() == {"words"}
    assert answer["usage"]["forward_tokens"] > sum(item["passes"].values())


def test_a_response_with_too_many_units_is_refused_in_its_place(api: Api) -> None:
    long = TEXT | {"response": "a " * 600}
    first, second = api.items([TEXT, long], methods=["occlusion"], on_error="item")
    assert "error" not in first
    assert second["error"]["code"] == "too_many_units"


def test_everything_can_be_divided_by_the_spread_of_the_rewards_so_far(api: Api) -> None:
    samples = [SAMPLE | {"response_token_ids": [10 + i, 11, 12]} for i in range(20)]
    given = {"name": "red", "normalize": 2.5}
    running = {"name": "red", "normalize": "running", "label": "running"}
    [item, *_] = api.items(samples, methods=["sparse", given, running])
    assert item["scale"]["red"] == 0.4
    assert item["scale"]["running"] > 0
    for name, scale in item["scale"].items():
        total = sum(item["token_rewards"][name]) + item["baseline"][name]
        assert total == pytest.approx(scale * item["reward"], abs=STEP)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "red", "normalize": 1e-40},
        {"name": "red", "clip": 1e39},
        {"name": "segment", "offset": 1e308},
        {"name": "message", "threshold": -1e300},
        {"name": "contribution", "layers": [-1, 2]},
        {"name": "abc", "layers": [0, 0]},
    ],
    ids=str,
)
def test_parameters_that_would_give_no_numbers_or_count_twice_are_refused(api: Api, method: Json) -> None:
    status, error = api.refusal([SAMPLE], methods=[method])
    assert (status, error["code"]) == (422, "invalid_params")


def test_more_variants_than_the_queue_holds_are_refused_before_all_are_made(api: Api) -> None:
    long = TEXT | {"response": "word " * 120}
    started = time.perf_counter()
    status, error = api.refusal([long] * 40, methods=[{"name": "shapley", "orders": 30}])
    assert (status, error["code"]) == (413, "too_large")
    assert "send fewer samples" in error["message"]
    assert time.perf_counter() - started < 20
    status, error = api.refusal([long], methods=[{"name": "shapley", "orders": 1000}])
    assert (status, error["code"]) == (422, "too_many_units")


def test_what_is_clipped_is_told(api: Api) -> None:
    item = api.item(SAMPLE, methods=["red", {"name": "red", "clip": 0.01, "label": "clipped"}])
    red, clipped = (np.array(item["token_rewards"][name]) for name in ("red", "clipped"))
    np.testing.assert_allclose(clipped, red.clip(-0.01, 0.01), atol=1e-7)
    assert item["clipped"] == {"clipped": pytest.approx((red - clipped).sum(), abs=STEP)}
    assert item["baseline"]["clipped"] == pytest.approx(item["baseline"]["red"] + item["clipped"]["clipped"], abs=STEP)


def test_the_methods_are_told(server: Server) -> None:
    listed = server.get("/v1/methods").json()
    assert [each["name"] for each in listed["data"]] == list(METHODS)
    red = listed["data"][0]
    assert "2411.08302" in red["source"]
    assert red["parameters"]["stride"]["default"] == 1


def test_a_layer_that_is_not_there_is_refused_and_what_would_work_is_named(api: Api) -> None:
    expected = {
        "code": "method_unavailable",
        "message": "this model cannot give AttentionRow(layer=3); with default parameters it can serve "
        + ", ".join(SERVED),
        "details": {"field": "methods", "available": SERVED},
    }
    assert api.refusal([SAMPLE], methods=[{"name": "abc", "layers": [3]}]) == (422, expected)
