"""The experiment in client/examples/ppo_evidence, made tiny: its loop, its judge and its logs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaModel

import tiny
from densereward_client import Client, DenseRewardError, TokenRewardsResponse
from examples.ppo_evidence import run, start
from examples.ppo_evidence.judge import Judge, Judged
from examples.ppo_evidence.judge import serving as judge_serving
from examples.ppo_evidence.logs import log_path, read_log
from examples.ppo_evidence.plan import Plan, Run
from examples.ppo_evidence.policy import Policy, Responses
from examples.ppo_evidence.ppo import Moments, Settings, advantages
from examples.ppo_evidence.report import write_report
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
def setup(url: str, policy_folder: Path, tmp_path: Path) -> run.Setup:
    with Client(url) as client:
        model = Judge(client, start.load(policy_folder)[1], {"name": "sparse"}).fingerprint()
    moments, policy = Moments(0.0, 1.0), start.fingerprint(policy_folder)
    return run.Setup(policy_folder, tmp_path / "logs", url, moments, model, policy, precision="float32")


def a_run(method: str, seed: int = 0, study: str = "main") -> Run:
    return Run(study, method, Plan().methods[method], seed, STEPS, SETTINGS)


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


def judged(url: str, policy_folder: Path, method: str, ids: list[list[int]], lengths: list[int]) -> Judged:
    """What a method makes of these continuations of one opening, so that all have one s_0."""
    policy = Policy(*start.load(policy_folder))
    with Client(url) as client:
        judge = Judge(client, policy.facts, Plan().methods[method])
        return judge(policy.openings[:1].repeat(len(ids), 1), responses(policy, ids, lengths))


TEXTS, LENGTHS = [[30, 31, 32, 33], [34, 2, 35, 36], [80, 90, 100, 110], [7, 200, 44, 2]], [4, 2, 4, 4]


@pytest.mark.parametrize("method", Plan().studies["main"]["methods"])
def test_the_methods_of_the_main_study_share_out_r_itself_but_for_a_baseline(
    url: str, policy_folder: Path, method: str
) -> None:
    found = judged(url, policy_folder, method, TEXTS, LENGTHS)
    assert not found.rewards[1, 2:].any()
    sums, scores = found.rewards.sum(1), found.scores
    assert (sums + found.baselines).tolist() == pytest.approx(scores.tolist(), abs=1e-4)
    assert scores.std() > 0.05
    assert (sums - sums.mean()).tolist() == pytest.approx((scores - scores.mean()).tolist(), abs=1e-4)


def test_plain_contribution_pays_on_another_scale(url: str, policy_folder: Path) -> None:
    found = judged(url, policy_folder, "contribution unscaled", TEXTS, LENGTHS)
    assert not torch.allclose(found.rewards.sum(1).std(), found.scores.std(), rtol=0.02)


def test_a_text_that_was_cut_is_read_as_its_closed_prefixes_are(url: str, policy_folder: Path) -> None:
    whole, cut = (judged(url, policy_folder, "red closed", TEXTS[:1], [length]) for length in (4, 3))
    assert whole.rewards[0, :3].tolist() == pytest.approx(cut.rewards[0, :3].tolist(), abs=1e-5)
    assert float(whole.rewards[0, 3]) == pytest.approx(float(whole.scores[0] - cut.scores[0]), abs=1e-5)


class Doctored(Client):
    """A client whose answers lose or gain something on the way."""

    item: dict[str, Any]

    def token_rewards(self, *given: Any, **named: Any) -> TokenRewardsResponse:
        answer = super().token_rewards(*given, **named)
        items = [item.model_copy(update=self.item) for item in answer.data]
        return answer.model_copy(update={"data": items})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"reward": None}, "no reward for text 0"),
        ({"baseline": {}}, "no baseline for text 0"),
        ({"prompt_score": None}, "no prompt_score for text 0"),
        ({"warnings": ["unfinished: read open"]}, "read another thing.*unfinished"),
        ({"warnings": ["no_prompt_score: s_0 = 0"]}, "read another thing.*no_prompt_score"),
    ],
)
def test_a_missing_number_and_another_reading_are_refused(
    url: str, policy_folder: Path, item: dict[str, Any], message: str
) -> None:
    policy = Policy(*start.load(policy_folder))
    with Doctored(url) as client:
        client.item = item
        judge = Judge(client, policy.facts, Plan().methods["sparse less prompt"])
        with pytest.raises(RuntimeError, match=message):
            judge(policy.openings[:1], responses(policy, [[30, 31]], [2]))


def test_a_warning_that_leaves_the_reading_as_it_is_is_counted(url: str, policy_folder: Path) -> None:
    policy = Policy(*start.load(policy_folder))
    with Doctored(url) as client:
        client.item = {"warnings": ["low_attention_mass: 1e-12"]}
        found = Judge(client, policy.facts, {"name": "abc"})(
            policy.openings[:2], responses(policy, [[30], [31]], [1, 1])
        )
    assert found.warnings == {"low_attention_mass": 2}


def test_another_reward_model_is_refused(url: str, policy_folder: Path) -> None:
    policy = Policy(*start.load(policy_folder))
    with Client(url) as client:
        judge = Judge(client, policy.facts, {"name": "sparse"}, fingerprint="fp-other")
        with pytest.raises(RuntimeError, match="this run is of fp-other"):
            judge(policy.openings[:1], responses(policy, [[30, 31]], [2]))


def test_sparse_less_its_prompt_sums_to_what_red_sums_to(url: str, policy_folder: Path) -> None:
    policy = Policy(*start.load(policy_folder))
    written = responses(policy, [[30, 31, 32], [34, 2, 35]], [3, 2])
    with Client(url) as client:
        red, sparse = (
            Judge(client, policy.facts, Plan().methods[name])(policy.openings[:2], written).rewards
            for name in ("red open", "sparse less prompt")
        )
    assert red.sum(1).tolist() == pytest.approx(sparse.sum(1).tolist(), abs=1e-4)
    assert sparse[0, 2] != 0
    assert sparse[1, 1] != 0
    assert not sparse[0, :2].any()
    assert not sparse[1, [0, 2]].any()


def test_a_run_is_logged_repeated_to_the_digit_and_not_run_again(
    setup: run.Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = a_run("red open")
    run.run_all([planned], setup, workers=1)
    assert "1/1 main, red open, seed 0" in capsys.readouterr().out
    head, *steps = read_log(log_path(setup.logs, planned))
    assert head["settings"]["tokens"] == SETTINGS.tokens
    assert [step["step"] for step in steps] == [0, 1]
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert steps[1]["kl"] != 0
    assert all(np.isfinite([step[name] for name in ("reward", "entropy", "explained")]).all() for step in steps)
    elsewhere = replace(setup, logs=setup.logs / "again")
    run.execute(planned, elsewhere)
    again = read_log(log_path(elsewhere.logs, planned))[1:]
    assert [step["reward"] for step in again] == pytest.approx([step["reward"] for step in steps], abs=1e-3)
    run.run_all([planned], setup, workers=1)
    assert "1 runs, 0 to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with another settings"):
        run.is_finished(replace(planned, settings=replace(SETTINGS, kl=1.0)), setup)
    others = {
        "moments": replace(setup, moments=Moments(1.0, 1.0)),
        "model": replace(setup, model="fp-other"),
        "start": replace(setup, start="other"),
        "precision": replace(setup, precision="bfloat16"),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"was made with another {name};"):
            run.is_finished(planned, other)


def test_a_step_says_how_texts_ended_and_what_of_r_was_paid(setup: run.Setup) -> None:
    planned = a_run("sparse")
    run.execute(planned, setup)
    _, *steps = read_log(log_path(setup.logs, planned))
    for step in steps:
        assert 0 <= step["finished"] <= 1
        assert 1 <= step["length"] <= SETTINGS.tokens
        assert (step["paid"], step["baseline"], step["warnings"]) == (pytest.approx(1.0, abs=1e-3), 0.0, {})


def test_moments_are_of_the_model_that_they_were_measured_with(setup: run.Setup, tmp_path: Path) -> None:
    path = tmp_path / "moments.json"
    measured = run.moments_of(setup, path)
    assert run.moments_of(setup, path) == measured
    with pytest.raises(ValueError, match="was made with another model;"):
        run.moments_of(replace(setup, model="fp-other"), path)
    path.write_text('{"mean": 0.0, "deviation": 1.0}')
    with pytest.raises(ValueError, match="reading"):
        run.moments_of(setup, path)


def test_a_server_that_fails_ends_the_run(setup: run.Setup) -> None:
    policy = Policy(*start.load(setup.policy))
    with Client(setup.url) as client, pytest.raises(DenseRewardError):
        Judge(client, policy.facts, {"name": "no such method"})(policy.openings[:1], responses(policy, [[30, 31]], [2]))
    assert not list(setup.logs.glob("*"))


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not become ready"), judge_serving(tmp_path / "log", "--no-such-flag"):
        pass


def test_the_report_reads_what_is_there(setup: run.Setup, tmp_path: Path) -> None:
    write_report(setup.logs, tmp_path)
    assert "No run of the main study" in (tmp_path / "evidence.md").read_text()
    for method, seed in (("sparse", 0), ("sparse", 1), ("abc 1", 0), ("red open", 0)):
        run.execute(a_run(method, seed), setup)
    for method in ("sparse", "abc 1"):
        run.execute(replace(a_run(method, 0, "lambda-1"), settings=replace(SETTINGS, gae_lambda=1.0)), setup)
    run.execute(a_run("sparse less prompt", 0, "prompt"), setup)
    run.execute(a_run("sparse", 100, "tune-1"), replace(setup, moments=Moments(0.0, 2.0)))
    write_report(setup.logs, tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    for expected in (
        "sparse 2, abc 1 1",
        "gae_lambda = 1.0",
        "Not of the studies above, or not recorded: its moments.",
        "Differences to `sparse`",
        "Changed: nothing but the method.",
        "Differences to `red open` of the main study",
    ):
        assert expected in text
    ElementTree.parse(tmp_path / "evidence.svg")  # our own
