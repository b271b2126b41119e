"""The experiment in client/examples/ppo_evidence, made tiny: its arithmetic, its loop, its logs and its report."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaModel

import tiny
from densereward_client import Client, DenseRewardError, TokenRewardsResponse
from examples.ppo_evidence import report, run, start
from examples.ppo_evidence.judge import Judge, Judged
from examples.ppo_evidence.judge import serving as judge_serving
from examples.ppo_evidence.policy import Policy, Responses
from examples.ppo_evidence.ppo import Moments, Settings, advantages
from serving import serving

SETTINGS = Settings(tokens=6, batch=4, warm_up=1, warm_up_epochs=1)
STEPS = 2
RESULTS = Path(run.__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "service" / "docs"


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
    with Client(url) as client:
        model = Judge(client, start.load(policy_folder)[1], {"name": "sparse"}).fingerprint()
    moments, policy = Moments(0.0, 1.0), start.fingerprint(policy_folder)
    return run.Place(policy_folder, tmp_path / "logs", url, moments, model, policy, precision="float32")


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


def judged(url: str, policy_folder: Path, method: str, ids: list[list[int]], lengths: list[int]) -> Judged:
    """What a method makes of these continuations of one opening, so that all have one s_0."""
    policy = Policy(*start.load(policy_folder))
    with Client(url) as client:
        judge = Judge(client, policy.facts, run.Plan().methods[method])
        return judge(policy.openings[:1].repeat(len(ids), 1), responses(policy, ids, lengths))


TEXTS, LENGTHS = [[30, 31, 32, 33], [34, 2, 35, 36], [80, 90, 100, 110], [7, 200, 44, 2]], [4, 2, 4, 4]


@pytest.mark.parametrize("method", run.Plan().studies["main"]["methods"])
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
    ("item", "said"),
    [
        ({"reward": None}, "no reward for text 0"),
        ({"baseline": {}}, "no baseline for text 0"),
        ({"prompt_score": None}, "no prompt_score for text 0"),
        ({"warnings": ["unfinished: read open"]}, "read another thing.*unfinished"),
        ({"warnings": ["no_prompt_score: s_0 = 0"]}, "read another thing.*no_prompt_score"),
    ],
)
def test_a_missing_number_and_another_reading_are_refused(
    url: str, policy_folder: Path, item: dict[str, Any], said: str
) -> None:
    policy = Policy(*start.load(policy_folder))
    with Doctored(url) as client:
        client.item = item
        judge = Judge(client, policy.facts, run.Plan().methods["sparse less prompt"])
        with pytest.raises(RuntimeError, match=said):
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
    run.run_all([asked], place, workers=1)
    assert "1/1 main, red open, seed 0" in capsys.readouterr().out
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
        run.is_finished(replace(asked, settings=replace(SETTINGS, kl=1.0)), place)
    others = {
        "moments": replace(place, moments=Moments(1.0, 1.0)),
        "model": replace(place, model="fp-other"),
        "start": replace(place, start="other"),
        "precision": replace(place, precision="bfloat16"),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"was made with another {name};"):
            run.is_finished(asked, other)


def test_a_step_says_how_texts_ended_and_what_of_r_was_paid(place: run.Place) -> None:
    asked = a_run("sparse")
    run.execute(asked, place)
    _, *steps = run.read_log(run.log_path(place.logs, asked))
    for step in steps:
        assert 0 <= step["finished"] <= 1
        assert 1 <= step["length"] <= SETTINGS.tokens
        assert (step["paid"], step["baseline"], step["warnings"]) == (pytest.approx(1.0, abs=1e-3), 0.0, {})


def test_moments_are_of_the_model_that_they_were_measured_with(place: run.Place, tmp_path: Path) -> None:
    path = tmp_path / "moments.json"
    measured = run.moments_of(place, path)
    assert run.moments_of(place, path) == measured
    with pytest.raises(ValueError, match="was made with another model;"):
        run.moments_of(replace(place, model="fp-other"), path)
    path.write_text('{"mean": 0.0, "deviation": 1.0}')
    with pytest.raises(ValueError, match="reading"):
        run.moments_of(place, path)


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
    for method, seed in (("sparse", 0), ("sparse", 1), ("abc 1", 0), ("red open", 0)):
        run.execute(a_run(method, seed), place)
    for method in ("sparse", "abc 1"):
        run.execute(replace(a_run(method, 0, "lambda-1"), settings=replace(SETTINGS, gae_lambda=1.0)), place)
    run.execute(a_run("sparse less prompt", 0, "prompt"), place)
    run.execute(a_run("sparse", 100, "tune-1"), replace(place, moments=Moments(0.0, 2.0)))
    report.write_report(place.logs, tmp_path)
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


@pytest.mark.parametrize("name", ["model", "start", "device", "precision", "reading", "moments"])
def test_the_report_refuses_runs_of_two_kinds_by_name(tmp_path: Path, name: str) -> None:
    heads = write_logs(tmp_path, {("main", "sparse", 0): [1.0], ("main", "sparse", 1): [1.0]})
    without = {key: value for key, value in heads.items() if key != name}
    for seed, other in ((1, heads | {name: "another"}), (1, without), (0, without)):
        rewrite(tmp_path, ("main", "sparse", 0), heads | {"seed": 0})
        rewrite(tmp_path, ("main", "sparse", seed), other)
        with pytest.raises(ValueError, match=f"was made with another {name};"):
            report.read_logs(tmp_path)
        rewrite(tmp_path, ("main", "sparse", seed), heads)


def test_the_report_refuses_a_method_of_another_kind(tmp_path: Path) -> None:
    heads = write_logs(tmp_path, {("main", "sparse", 0): [1.0], ("main", "sparse", 1): [1.0]})
    rewrite(tmp_path, ("main", "sparse", 1), heads | {"request": {"name": "uniform"}})
    with pytest.raises(ValueError, match="was made with another request;"):
        report.read_logs(tmp_path)


def test_prompt_is_compared_with_the_same_steps_and_seeds_of_the_main_study(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    runs = {("main", "sparse", seed): [1.0 + seed, 1.0, 50.0, 50.0] for seed in range(3)}
    runs |= {("main", "red open", seed): [3.0 + seed, 3.0, 50.0, 50.0] for seed in range(2)}
    runs |= {("prompt", "sparse less prompt", seed): [2.0 + seed, 2.0] for seed in range(2)}
    write_logs(logs, runs)
    report.write_report(logs, tmp_path)
    text = (tmp_path / "evidence.md").read_text().split("## prompt")[1]
    less_sparse, less_red = text.split("Differences to `sparse`")[1].split("Differences to `red open`")
    assert "| sparse less prompt | +1.000 ± 0.000 (2) | 2 of 2 |" in less_sparse
    assert "| sparse less prompt | -1.000 ± 0.000 (2) | 0 of 2 |" in less_red


def test_equal_kl_and_steps_taken_are_paired_and_counted(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    runs = {("main", "sparse", seed): [0.0] * 10 + [10.0] * 20 for seed in range(3)}
    runs |= {("main", "abc 1", 0): [10.0] * 30, ("main", "abc 1", 1): [0.0] * 30}
    write_logs(logs, runs)
    report.write_report(logs, tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    assert "| sparse | 3 of 3 | +19.0 ± 0.0 (3) |" in text
    assert "| abc 1 | 1 of 2 | +1.0 (1) | -18.0 (1) |" in text
    assert "| sparse | +0.000 ± 0.000 (3) | +0.000 ± 0.000 (3) | +0.000 ± 0.000 (3) |" in text  # at each of the KLs
    assert "| abc 1 | +5.000 ± 63.530 (2) |" in text


def write_logs(folder: Path, runs: dict[tuple[str, str, int], list[float]]) -> dict[str, Any]:
    """Logs with these rewards and a KL that passes all of the report's values in the first step; the last header."""
    plan, head = run.Plan(), dict[str, Any]()
    names = ("entropy", "length", "finished", "explained", "baseline", "paid", "distinct", "seconds")
    for (study, method, seed), rewards in runs.items():
        asked = run.Run(study, method, plan.methods[method], seed, len(rewards), SETTINGS)
        place = run.Place(folder, folder, "", Moments(0.0, 1.0), "fp", "start")
        head = asdict(asked) | place.identity
        path = run.log_path(folder, asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        steps = [
            {"step": step, "reward": reward, "kl": 20.0, "warnings": {}} | dict.fromkeys(names, 0.5)
            for step, reward in enumerate(rewards)
        ]
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, [head, *steps])).encode()))
    return head


