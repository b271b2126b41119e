"""The benchmark's arithmetic on literal numbers, and one run at the smallest size. Nothing here looks at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from densereward.methods import METHODS
from densereward_client.wire import Include
from tests.benchmarks import gpu
from tests.benchmarks.__main__ import measure
from tests.benchmarks.contestants import within_budget
from tests.benchmarks.figures import GROUPS, ONLY_EMBEDDED
from tests.benchmarks.floor import model_bytes, model_flops, shared_flops
from tests.benchmarks.groups.gpu import GROUPS as GPU_GROUPS
from tests.benchmarks.harness import (
    Chart,
    Disagreement,
    Figure,
    Numbers,
    Spread,
    agreement,
    difference,
    ratios,
    spread,
    take_turns,
)
from tests.benchmarks.same_answers import __main__ as same_answers
from tests.benchmarks.same_answers.comparison import Answer, Comparison, Tally, compare
from tests.benchmarks.same_answers.models import Target
from tests.benchmarks.same_answers.traffic import COMMON, INCLUDED, PARAMETERS, Traffic
from tests.benchmarks.svg import draw
from tests.benchmarks.work import SMALLEST, lengths_up_to, random_ids

MANY_PROCESSES = ["memory", "plain", "health"]
ON_RANDOM = [name for name in GROUPS if name not in ONLY_EMBEDDED]
A_OVER_B = Figure("a / b", over="a", under="b")


def numbers(**values: list[float]) -> Numbers:
    return {name: np.array(each) for name, each in values.items()}


def test_contestants_take_turns_and_every_other_round_runs_backwards() -> None:
    turns: list[str] = []
    ticks = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0])
    contestants = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    seconds = take_turns(contestants, 2, clock=lambda: next(ticks))
    assert turns == ["a", "b", "b", "a"]
    assert seconds == {"a": [1.0, 4.0], "b": [2.0, 3.0]}


def test_a_figure_is_a_ratio_in_every_round() -> None:
    figure = Figure("a / b", over="a", under="b", factor=10.0)
    assert ratios({"a": [1.0, 6.0], "b": [2.0, 3.0]}, figure) == [5.0, 20.0]


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0)


def test_a_difference_is_relative_to_the_largest_number_and_only_of_what_both_computed() -> None:
    ours = numbers(reward=[4.0, -1.0], red=[1.0])
    assert difference(ours, numbers(reward=[4.0, -2.0])) == 0.25
    assert difference(ours, numbers(abc=[1.0])) is None


@pytest.mark.parametrize("other", [[4.0, -1.1], [4.0], [4.0, float("nan")]])
def test_contestants_that_disagree_are_not_timed(other: list[float]) -> None:
    with pytest.raises(Disagreement):
        agreement({"a": numbers(reward=[4.0, -1.0]), "b": numbers(reward=other)}, [A_OVER_B], tolerance=0.01)


def test_the_floor_counts_matrices_causal_attention_and_each_byte_once() -> None:
    config = SimpleNamespace(num_attention_heads=2, head_dim=5, num_hidden_layers=3)
    model: Any = SimpleNamespace(config=config, base_model=nn.Sequential(nn.Linear(4, 6), nn.Embedding(9, 4)))
    assert model_flops(model, [2, 1]) == 2 * 24 * 3 + 4 * (3 + 1) * 10 * 3
    assert model_bytes(model, [2, 1]) == 4 * (24 + 10 * 3)
    assert shared_flops(model, 2, [1, 1]) == 2 * 24 * 4 + 4 * (3 + 3 + 3) * 10 * 3


def test_a_prompt_counts_once_in_a_batch() -> None:
    facts: Any = SimpleNamespace(batch_tokens=16, pair_cost=0.0)
    group = [random_ids([1] * 10, 3, seed, vocabulary=50) for seed in range(3)]
    others = [random_ids([number] * 10, 3, number, vocabulary=50) for number in (2, 3)]
    assert [len(batch) for batch in within_budget([*group, *others], facts)] == [2, 1, 1, 1]


def test_long_batches_are_as_long_as_they_say() -> None:
    lengths = lengths_up_to(2048, 8)
    assert max(lengths) == 2048
    assert sorted(lengths)[-2] < 2048


def test_a_chart_is_a_document_with_every_line_and_label() -> None:
    lines = {"ours <1>": [(1.0, 0.5), (4.0, 2.0)], "theirs": [(1.0, 5.0), (4.0, 60.0)]}
    root = ElementTree.fromstring(draw(Chart("name", "A title", "tokens", "seconds", lines)))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"A title", "tokens", "seconds", "ours <1>", "theirs", "0.1", "100"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([name for name in ON_RANDOM if name not in MANY_PROCESSES], id="quick"),
        pytest.param(MANY_PROCESSES, id="many-processes", marks=pytest.mark.slow),
    ],
)
def test_the_smallest_run_writes_a_table_and_its_raw_numbers(groups: list[str], tmp_path: Path) -> None:
    page = measure(SMALLEST, threads=1, only=groups, folder=tmp_path, name="smallest")
    assert (tmp_path / "smallest.md").read_text() == page
    raw = json.loads((tmp_path / "smallest.json").read_text())
    figures = [figure for result in raw["results"] for figure in result["figures"]]
    titles = [row["title"] for result in raw["results"] for row in [*result["figures"], *result["readings"]]]
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [result["group"] for result in raw["results"]] == groups
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == titles
    assert all(ratio > 0 for figure in figures for ratio in figure["ratios"])
    assert all((tmp_path / link).is_file() for link in re.findall(r"!\[.*\]\((.*)\)", page))
    assert str(tmp_path) not in page


def test_the_gpu_script_runs_its_groups_on_a_tiny_model(tmp_path: Path) -> None:
    page = gpu.measure(["tiny"], list(GPU_GROUPS), torch.device("cpu"), rounds=1, folder=tmp_path)
    [written] = tmp_path.glob("*.json")
    results = json.loads(written.read_text())["results"]
    assert [result["group"] for result in results] == list(GPU_GROUPS)
    assert "drift of reward" in page


# --- same_answers ---------------------------------------------------------------------------------------------------

ANSWER = {
    "id": f"tr-{'0' * 32}",
    "object": "token_rewards",
    "created": 1,
    "data": [
        {
            "index": 0,
            "id": "mine",
            "reward": 0.1,
            "warnings": ["split_boundary: read apart", "unfinished: cut"],
            "token_rewards": {"red": [0.1, -0.0], "message": "AAAAAA=="},
        },
        {"index": 1, "error": {"code": "too_long", "message": '9 "tokens"', "details": {"limit": 8}}},
    ],
    "timing": {"queue_ms": 0.0, "forward_ms": 1.5, "total_ms": 2e-05},
    "model": "tiny",
    "fingerprint": "fp-1",
}


def came_back(status: int = 200, *changes: tuple[str, str], retry_after: str | None = None) -> Answer:
    content = json.dumps(ANSWER, separators=(",", ":"))
    for old, new in changes:
        assert content.count(old) == 1
        content = content.replace(old, new)
    return Answer(status, {} if retry_after is None else {"retry-after": retry_after}, content.encode())


@pytest.mark.parametrize(
    "change",
    [
        ("tr-" + "0" * 32, "tr-" + "f" * 32),
        ('"created":1', '"created":22'),
        ('"forward_ms":1.5', '"forward_ms":3'),
        ('"total_ms":2e-05', '"total_ms":12.25'),
    ],
    ids=str,
)
def test_ids_and_times_may_differ(change: tuple[str, str]) -> None:
    assert compare(came_back(), came_back(200, change)) == Comparison(None, [], [])


@pytest.mark.parametrize("change", [("read apart", r"apart: \"both\""), (r"9 \"tokens\"", "nine")], ids=str)
def test_texts_may_be_reworded_which_is_told(change: tuple[str, str]) -> None:
    compared = compare(came_back(), came_back(200, change))
    assert compared.difference is None
    assert len(compared.texts) == 1


def test_a_fingerprint_that_differs_is_told_by_itself() -> None:
    compared = compare(came_back(), came_back(200, ("fp-1", "fp-2")))
    assert (compared.difference, len(compared.fingerprints)) == (None, 1)
    tally = Tally()
    tally.add("one", "/token_rewards", "a request", (came_back(), came_back(200, ("fp-1", "fp-2"))))
    assert not tally.same


@pytest.mark.parametrize(
    "change",
    [
        ('"red":[0.1,', f'"red":[{np.nextafter(0.1, 1)},'),
        ("-0.0]", "0.0]"),
        ("AAAAAA==", "AQAAAA=="),
        ('"index":0,"id":"mine"', '"id":"mine","index":0'),
        ("split_boundary: ", "boundary: "),
        ("too_long", "too_large"),
        ('"limit":8', '"limit":9'),
        ('"id":"mine"', '"id":null'),
        (',"unfinished: cut"', ""),
    ],
    ids=str,
)
def test_anything_else_that_differs_is_found(change: tuple[str, str]) -> None:
    compared = compare(came_back(), came_back(200, change))
    assert compared.difference is not None
    assert compared.difference.startswith("byte ")


def test_status_and_headers_are_compared_but_not_how_long_a_full_queue_takes() -> None:
    assert compare(came_back(), came_back(422)).difference is not None
    assert compare(came_back(retry_after="1"), came_back()).difference is not None
    first, second, none = (came_back(429, retry_after=seconds) for seconds in ("1", "9", None))
    assert compare(first, second).difference is None
    assert compare(first, none).difference is not None


def test_descriptions_of_models_may_be_reworded_and_rewards_of_such_names_may_not_change() -> None:
    old, new = (Answer(200, {}, json.dumps({"sum": text}).encode().replace(b" ", b"")) for text in ("R", "S"))
    assert compare(old, new, described=True).difference is None
    assert compare(old, new).difference is not None


def test_a_tally_counts_what_was_covered() -> None:
    tally = Tally()
    tally.add("one", "/token_rewards", "a request", (came_back(), came_back()))
    assert tally.same
    assert tally.samples == {"red": 1, "message": 1}
    assert tally.codes == {"too_long": 1}
    assert tally.warnings == {"split_boundary": 1, "unfinished": 1}


def test_every_parameter_of_every_method_is_tried() -> None:
    tried = {name: {*PARAMETERS.get(name, {}), *COMMON} for name in METHODS}
    assert tried == {name: {*METHODS[name].params_type.model_fields} for name in METHODS}
    assert {*INCLUDED} == {*get_args(Include)}


def test_the_same_seed_asks_the_same() -> None:
    target = Target("tiny", tiny.make_tokenizer())
    first, second, other = (Traffic(Random(seed), target) for seed in (1, 1, 2))
    asked = [[traffic.request() for _ in range(50)] for traffic in (first, second, other)]
    assert asked[0] == asked[1] != asked[2]
    assert {request.kind for request in asked[0]} >= {"/token_rewards", "/rewards", "/get_reward", "faulty"}


@pytest.mark.slow
def test_a_checkout_gives_the_same_answers_as_itself(capsys: pytest.CaptureFixture[str]) -> None:
    root = str(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as ended:
        same_answers.main(["--old", root, "--new", root, "--requests", "300", "--only", "steps", "limits"])
    assert ended.value.code == 0
    assert "Answers that differ: 0" in capsys.readouterr().out
