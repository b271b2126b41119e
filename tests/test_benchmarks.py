"""The benchmark's arithmetic on literal numbers, and one run at the smallest size. Nothing here looks at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

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
