"""All methods on texts in which annotators marked what is wrong: a page with a table for each set, and a plot.

    python -m densereward.evaluation.compare --data FOLDER --output FOLDER [--study]

Two sets, on neither of which anything was trained. Offensive words in comments (SemEval 2021 task 5, trial part): the
embedded model judges tone, so there is something to find. Errors of fact in answers (FineGrainedRLHF, qa_feedback):
it knows nothing of those, so this is the hard case, where chance is expected.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densereward.default_model.build import ensure_default_model
from densereward.evaluation import metrics
from densereward.evaluation.evaluate import Marked, read_marked, text_metrics, with_interval
from densereward.evaluation.metrics import Floats
from densereward.evaluation.plot import Mark, draw
from densereward.evaluation.scoring import Scorer, TextRewards
from densereward.methods import METHODS

ONE_PASS: tuple[dict[str, Any], ...] = (
    {"label": "red, open", "name": "red"},
    {"label": "red, closed", "name": "red", "prefix_mode": "closed"},
    {"label": "sentence, closed", "name": "sentence", "prefix_mode": "closed"},
    {"label": "message, closed", "name": "message", "prefix_mode": "closed"},
    {"label": "abc", "name": "abc", "beta": 1.0},
    {"label": "future_attention", "name": "future_attention"},
    {"label": "contribution", "name": "contribution"},
    {"label": "contribution, last layer", "name": "contribution", "layers": "last"},
    {"label": "contribution, rescaled", "name": "contribution", "rescale": True},
    {"label": "uniform", "name": "uniform"},
)
SEVERAL_PASSES: tuple[dict[str, Any], ...] = (
    {"label": "attribution", "name": "attribution"},
    {"label": "attribution, signed", "name": "attribution", "weights": "signed"},
    {"label": "occlusion", "name": "occlusion"},
    {"label": "shapley", "name": "shapley", "orders": 2},
)
STUDIED: tuple[dict[str, Any], ...] = tuple(
    {"label": label, "name": "contribution", "layers": layers, "rescale": rescale}
    for label, layers, rescale in (
        ("last layer", "last", False),
        ("last 2", [-1, -2], False),
        ("last 3", [-1, -2, -3], False),
        ("last 4", [-1, -2, -3, -4], False),
        ("all", "all", False),
        ("last layer, rescaled", "last", True),
        ("all, rescaled", "all", True),
    )
)
STUDIED_TEXTS = 1500
_PASSES = {each["label"]: METHODS[each["name"]].passes for each in (*ONE_PASS, *SEVERAL_PASSES, *STUDIED)}
TIMED_TEXTS = 64
ROUNDS = 3

_HEADER = """\
| method | AUROC, tokens | AUROC, word means | lowest token inside a mark | passes a text | time / `red` |
|---|---|---|---|---|---|"""
_PAGE = """\
# The methods, compared

Annotators marked parts of each text as wrong. Do the tokens inside these marks get lower rewards than the others? The
value for each text is an AUROC, where 0.5 is chance. Brackets are 95 % bootstrap intervals over texts.

The embedded model was trained on ratings and preferences of whole texts only. `contribution` adds up all layers by
default, as [a study on other texts](contribution-layers.md) suggests. The results below had been seen too when that was
decided.

Times are those of whole requests on one thread, with one method in each request: medians of interleaved rounds, divided
by the time of `red`. `make compare` makes this page.

![AUROC by method]({plot})

## Offensive words in comments

SemEval 2021 task 5, trial part, texts of fewer than 400 characters: {marked}, of which {both} have marked tokens and
others.

{tokens}

## Errors of fact in answers

FineGrainedRLHF, qa_feedback, first prediction, any kind of error; the question is the prompt. {answers} answers, of
which {wrong} have marked tokens and others. The model was never trained on facts, so results near chance are expected.

{errors}
"""


_STUDY = """\
# Which layers `contribution` adds up

The data are again comments with marked offensive words: the first {texts} texts of fewer than 400 characters of the
train part, which the comparison of the methods does not use. {both} of them have marked tokens and others. No model was
trained on marks. `make study` makes this page.

