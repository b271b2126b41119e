"""The experiment in client/examples/ppo_evidence, made tiny: its arithmetic, its loop, its logs and its report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaModel

import tiny
from densereward_client import Client, DenseRewardError
from examples.ppo_evidence import report, run, start
from examples.ppo_evidence.judge import Judge
from examples.ppo_evidence.judge import serving as judge_serving
from examples.ppo_evidence.policy import Policy, Responses
from examples.ppo_evidence.ppo import Moments, Settings, advantages
from serving import serving

SETTINGS = Settings(tokens=6, batch=4, warm_up=1, warm_up_epochs=1)
STEPS = 2


@pytest.fixture(scope="module")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server") / "log", "--model", str(tiny_llama)) as server:
        yield server.url


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    decoder = tiny.make_model("llama", 1, AutoModel, num_hidden_layers=4)
    assert isinstance(decoder, LlamaModel)
    kept, openings = list(range(2, 300)), [[40, 41], [50, 51], [60, 61]]
    start.save(folder, decoder, start.Facts(begin=1, end=2, kept=kept, openings=openings, judge_prompt=[0, 5]))
    return folder


@pytest.fixture
def place(url: str, policy_folder: Path, tmp_path: Path) -> run.Place:
    return run.Place(policy_folder, tmp_path / "logs", url, Moments(0.0, 1.0), precision="float32")


def a_run(method: str, seed: int = 0, study: str = "main") -> run.Run:
    return run.Run(study, method, run.Plan().methods[method], seed, STEPS, SETTINGS)


def responses(policy: Policy, ids: list[list[int]], lengths: list[int]) -> Responses:
    mask = torch.arange(len(ids[0])) < torch.tensor(lengths)[:, None]
    return Responses(torch.tensor(ids), torch.tensor(ids) - 2, mask)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_advantages_are_the_sums_that_define_them(gae_lambda: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    lengths = [7, 1, 4, 6, 2]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    found = advantages(rewards, values, mask, gae_lambda)
    for row, length in enumerate(lengths):
        value = [*values[row, :length].tolist(), 0.0]
        for token in range(7):
            later = range(token, length)
            errors = [float(rewards[row, k]) + value[k + 1] - value[k] for k in later]
            expected = sum(gae_lambda**k * error for k, error in enumerate(errors))
            assert float(found[row, token]) == pytest.approx(expected, abs=1e-5)


def test_a_start_reads_the_same_whole_and_in_parts(policy_folder: Path) -> None:
    decoder, facts = start.load(policy_folder)
    policy = Policy(decoder, facts, precision=torch.float32)
    generator = torch.Generator().manual_seed(0)
    written = policy.sample(policy.openings, 6, generator)
    assert written.ids.shape == (3, 6)
    ids = torch.cat([torch.full((3, 1), facts.begin), policy.openings, written.ids[:, :-1]], dim=1)
    with torch.no_grad():
        hidden = decoder(input_ids=ids).last_hidden_state[:, -6:]
        expected = hidden @ decoder.embed_tokens.weight[facts.kept].T
        found = policy.logits(policy.upper, policy.read(policy.openings, written), 6)
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_follows_the_end_is_no_part_of_a_text(policy_folder: Path) -> None:
    decoder, facts = start.load(policy_folder)
    policy = Policy(decoder, replace(facts, kept=[2, 7]), precision=torch.float32)
    written = policy.sample(policy.openings, 12, torch.Generator().manual_seed(0))
    for ids, mask in zip(written.ids.tolist(), written.mask.tolist(), strict=True):
        length = ids.index(2) + 1 if 2 in ids else 12
        assert mask == [token < length for token in range(12)]


@pytest.mark.parametrize("method", ["sparse", "abc 1", "red closed", "contribution"])
def test_token_rewards_lie_on_the_texts_and_sum_to_the_score(url: str, policy_folder: Path, method: str) -> None:
    policy = Policy(*start.load(policy_folder))
    written = responses(policy, [[30, 31, 32, 33], [34, 2, 35, 36]], [4, 2])
    with Client(url) as client:
        judged = Judge(client, policy.facts, run.Plan().methods[method])(policy.openings[:2], written)
    assert not judged.rewards[1, 2:].any()
    if method in ("sparse", "abc 1"):
        assert judged.rewards.sum(1).tolist() == pytest.approx(judged.scores.tolist(), abs=1e-4)


def test_sparse_less_its_prompt_sums_to_what_red_sums_to(url: str, policy_folder: Path) -> None:
    policy = Policy(*start.load(policy_folder))
    written = responses(policy, [[30, 31, 32], [34, 2, 35]], [3, 2])
    with Client(url) as client:
        red, sparse = (
            Judge(client, policy.facts, run.Plan().methods[name])(policy.openings[:2], written).rewards
            for name in ("red open", "sparse less prompt")
        )
    assert red.sum(1).tolist() == pytest.approx(sparse.sum(1).tolist(), abs=1e-4)
    assert sparse[0, 2] != 0
    assert sparse[1, 1] != 0
    assert not sparse[0, :2].any()
    assert not sparse[1, [0, 2]].any()


def test_a_run_is_logged_repeated_to_the_digit_and_not_run_again(
    place: run.Place, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = a_run("red open")
    run.execute(asked, place)
    head, *steps = run.read_log(run.log_path(place.logs, asked))
    assert head["settings"]["tokens"] == SETTINGS.tokens
    assert [step["step"] for step in steps] == [0, 1]
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert steps[1]["kl"] != 0
    assert all(np.isfinite([step[name] for name in ("reward", "entropy", "explained")]).all() for step in steps)
    elsewhere = replace(place, logs=place.logs / "again")
    run.execute(asked, elsewhere)
    again = run.read_log(run.log_path(elsewhere.logs, asked))[1:]
    assert [step["reward"] for step in again] == pytest.approx([step["reward"] for step in steps], abs=1e-3)
    run.run_all([asked], place, workers=1)
    assert "1 runs, 0 to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with another settings"):
        run.is_finished(place.logs, replace(asked, settings=replace(SETTINGS, kl=1.0)))


def test_a_server_that_fails_ends_the_run(place: run.Place) -> None:
    policy = Policy(*start.load(place.policy))
    with Client(place.url) as client, pytest.raises(DenseRewardError):
        Judge(client, policy.facts, {"name": "no such method"})(policy.openings[:1], responses(policy, [[30, 31]], [2]))
    assert not list(place.logs.glob("*"))


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not become ready"), judge_serving(tmp_path / "log", "--no-such-flag"):
        pass


def test_the_report_reads_what_is_there(place: run.Place, tmp_path: Path) -> None:
    report.write_report(place.logs, tmp_path)
    assert "No run of the main study" in (tmp_path / "evidence.md").read_text()
    for method, seed in (("sparse", 0), ("sparse", 1), ("abc 1", 0)):
        run.execute(a_run(method, seed), place)
    run.execute(replace(a_run("sparse", 0, "lambda"), settings=replace(SETTINGS, gae_lambda=1.0)), place)
    run.execute(a_run("sparse", 100, "tune-1"), place)
    report.write_report(place.logs, tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    for expected in ("sparse 2", "abc 1 1", "gae_lambda = 1.0", "Tuning", "Differences to `sparse`"):
        assert expected in text
    ElementTree.parse(tmp_path / "evidence.svg")  # our own


def test_a_sign_test_is_two_sided() -> None:
    assert report.sign_test([1.0] * 8) == pytest.approx(2 / 256)
    assert report.sign_test([1.0, -1.0]) == 1.0


def test_the_plan_names_methods_and_settings_that_there_are() -> None:
    plan = run.Plan()
    assert all(runs for runs in (plan.runs([name]) for name in plan.studies))
