"""The report of client/examples/ppo_evidence: what it refuses to compare, its arithmetic, and the published page."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from examples.ppo_evidence import intervals, run
from examples.ppo_evidence.logs import log_path, read_log, read_logs
from examples.ppo_evidence.plan import Plan, Run
from examples.ppo_evidence.ppo import Moments, Settings
from examples.ppo_evidence.report import write_report

RESULTS = Path(run.__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "service" / "docs"


def write_logs(folder: Path, runs: dict[tuple[str, str, int], list[float]]) -> dict[str, Any]:
    """Logs with these rewards and a KL that passes all of the report's values in the first step; the last header."""
    plan, head = Plan(), dict[str, Any]()
    names = ("entropy", "length", "finished", "explained", "baseline", "paid", "distinct", "seconds")
    for (study, method, seed), rewards in runs.items():
        planned = Run(study, method, plan.methods[method], seed, len(rewards), Settings())
        setup = run.Setup(folder, folder, "", Moments(0.0, 1.0), "fp", "start")
        head = asdict(planned) | setup.identity
        path = log_path(folder, planned)
        path.parent.mkdir(parents=True, exist_ok=True)
        steps = [
            {"step": step, "reward": reward, "kl": 20.0, "warnings": {}} | dict.fromkeys(names, 0.5)
            for step, reward in enumerate(rewards)
        ]
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, [head, *steps])).encode()))
    return head


def rewrite(folder: Path, key: tuple[str, str, int], head: dict[str, Any]) -> None:
    """Give one of those logs another header."""
    path = folder / key[0] / f"{key[1]}.{key[2]}.jsonl.gz"
    _, *steps = read_log(path)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, [head, *steps])).encode()))


@pytest.mark.parametrize("name", ["model", "start", "device", "precision", "reading", "moments"])
def test_the_report_refuses_runs_of_two_kinds_by_name(tmp_path: Path, name: str) -> None:
    heads = write_logs(tmp_path, {("main", "sparse", 0): [1.0], ("main", "sparse", 1): [1.0]})
    without = {key: value for key, value in heads.items() if key != name}
    for seed, other in ((1, heads | {name: "another"}), (1, without), (0, without)):
        rewrite(tmp_path, ("main", "sparse", 0), heads | {"seed": 0})
        rewrite(tmp_path, ("main", "sparse", seed), other)
        with pytest.raises(ValueError, match=f"was made with another {name};"):
            read_logs(tmp_path)
        rewrite(tmp_path, ("main", "sparse", seed), heads)


def test_the_report_refuses_a_method_of_another_kind(tmp_path: Path) -> None:
    heads = write_logs(tmp_path, {("main", "sparse", 0): [1.0], ("main", "sparse", 1): [1.0]})
    rewrite(tmp_path, ("main", "sparse", 1), heads | {"request": {"name": "uniform"}})
    with pytest.raises(ValueError, match="was made with another request;"):
        read_logs(tmp_path)


def test_prompt_is_compared_with_the_same_steps_and_seeds_of_the_main_study(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    runs = {("main", "sparse", seed): [1.0 + seed, 1.0, 50.0, 50.0] for seed in range(3)}
    runs |= {("main", "red open", seed): [3.0 + seed, 3.0, 50.0, 50.0] for seed in range(2)}
    runs |= {("prompt", "sparse less prompt", seed): [2.0 + seed, 2.0] for seed in range(2)}
    write_logs(logs, runs)
    write_report(logs, tmp_path)
    text = (tmp_path / "evidence.md").read_text().split("## prompt")[1]
    less_sparse, less_red = text.split("Differences to `sparse`")[1].split("Differences to `red open`")
    assert "| sparse less prompt | +1.000 ± 0.000 (2) | 2 of 2 |" in less_sparse
    assert "| sparse less prompt | -1.000 ± 0.000 (2) | 0 of 2 |" in less_red


def test_equal_kl_and_steps_taken_are_paired_and_counted(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    runs = {("main", "sparse", seed): [0.0] * 10 + [10.0] * 20 for seed in range(3)}
    runs |= {("main", "abc 1", 0): [10.0] * 30, ("main", "abc 1", 1): [0.0] * 30}
    write_logs(logs, runs)
    write_report(logs, tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    assert "| sparse | 3 of 3 | +19.0 ± 0.0 (3) |" in text
    assert "| abc 1 | 1 of 2 | +1.0 (1) | -18.0 (1) |" in text
    assert "| sparse | +0.000 ± 0.000 (3) | +0.000 ± 0.000 (3) | +0.000 ± 0.000 (3) |" in text  # at each of the KLs
    assert "| abc 1 | +5.000 ± 63.530 (2) |" in text


def test_intervals_are_by_student_and_say_how_many() -> None:
    for count, t in {2: 12.706, 3: 4.303, 4: 3.182, 8: 2.365, 31: 2.042}.items():
        assert intervals.student(count - 1) == pytest.approx(t, rel=2e-3)
    assert intervals.interval([1.0, 3.0]) == "+2.000 ± 12.706 (2)"
    assert intervals.interval([1.0]) == "+1.000 (1)"
    assert intervals.interval([]) == "(0)"


def test_a_sign_test_is_two_sided() -> None:
    assert intervals.sign_test([1.0] * 8) == pytest.approx(2 / 256)
    assert intervals.sign_test([1.0, -1.0]) == 1.0


def test_the_plan_names_methods_and_settings_that_there_are() -> None:
    plan = Plan()
    for name, study in plan.studies.items():
        seeds = [planned.seed for planned in plan.runs([name])]
        assert seeds
        assert seeds == sorted(seeds)  # whole seeds first, so that what is there of a study is balanced
        assert set(study.get("beside", [])) <= set(plan.studies["main"]["methods"])


def test_the_published_page_is_what_the_published_logs_say(tmp_path: Path) -> None:
    write_report(RESULTS / "logs", tmp_path)
    for name in ("evidence.md", "evidence.svg"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()
