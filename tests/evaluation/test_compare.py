"""The comparison of methods on marked texts: what is read, counted and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from densereward.evaluation.compare import ONE_PASS, SEVERAL_PASSES, Row, plot, read_errors, rows, table
from densereward.evaluation.evaluate import Marked
from densereward.evaluation.plot import Mark, draw
from densereward.evaluation.scoring import TextRewards
from densereward.methods import METHODS
from serving import NOT_BY_A_SCORE

DOCS = Path(__file__).parents[2] / "service" / "docs"


def test_errors_are_read_as_marked_characters_with_their_question(tmp_path: Path) -> None:
    errors = [{"start": 0, "end": 2}, {"start": 4, "end": 99}]
    item = {"question": "Why?", "prediction 1": "abcdef", "feedback": {"errors": errors}}
    (tmp_path / "qa.json").write_text(json.dumps([item]))
    marked, questions = read_errors(tmp_path / "qa.json")
    assert marked[0].characters.tolist() == [True, True, False, False, True, True]
    assert questions == ["Why?"]


def test_a_row_holds_the_metrics_and_the_passes_that_a_method_took() -> None:
    spans = np.array([[0, 2], [2, 4]])
    items = [Marked("ab d", np.array([True, True, False, False])), Marked("ab d", np.array([False] * 4))]
    rewards = {"shapley": np.array([-1.0, 1.0]), "attribution": np.array([1.0, -1.0])}
    scored = [TextRewards(spans, rewards, {"shapley": passes}) for passes in (4, 8)]
    shapley, attribution = rows(items, scored, {"shapley": 12.0})
    assert (shapley.passes, shapley.time, attribution.passes, attribution.time) == (6.0, 12.0, 3.0, None)
    assert shapley.auroc.tolist() == [1.0]
    assert attribution.auroc.tolist() == [0.0]
    assert "| 6 | 12.00 |" in table([shapley])


def test_every_method_that_judges_tokens_by_itself_is_compared() -> None:
    compared = {each["name"] for each in (*ONE_PASS, *SEVERAL_PASSES)}
    not_judgements = {"segment", "sparse", "weights"}  # the first two cut and place
    assert METHODS.keys() - compared == not_judgements | set(NOT_BY_A_SCORE)
    assert len({each["label"] for each in (*ONE_PASS, *SEVERAL_PASSES)}) == len(ONE_PASS) + len(SEVERAL_PASSES)


def test_the_page_in_the_docs_has_a_row_for_each_and_meets_its_plot() -> None:
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    for each in (*ONE_PASS, *SEVERAL_PASSES):
        assert f"| `{each['label']}` |" in page
    assert "](comparison.svg)" in page
    ElementTree.parse(DOCS / "comparison.svg")


def test_the_plot_puts_values_on_its_axis_and_names_beside_them() -> None:
    document = draw("Title", {"one <set>": [Mark("a", 0.3, 0.3, 0.5), Mark("b", 0.9, 0.8, 0.9)]})
    root = ElementTree.fromstring(document)
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Title", "a", "b", "one <set>", "0.5"} <= set(texts)
    points = [float(each.get("cx") or 0) for each in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert points[1] - points[0] == pytest.approx(460)
    row = Row("red", np.array([[0.5, 0.7, np.nan]] * 3), 1.0, None)
    assert "red" in plot({"a set": [row]})