{table}
"""


@dataclass(frozen=True)
class Row:
    """One method on one set: what `text_metrics` found (3, texts), and what it cost."""

    name: str
    found: Floats
    passes: float
    time: float | None

    @property
    def auroc(self) -> Floats:
        """Of tokens, over the texts that have one."""
        tokens: Floats = self.found[0]
        return tokens[np.isfinite(tokens)]

    def __str__(self) -> str:
        cells = [with_interval(values[np.isfinite(values)]) for values in self.found]
        time = "-" if self.time is None else f"{self.time:.2f}"
        return f"| `{self.name}` | " + " | ".join([*cells, f"{self.passes:.0f}", time]) + " |"


def read_errors(file: Path) -> tuple[list[Marked], list[str]]:
    """Answers with the characters that annotators marked as errors, and the questions."""
    items = json.loads(file.read_text(encoding="utf-8"))
    marked = []
    for each in items:
        text = each["prediction 1"]
        spans = [range(error["start"], error["end"]) for error in each["feedback"]["errors"]]
        marked.append(Marked(text, metrics.labels_of([i for span in spans for i in span], len(text))))
    return marked, [each["question"] for each in items]


def rows(items: Sequence[Marked], scored: Sequence[TextRewards], times: dict[str, float]) -> list[Row]:
    """A row a method."""
    return [
        Row(
            name,
            np.array([text_metrics(item, result, name) for item, result in zip(items, scored, strict=True)]).T,
            float(np.mean([result.passes.get(name, _PASSES[name]) for result in scored])),
            times.get(name),
        )
        for name in scored[0].rewards
    ]


def times_over_red(scorer: Scorer, texts: Sequence[str], methods: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each method's own request over those of the first one's, medians of rounds taken in turns."""
    seconds: dict[str, list[float]] = {each["label"]: [] for each in methods}
    for _ in range(ROUNDS):
        for each in methods:
            started = time.perf_counter()
            scorer.texts(texts, [each])
            seconds[each["label"]].append(time.perf_counter() - started)
    first = np.array(seconds[methods[0]["label"]])
    return {name: float(np.median(np.array(values) / first)) for name, values in seconds.items()}


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    return "\n".join([_HEADER, *map(str, found)])


def plot(found: dict[str, Sequence[Row]]) -> str:
    """An SVG document: each method's AUROC with its interval, set by set."""
    marks = {
        title: [Mark(row.name, float(row.auroc.mean()), *metrics.bootstrap_interval(row.auroc)) for row in each]
        for title, each in found.items()
    }
    return draw("AUROC of token rewards against human marks", marks)


def compare(data: Path, model: Path, output: Path) -> None:
    """Score, write the page and the plot."""
    comments = read_marked(data / "toxic_spans" / "tsd_trial.csv")
    answers, questions = read_errors(data / "finegrained" / "qa_feedback.json")
    methods = (*ONE_PASS, *SEVERAL_PASSES)
    with Scorer(model) as scorer:
        times = times_over_red(scorer, [item.text for item in comments[:TIMED_TEXTS]], methods)
        found = rows(comments, scorer.texts([item.text for item in comments], methods), times)
        errors = rows(answers, scorer.texts([item.text for item in answers], ONE_PASS, questions), {})
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.svg").write_text(plot({"offensive words": found, "errors of fact": errors}), encoding="utf-8")
    page = _PAGE.format(
        plot="comparison.svg",
        marked=len(comments),
        both=len(found[0].auroc),
        answers=len(answers),
        wrong=len(errors[0].auroc),
        tokens=table(found),
        errors=table(errors),
    )
    (output / "comparison.md").write_text(page, encoding="utf-8")
    print(page)


def study(data: Path, model: Path, output: Path) -> None:
    """The layers of `contribution`, and what rescaling does, on texts that the comparison leaves out."""
    comments = read_marked(data / "toxic_spans" / "tsd_train.csv")[:STUDIED_TEXTS]
    with Scorer(model) as scorer:
        found = rows(comments, scorer.texts([item.text for item in comments], STUDIED), {})
    page = _STUDY.format(texts=len(comments), both=len(found[0].auroc), table=table(found))
    (output / "contribution-layers.md").write_text(page, encoding="utf-8")
    print(page)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare the methods on texts that annotators marked.")
    parser.add_argument("--data", type=Path, required=True, help="folder with toxic_spans/ and finegrained/")
    parser.add_argument("--model", type=Path, help="a model folder; the embedded model if left out")
    parser.add_argument("--output", type=Path, required=True, help="folder for comparison.md and comparison.svg")
    parser.add_argument("--study", action="store_true", help="only the layers of contribution, in a page of their own")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = study if arguments.study else compare
    run(arguments.data, arguments.model or ensure_default_model(), arguments.output)


if __name__ == "__main__":
    main()
