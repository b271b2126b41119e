"""Each method against its paper's formula on literal numbers."""

from __future__ import annotations

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
from densereward.methods.base import Credit, Method, Params, TrainerTokens
from densereward.plans import boundaries_of, plan
from densereward_client.wire import TokenRewardsRequest
from fakes import FakeEngine

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
TOKENS = TrainerTokens(count=3)


def credit(name: str, captured: Captured = CAPTURED, tokens: TrainerTokens = TOKENS, **params: Any) -> Credit:
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
        return boundaries_of(plan(request, FakeEngine()), length)

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


def test_uniform_gives_every_token_of_the_trainers_the_same() -> None:
    given_credit = credit("uniform", tokens=TrainerTokens(count=5))
    np.testing.assert_allclose(given_credit.rewards, [0.4] * 5)
    assert given_credit.on == "slots"


def test_sparse_puts_everything_on_the_trainers_last_token() -> None:
    given_credit = credit("sparse", tokens=TrainerTokens(count=4))
    np.testing.assert_array_equal(given_credit.rewards, [0, 0, 0, 2.0])
    assert given_credit.on == "slots"


def test_weights_are_normalised_and_carry_the_reward() -> None:
    given_credit = credit("weights", tokens=TrainerTokens(3, np.array([1.0, 0.0, 3.0])))
    np.testing.assert_allclose(given_credit.rewards, [0.5, 0.0, 1.5])
    assert given_credit.on == "slots"


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [1.0, -1.0, 2.0], None, [1e308, 1e308, 1e308]])
def test_weights_that_share_nothing_out_are_refused_before_anything_runs(weights: list[float] | None) -> None:
    tokens = TrainerTokens(3, None if weights is None else np.array(weights))
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
    captured = Captured(reward, length, {"open": Prefixes(before, np.array(scores, np.float32))}, {-1: row})
    given_credit = credit(name, captured, TrainerTokens(length, row.astype(np.float64) + 1e-9))
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
