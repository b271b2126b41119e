"""Each method against its paper's formula on literal numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from densereward.capture import AttentionRow, Captured, Prefixes, PrefixMode, PrefixScores
from densereward.errors import InvalidRequest
from densereward.methods import METHODS
from densereward.methods.abc import MASS_FLOOR
from densereward.methods.base import Credit, Method, Params, Response, Segment
from densereward.methods.boundaries import TextBoundaries
from densereward.methods.units import MOST_UNITS
from densereward.scoring.plans import boundaries_of, plan
from densereward_client.wire import TokenRewardsRequest
from fakes import FakeEngine
from serving import NOT_BY_A_SCORE

# Three response tokens after a prompt scored 0.25; the closing token's score, 2.0, is R.
CAPTURED = Captured(
    reward=2.0,
    length=3,
    prefixes={
        "open": Prefixes(0.25, np.array([0.5, -1.0, 1.5], np.float32)),
        "closed": Prefixes(1.0, np.array([3.0, 4.0, 2.0], np.float32)),
    },
    attention_rows={
        -1: np.array([0.1, 0.3, 0.0], np.float32),
        0: np.array([0.2, 0.0, 0.2], np.float32),
    },
)
TEXT = b"Yes. But. Ok"
TOKENS = Response(
    length=3, count=3, ids=[5, 6, 7], text_boundaries=TextBoundaries(lambda: TEXT, [(0, 4), (4, 9), (9, 12)], None)
)


def credit(name: str, captured: Captured = CAPTURED, tokens: Response = TOKENS, **params: Any) -> Credit:
    method: Method[Any] = METHODS[name]()
    return method.credit(captured, tokens, method.params_type(**params))


@pytest.mark.parametrize(
    ("first_token", "rewards", "baseline"),
    [
        ("subtract", [0.5 - 0.25, -1.0 - 0.5, 2.0 - -1.0], 0.25),
        ("zero", [0.0, -1.0 - 0.5, 2.0 - -1.0], 0.5),
        ("fold", [0.5, -1.0 - 0.5, 2.0 - -1.0], 0.0),
    ],
)
def test_red_is_the_difference_of_prefix_scores_and_the_last_token_takes_the_closing_step(
    first_token: str, rewards: list[float], baseline: float
) -> None:
    given_credit = credit("red", first_token=first_token)
    np.testing.assert_allclose(given_credit.rewards, rewards)
    assert given_credit.baseline == baseline
    assert not given_credit.warnings


@pytest.mark.parametrize(
    ("first_token", "rewards", "baseline"), [("subtract", [1.5], 0.5), ("zero", [0.0], 2.0), ("fold", [2.0], 0.0)]
)
def test_red_of_a_single_token_is_the_whole_step(first_token: str, rewards: list[float], baseline: float) -> None:
    captured = Captured(reward=2.0, length=1, prefixes={"open": Prefixes(0.5, np.array([7.0], np.float32))})
    given_credit = credit("red", captured, first_token=first_token)
    np.testing.assert_allclose(given_credit.rewards, rewards)
    assert given_credit.baseline == baseline


def test_red_reads_closed_prefixes_where_it_is_told_to() -> None:
    given_credit = credit("red", prefix_mode="closed")
    np.testing.assert_allclose(given_credit.rewards, [3.0 - 1.0, 4.0 - 3.0, 2.0 - 4.0])
    assert given_credit.baseline == 1.0
    method = METHODS["red"]()
    assert method.needs(method.params_type(prefix_mode="closed")) == {PrefixScores("closed")}


@pytest.mark.parametrize("prefix_mode", ["open", "closed"])
def test_red_in_strides_puts_the_step_of_each_stretch_on_its_last_token(prefix_mode: PrefixMode) -> None:
    scores = np.array([1.0, 2.0, 4.0, 8.0, 16.0], np.float32)
    captured = Captured(reward=20.0, length=5, prefixes={prefix_mode: Prefixes(0.5, scores)})
    given_credit = credit("red", captured, prefix_mode=prefix_mode, stride=2)
    np.testing.assert_allclose(given_credit.rewards, [0.0, 2.0 - 0.5, 0.0, 8.0 - 2.0, 20.0 - 8.0])
    assert given_credit.baseline == 0.5
    only_these = Captured(
        reward=20.0, length=5, prefixes={prefix_mode: Prefixes(0.5, scores[[1, 2, 3, 4]], boundaries=[2, 3, 4, 5])}
    )
    np.testing.assert_allclose(
        credit("red", only_these, prefix_mode=prefix_mode, stride=2).rewards, given_credit.rewards
    )


def test_closed_prefixes_are_scored_where_any_method_of_the_request_needs_them() -> None:
    def boundaries(length: int, *methods: dict[str, Any]) -> list[int] | None:
        request = TokenRewardsRequest.model_validate(
            {"samples": [{"prompt": "", "response": ""}], "methods": list(methods)}
        )
        return boundaries_of(plan(request, FakeEngine()), Response(length, length))

    by_two = {"name": "red", "prefix_mode": "closed", "stride": 2, "label": "two"}
    by_three = {"name": "red", "prefix_mode": "closed", "stride": 3, "label": "three"}
    every = {"name": "red", "prefix_mode": "closed"}
    assert boundaries(7, by_two) == [2, 4, 6, 7]
    assert boundaries(7, by_two, by_three, {"name": "abc"}) == [2, 3, 4, 6, 7]
    assert boundaries(7, by_two, every) is None
    assert boundaries(7, {"name": "red", "stride": 2}) is None  # open prefixes come all or not at all
    assert boundaries(1, by_two) == [1]
    assert boundaries(0, by_two) is None


def test_red_says_so_when_an_empty_prompt_has_no_score_to_subtract() -> None:
    captured = Captured(reward=2.0, length=2, prefixes={"open": Prefixes(None, np.array([0.5, 1.0], np.float32))})
    given_credit = credit("red", captured)
    np.testing.assert_allclose(given_credit.rewards, [0.5, 1.5])
    assert given_credit.baseline == 0.0
    assert given_credit.warnings[0].startswith("no_prompt_score:")
    assert not credit("red", captured, first_token="fold").warnings


def test_abc_shares_the_reward_out_by_the_response_part_of_the_last_row() -> None:
    given_credit = credit("abc")
    np.testing.assert_allclose(given_credit.rewards, [0.25 * 2.0, 0.75 * 2.0, 0.0], rtol=1e-6)
    assert given_credit.attention_mass == pytest.approx(0.4)
    assert given_credit.baseline == 0.0


def test_abc_averages_the_rows_of_the_layers_it_is_given() -> None:
    given_credit = credit("abc", layers=[0, -1])
    np.testing.assert_allclose(given_credit.rewards, np.array([0.15, 0.15, 0.1]) / 0.4 * 2.0, rtol=1e-6)


def test_abc_falls_back_to_uniform_and_says_so_when_nothing_was_looked_at() -> None:
    row = np.full(3, MASS_FLOOR / 4, np.float32)
    captured = Captured(reward=-3.0, length=3, attention_rows={-1: row})
    given_credit = credit("abc", captured)
    np.testing.assert_allclose(given_credit.rewards, [-1.0, -1.0, -1.0])
    assert given_credit.warnings[0].startswith("low_attention_mass:")
    silent = credit("abc", Captured(reward=-3.0, length=3, attention_rows={-1: np.zeros(3, np.float32)}))
    np.testing.assert_allclose(silent.rewards, [-1.0, -1.0, -1.0])


def test_abc_needs_the_rows_it_averages_and_red_the_prefix_scores() -> None:
    method = METHODS["abc"]()
    assert method.needs(method.params_type()) == {AttentionRow(-1)}
    assert method.needs(method.params_type(layers=[0, 3])) == {AttentionRow(0), AttentionRow(3)}
    assert METHODS["red"]().needs(METHODS["red"].params_type()) == {PrefixScores()}


@pytest.mark.parametrize(("place", "rewards"), [("spread", [1.5, 1.5, -2.0, 1.5]), ("last", [0.0, 3.0, -2.0, 1.5])])
@pytest.mark.parametrize("prefix_mode", ["open", "closed"])
def test_a_sentences_reward_is_the_step_over_it(place: str, rewards: list[float], prefix_mode: PrefixMode) -> None:
    scores = Prefixes(0.5, np.array([9.0, 3.5, 1.5, 8.0], np.float32))
    captured = Captured(reward=3.0, length=4, prefixes={prefix_mode: scores})
    response = Response(
        4, 4, text_boundaries=TextBoundaries(lambda: b"We go. They. You", [(0, 2), (2, 6), (6, 12), (12, 16)], None)
    )
    given_credit = credit("sentence", captured, response, place=place, prefix_mode=prefix_mode)
    np.testing.assert_allclose(given_credit.rewards, rewards)
    assert given_credit.baseline == 0.5
    assert given_credit.segments == (Segment(0, 2, 3.0), Segment(2, 3, -2.0), Segment(3, 4, 1.5))
    red = credit("red", captured, response, prefix_mode=prefix_mode).rewards
    np.testing.assert_allclose([given_credit.rewards[:2].sum(), *given_credit.rewards[2:]], [red[:2].sum(), *red[2:]])


def test_only_the_closed_prefixes_at_the_ends_of_sentences_are_scored() -> None:
    method = METHODS["sentence"]()
    response = Response(
        4, 4, text_boundaries=TextBoundaries(lambda: b"We go. They. You", [(0, 2), (2, 6), (6, 12), (12, 16)], None)
    )
    assert method.boundaries(response, method.params_type()) == [2, 3, 4]


@pytest.mark.parametrize("name", ["sentence", "segment"])
def test_a_text_that_cannot_be_known_is_not_cut(name: str) -> None:
    with pytest.raises(InvalidRequest, match="give `response` as text"):
        METHODS[name]().check(Response(3, 3))


def naive_messages(scores: list[float], threshold: float, tau: float) -> list[tuple[int, int]]:
    """The rule, token by token."""
    spans = []
    start = 0
    for t in range(1, len(scores)):
        crossed = (scores[t - 1] < threshold) != (scores[t] < threshold)
        if crossed or abs(scores[t] - scores[t - 1]) > tau:
            spans.append((start, t))
            start = t
    return [*spans, (start, len(scores))]


@pytest.mark.parametrize(
    ("reward", "threshold", "tau", "kept"),
    [
        (2.0, 1.0, None, [False, True, False, True]),
        (-2.0, 1.0, None, [True, False, True]),
        (2.0, 1.0, 1.5, [False, True, False, False, True]),
        (2.0, 5.0, None, [True]),
    ],
)
def test_messages_lie_between_pivots_and_the_mask_keeps_those_that_agree_with_the_reward(
    reward: float, threshold: float, tau: float | None, kept: list[bool]
) -> None:
    scores = [0.5, 0.0, 1.5, 1.25, 0.75, -1.0, 7.0]
    captured = Captured(reward=reward, length=7, prefixes={"open": Prefixes(0.25, np.array(scores, np.float32))})
    given_credit = credit("message", captured, Response(7, 7), threshold=threshold, tau=tau)
    scores[-1] = reward  # read at the closing token
    spans = naive_messages(scores, threshold, tau or float("inf"))
    assert [(each.start, each.stop) for each in given_credit.segments] == spans
    assert [each.keep for each in given_credit.segments] == kept
    assert [each.score for each in given_credit.segments] == pytest.approx(
        [sum(scores[start:stop]) / (stop - start) for start, stop in spans]
    )
    ends = [0.25, *scores]
    expected = [(ends[stop] - ends[start]) / (stop - start) for start, stop in spans for _ in range(start, stop)]
    np.testing.assert_allclose(given_credit.rewards, expected)
    assert given_credit.baseline == 0.25


def test_the_messages_threshold_is_the_mean_prefix_score_of_the_requests_samples() -> None:
    method = METHODS["message"]()
    batch = [
        Captured(2.0, 2, {"open": Prefixes(0.0, np.array([1.0, 3.0], np.float32))}),
        Captured(2.0, 1, {"open": Prefixes(None, np.array([8.0], np.float32))}),
        Captured(2.0, 0, {"open": Prefixes(0.0, np.zeros(0, np.float32))}),
    ]
    assert method.settle(batch, method.params_type()).threshold == 4.0
    assert method.settle(batch, method.params_type(threshold=-1.0)).threshold == -1.0


def test_segments_begin_where_the_entropy_is_high_and_are_worth_the_score_at_their_end() -> None:
    scores = np.array([1.0, 2.0, 4.0, 8.0, 7.0], np.float32)
    captured = Captured(reward=16.0, length=5, prefixes={"open": Prefixes(0.5, scores)})
    response = Response(5, 5, entropies=np.array([9.0, 0.0, 2.5, 2.0, 0.0]))
    given_credit = credit("segment", captured, response, entropy=2.0, slope=3.0, offset=0.25)
    values = [2.0 - (3 * np.log(2 / 5) + 0.25), 16.0 - 0.25]
    np.testing.assert_allclose(given_credit.rewards, [values[0] / 2] * 2 + [values[1] / 3] * 3)
    assert given_credit.baseline == pytest.approx(16.0 - sum(values))
    assert [(each.start, each.stop) for each in given_credit.segments] == [(0, 2), (2, 5)]


def test_the_entropies_of_the_trainers_own_tokens_cut_between_the_models() -> None:
    scores = np.array([1.0, 2.0, 4.0], np.float32)
    captured = Captured(reward=4.0, length=3, prefixes={"open": Prefixes(0.0, scores)})
    boundaries = TextBoundaries(lambda: b"abcdef", [(0, 2), (2, 4), (4, 6)], [(0, 3), (3, 6)])
    given_credit = credit(
        "segment", captured, Response(3, 2, entropies=np.array([0.0, 5.0]), text_boundaries=boundaries)
    )
    assert [(each.start, each.stop) for each in given_credit.segments] == [(0, 2), (2, 3)]


def test_segments_without_entropies_are_sentences_and_say_so() -> None:
    given_credit = credit("segment")
    assert [(each.start, each.stop) for each in given_credit.segments] == [(0, 1), (1, 2), (2, 3)]
    assert given_credit.warnings[0].startswith("no_entropies:")


def test_future_attention_is_the_mean_over_later_tokens_as_shares() -> None:
    rows = {-1: np.array([0.6, 0.2, 0.3, 0.0], np.float32), 0: np.array([0.3, 0.0, 0.1, 0.0], np.float32)}
    captured = Captured(reward=-2.0, length=4, received_attention=rows)
    means = np.array([0.45 / 3, 0.1 / 2, 0.2 / 1, 0.0])
    given_credit = credit("future_attention", captured, Response(4, 4), layers=[-1, 0])
    np.testing.assert_allclose(given_credit.rewards, means / means.sum() * -2.0, rtol=1e-6)
    alone = credit("future_attention", Captured(3.0, 1, received_attention={-1: np.zeros(1, np.float32)}))
    np.testing.assert_allclose(alone.rewards, [3.0])
    assert alone.warnings[0].startswith("low_attention:")


@pytest.mark.parametrize(
    ("rescale", "rewards", "baseline"),
    [(False, [0.5, -1.0, 0.5], 2.0), (True, [0.5 + 0.5, -1.0 + 1.0, 0.5 + 0.5], 0.0)],
)
def test_contributions_add_up_over_layers_and_the_rest_is_the_baseline_or_shared(
    rescale: bool, rewards: list[float], baseline: float
) -> None:
    layers: dict[int | None, Any] = {
        -1: np.array([0.25, -0.5, 0.5], np.float32),
        -2: np.array([0.25, -0.5, 0.0], np.float32),
    }
    captured = Captured(reward=2.0, length=3, contributions=layers)
    given_credit = credit("contribution", captured, layers=[-1, -2], rescale=rescale)
    np.testing.assert_allclose(given_credit.rewards, rewards)
    assert given_credit.baseline == baseline
    nothing = credit("contribution", Captured(2.0, 1, contributions={None: np.zeros(1, np.float32)}), rescale=rescale)
    assert (nothing.rewards.tolist(), nothing.baseline) == ([0.0], 2.0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NOT_BY_A_SCORE])
def test_rewards_scale_with_the_model_and_a_constant_moves_only_what_the_sum_moves(name: str) -> None:
    """R -> a R: every reward a-fold. R -> R + c: prefix scores move alike, so steps stay, and shares of R move."""
    scores, response = np.array([0.5, -1.0, 1.5], np.float32), replace(TOKENS, weights=np.ones(3))
    method: Method[Any] = METHODS[name]()

    def rewards(factor: float, constant: float) -> Credit:
        captured = replace(
            CAPTURED,
            reward=factor * 2.0 + constant,
            prefixes={"open": Prefixes(factor * 0.25 + constant, np.float32(factor) * scores + np.float32(constant))},
            contributions={None: np.float32(factor) * scores},
            received_attention={-1: np.array([0.5, 0.25, 0.0], np.float32)},
            gradients=scores,  # shares of R do not ask for their scale
        )
        params = method.settle([captured], method.params_type())
        variants = [Captured(factor * game(each) + constant, 0) for each in method.variants(response, params)]
        return method.credit(replace(captured, variants=list(variants)), response, params)

    plain, scaled, moved = rewards(1, 0), rewards(4, 0), rewards(1, 8)
    np.testing.assert_allclose(scaled.rewards, 4 * plain.rewards, atol=1e-6)
    assert moved.rewards.sum() + moved.baseline == pytest.approx(10.0)
    if name in ("red", "sentence", "message", "contribution", "occlusion", "shapley"):
        np.testing.assert_allclose(moved.rewards, plain.rewards, atol=1e-6)
        assert moved.baseline - plain.baseline == pytest.approx(8.0)


def test_attribution_shares_the_reward_out_by_a_softmax_or_gives_each_token_its_part() -> None:
    captured = Captured(reward=-2.0, length=3, gradients=np.log([1.0, 2.0, 5.0]).astype(np.float32))
    np.testing.assert_allclose(credit("attribution", captured).rewards, [-0.25, -0.5, -1.25], rtol=1e-6)
    signed = credit("attribution", captured, weights="signed")
    np.testing.assert_allclose(signed.rewards, np.log([1.0, 2.0, 5.0]), rtol=1e-6)
    assert signed.baseline == pytest.approx(-2.0 - np.log(10.0))


@pytest.mark.parametrize(
    ("params", "values"),
    [
        ({}, [0.05 * 2.0, 0.05 * -0.4, 0.05 * (3.0 + 0.6 - 8.0)]),
        ({"ratio_scale": 1.0}, [2.0, -0.4, 3.0 + 0.6 - 8.0]),
        ({"ratio_scale": 0.1, "ratio_clip": 0.05}, [0.05, -0.04, 0.05 + 0.05 - 0.05]),
    ],
)
def test_implicit_rewards_are_log_ratios_scaled_then_clipped_and_the_last_takes_the_closing_ones(
    params: dict[str, Any], values: list[float]
) -> None:
    captured = Captured(reward=-2.8, length=3, log_ratios=np.array([2.0, -0.4, 3.0, 0.6, -8.0], np.float32))
    given_credit = credit("implicit", captured, **params)
    np.testing.assert_allclose(given_credit.rewards, values, rtol=1e-6)
    assert given_credit.baseline == pytest.approx(-2.8 - sum(values), abs=1e-6)


@pytest.mark.parametrize("name", ["steps", "implicit"])
def test_rewards_of_steps_and_ratios_scale_with_them_and_a_constant_in_the_reward_is_left_out(name: str) -> None:
    def rewards(factor: float, constant: float) -> Credit:
        values = np.array([0.5, -1.0, 1.5], np.float32) * np.float32(factor)
        captured = Captured(factor * 2.0 + constant, 3, step_scores=values, log_ratios=values)
        return credit(name, captured, Response(3, 3, steps=[1, 2, 3]))

    plain, scaled, moved = rewards(1, 0), rewards(4, 0), rewards(1, 8)
    np.testing.assert_allclose(scaled.rewards, 4 * plain.rewards, rtol=1e-6)
    np.testing.assert_allclose(moved.rewards, plain.rewards)
    assert moved.baseline - plain.baseline == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("params", "rewards", "baseline"),
    [
        ({}, [0.0, 0.75, 0.0, 0.0, 0.25], -0.75),
        ({"form": "signed"}, [0.0, 0.5, 0.0, 0.0, -0.5], 0.25),
        ({"form": "difference"}, [0.0, 0.75, 0.0, 0.0, -0.5], 0.0),
        ({"form": "signed", "place": "spread"}, [0.25, 0.25, -1 / 6, -1 / 6, -1 / 6], 0.25),
    ],
)
def test_steps_are_rewarded_with_their_scores_at_their_ends_or_all_over(
    params: dict[str, Any], rewards: list[float], baseline: float
) -> None:
    captured = Captured(reward=0.25, length=5, step_scores=np.array([0.75, 0.25], np.float32))
    given_credit = credit("steps", captured, Response(5, 5, steps=[2, 5]), **params)
    np.testing.assert_allclose(given_credit.rewards, rewards)
    assert given_credit.baseline == pytest.approx(baseline)
    assert given_credit.segments == (Segment(0, 2, 0.75), Segment(2, 5, 0.25))


def test_contrastive_rewards_are_the_centred_sigmoid_of_the_two_log_probabilities() -> None:
    better, worse = ([-1.0, -2.0, -0.5, -0.1], [-3.0, -2.0, -400.0, -5.0])
    variants = [Captured(0.0, 3, log_probabilities=np.array(each, np.float32)) for each in (better, worse)]
    captured = Captured(reward=4.0, length=3, variants=variants)
    expected = [1 / (1 + math.exp(w - b)) - 0.5 if w - b > -300 else 0.5 for b, w in zip(better, worse, strict=True)]
    given_credit = credit("contrastive", captured)
    np.testing.assert_allclose(given_credit.rewards, [*expected[:2], expected[2] + expected[3]], rtol=1e-6)
    assert given_credit.baseline == pytest.approx(4.0 - sum(expected))


def game(ids: Sequence[int]) -> float:
    """A score that is not additive."""
    return 0.5 * sum(ids) - (3.0 if 5 in ids and 7 in ids else 0.0) + (1.0 if 6 in ids and 5 not in ids else 0.0)


def shapley_by_all_orders(ids: Sequence[int]) -> list[float]:
    """The definition, order by order."""
    values = [0.0] * len(ids)
    for order in itertools.permutations(range(len(ids))):
        for rank, unit in enumerate(order):
            before = [ids[i] for i in sorted(order[:rank])]
            after = [ids[i] for i in sorted(order[: rank + 1])]
            values[unit] += (game(after) - game(before)) / math.factorial(len(ids))
    return values


def scored(name: str, response: Response, **params: Any) -> tuple[Credit, int]:
    """A method that scores variants, on the game; how many those were."""
    method: Method[Any] = METHODS[name]()
    settled = method.params_type(**params)
    variants = method.variants(response, settled)
    captured = Captured(game(response.ids), response.length, variants=[Captured(game(each), 0) for each in variants])
    return method.credit(captured, response, settled), len(variants)


def test_occlusion_is_what_the_score_loses_without_the_unit() -> None:
    given_credit, passes = scored("occlusion", TOKENS, unit="token")
    whole = game([5, 6, 7])
    expected = [whole - game([6, 7]), whole - game([5, 7]), whole - game([5, 6])]
    np.testing.assert_allclose(given_credit.rewards, expected)
    assert given_credit.baseline == pytest.approx(whole - sum(expected))
    assert passes == 3


def test_a_word_is_left_out_with_all_its_tokens_or_blanked() -> None:
    method = METHODS["occlusion"]()
    boundaries = TextBoundaries(lambda: b"Good day", [(0, 2), (2, 4), (4, 8)], None)
    response = Response(3, 3, ids=[5, 6, 7], blank_id=9, text_boundaries=boundaries)
    assert list(method.variants(response, method.params_type())) == [[7], [5, 6]]
    assert list(method.variants(response, method.params_type(absent="blank"))) == [[9, 9, 7], [5, 6, 9]]
    with pytest.raises(InvalidRequest, match="no token for a space"):
        method.variants(replace(response, blank_id=None), method.params_type(absent="blank"))
    long = Response(MOST_UNITS + 1, MOST_UNITS + 1, ids=range(MOST_UNITS + 1))
    with pytest.raises(InvalidRequest, match="take a larger unit"):
        method.variants(long, method.params_type(unit="token"))


def test_shapley_values_of_few_units_are_exact() -> None:
    ids = [5, 6, 7, 8, 5]
    given_credit, passes = scored("shapley", Response(5, 5, ids=ids), unit="token")
    np.testing.assert_allclose(given_credit.rewards, shapley_by_all_orders(ids))
    assert given_credit.baseline == 0.0
    assert given_credit.standard_error is None
    assert passes == 2**5 - 1


def test_drawn_shapley_values_come_near_the_exact_ones_and_always_sum_to_what_the_response_adds() -> None:
    ids = [5, 6, 7, 8, 5, 9, 10, 11, 6]
    response = Response(9, 9, ids=ids)
    few, _ = scored("shapley", response, unit="token", orders=2)
    many, passes = scored("shapley", response, unit="token", orders=500)
    for each in (few, many):
        assert each.rewards.sum() + each.baseline == pytest.approx(game(ids))
    assert many.standard_error is not None
    assert few.standard_error is not None
    assert many.standard_error < few.standard_error or few.standard_error == 0
    assert np.abs(many.rewards - shapley_by_subsets(ids)).max() < 5 * many.standard_error
    assert passes < 2**9


def shapley_by_subsets(ids: Sequence[int]) -> list[float]:
    """The definition, subset by subset."""
    count = len(ids)
    values = []
    for unit in range(count):
        others = [i for i in range(count) if i != unit]
        value = 0.0
        for size in range(count):
            share = 1 / (count * math.comb(count - 1, size))
            for subset in itertools.combinations(others, size):
                after = [ids[i] for i in sorted([*subset, unit])]
                value += share * (game(after) - game([ids[i] for i in subset]))
        values.append(value)
    return values


def test_owen_values_of_words_sum_to_the_shapley_values_of_their_sentences() -> None:
    text = b"We go on. They stay at. You too of"
    spans = [(0, 2), (2, 5), (5, 9), (9, 14), (14, 19), (19, 23), (23, 27), (27, 31), (31, 34)]
    response = Response(
        9, 9, ids=[5, 6, 8, 7, 9, 10, 11, 6, 12], text_boundaries=TextBoundaries(lambda: text, spans, None)
    )
    words, _ = scored("shapley", response, within_sentences=True, orders=500)
    sentences, _ = scored("shapley", response, unit="sentence")
    sums = words.rewards.reshape(3, 3).sum(axis=1)
    assert words.standard_error is not None
    np.testing.assert_allclose(sums, sentences.rewards.reshape(3, 3).sum(axis=1), atol=15 * words.standard_error)
    assert words.rewards.sum() == pytest.approx(sentences.rewards.sum())


def test_under_gamma_1_the_returns_to_go_of_red_and_of_the_sparse_reward_differ_by_the_potential_alone() -> None:
    red, sparse = (credit(name).rewards for name in ("red", "sparse"))
    returns = [np.cumsum(each[::-1])[::-1] for each in (red, sparse)]
    potential = [0.25, 0.5, -1.0]  # the score before each token
    np.testing.assert_allclose(returns[1] - returns[0], potential)


def test_uniform_gives_every_token_of_the_trainers_the_same() -> None:
    given_credit = credit("uniform", tokens=Response(3, 5))
    np.testing.assert_allclose(given_credit.rewards, [0.4] * 5)
    assert given_credit.on == "slots"


def test_sparse_puts_everything_on_the_trainers_last_token() -> None:
    given_credit = credit("sparse", tokens=Response(3, 4))
    np.testing.assert_array_equal(given_credit.rewards, [0, 0, 0, 2.0])
    assert given_credit.on == "slots"


def test_weights_are_normalised_and_carry_the_reward() -> None:
    given_credit = credit("weights", tokens=Response(3, 3, weights=np.array([1.0, 0.0, 3.0])))
    np.testing.assert_allclose(given_credit.rewards, [0.5, 0.0, 1.5])
    assert given_credit.on == "slots"


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [1.0, -1.0, 2.0], None, [1e308, 1e308, 1e308]])
def test_weights_that_share_nothing_out_are_refused_before_anything_runs(weights: list[float] | None) -> None:
    tokens = Response(3, 3, weights=None if weights is None else np.array(weights))
    with np.errstate(over="ignore"), pytest.raises(InvalidRequest, match="weights"):
        METHODS["weights"]().check(tokens)


@pytest.mark.parametrize("name", list(METHODS))
@given(
    scores=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    reward=st.floats(-50, 50, width=32),
    before=st.one_of(st.none(), st.floats(-50, 50, width=32)),
    seed=st.integers(0, 2**32 - 1),
)
def test_rewards_and_baseline_sum_to_the_sequences_reward(
    name: str, scores: list[float], reward: float, before: float | None, seed: int
) -> None:
    length = len(scores)
    row = np.random.default_rng(seed).random(length).astype(np.float32) / length
    captured = Captured(
        reward,
        length,
        prefixes={"open": Prefixes(before, np.array(scores, np.float32))},
        attention_rows={-1: row},
        contributions={None: row - np.float32(0.5 / length)},
        received_attention={-1: row},
        gradients=row - np.float32(0.5 / length),
        step_scores=row,
        log_ratios=np.append(row - np.float32(0.5 / length), np.array([0.25, -3.0], np.float32)),
    )
    weights = row.astype(np.float64) + 1e-9
    spans = [(i, i + 1) for i in range(length)]
    boundaries = TextBoundaries(lambda: b"a. B" * length, spans, None)
    method: Method[Any] = METHODS[name]()
    ids = list(range(length))
    steps = range(1, length + 1)
    response = Response(
        length, length, ids, weights=weights, entropies=weights * 50, text_boundaries=boundaries, steps=steps
    )
    params = method.settle([captured], method.params_type())
    random = np.random.default_rng(seed)
    variants = [
        Captured(random.normal(), 0, log_probabilities=np.float32(-1) * random.random(length + 2, np.float32))
        for _ in [*method.variants(response, params), *method.instructions(params)]
    ]
    given_credit = method.credit(replace(captured, variants=variants), response, params)
    assert given_credit.rewards.shape == (length,)
    total = given_credit.rewards.sum() + given_credit.baseline
    assert total == pytest.approx(reward, abs=1e-9 * max(1.0, float(np.abs(given_credit.rewards).sum())))


@pytest.mark.parametrize("name", list(METHODS))
def test_the_share_of_the_dense_reward_lies_between_0_and_1_and_unknown_parameters_are_refused(name: str) -> None:
    kind: type[Params] = METHODS[name].params_type
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValidationError):
            kind(beta=beta)
    with pytest.raises(ValidationError):
        kind.model_validate({"betta": 0.5})


def test_the_papers_defaults() -> None:
    assert METHODS["abc"].params_type().beta == 0.8
    assert METHODS["red"].params_type().beta == 1.0
    assert METHODS["red"].params_type().first_token == "subtract"