def rewrite(folder: Path, place: tuple[str, str, int], head: dict[str, Any]) -> None:
    """Give one of those logs another header."""
    path = folder / place[0] / f"{place[1]}.{place[2]}.jsonl.gz"
    _, *steps = run.read_log(path)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, [head, *steps])).encode()))


def test_intervals_are_by_student_and_say_how_many() -> None:
    for count, t in {2: 12.706, 3: 4.303, 4: 3.182, 8: 2.365, 31: 2.042}.items():
        assert report.student(count - 1) == pytest.approx(t, rel=2e-3)
    assert report.interval([1.0, 3.0]) == "+2.000 ± 12.706 (2)"
    assert report.interval([1.0]) == "+1.000 (1)"
    assert report.interval([]) == "(0)"


def test_a_sign_test_is_two_sided() -> None:
    assert report.sign_test([1.0] * 8) == pytest.approx(2 / 256)
    assert report.sign_test([1.0, -1.0]) == 1.0


def test_the_plan_names_methods_and_settings_that_there_are() -> None:
    plan = run.Plan()
    for name, study in plan.studies.items():
        seeds = [asked.seed for asked in plan.runs([name])]
        assert seeds
        assert seeds == sorted(seeds)  # whole seeds first, so that what is there of a study is balanced
        assert set(study.get("beside", [])) <= set(plan.studies["main"]["methods"])


def test_the_published_page_is_what_the_published_logs_say(tmp_path: Path) -> None:
    report.write_report(RESULTS / "logs", tmp_path)
    for name in ("evidence.md", "evidence.svg"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()
