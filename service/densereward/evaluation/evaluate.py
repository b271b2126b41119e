"""How well token rewards find what people marked, and sequence rewards what people preferred: two Markdown tables.

    python -m densereward.evaluation.evaluate --data FOLDER [--model PATH] [--output table.md]

The first table reads the trial part of SemEval 2021 task 5 (comments with the character offsets that people marked as
toxic), which no training text comes from; the second the held-out tenth of the training sources.
"""

import argparse
import ast
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from densereward.default_model import data
from densereward.default_model.batches import OFFENSIVE_FROM
from densereward.default_model.build import ensure_default_model
from densereward.evaluation import metrics
from densereward.evaluation.metrics import Bools, Floats, Spans
from densereward.evaluation.scoring import Scorer, TextRewards

MAX_CHARACTERS = 400
MARGINS = (1.0, 2.0)  # least difference of two human ratings that makes a pair; the first is the headline
RANDOM_SEED = 0
PUNCTUATION = ".,;:!?\"'()[]{}*-_~`"


@dataclass(frozen=True)
class Marked:
    """A text and a flag for each of its characters: did people mark it."""

    text: str
    characters: Bools


def read_marked(file: Path, below: int = MAX_CHARACTERS) -> list[Marked]:
    """Texts of fewer than `below` characters from a `spans,text` file; marks past a text's end are dropped."""
    with file.open(encoding="utf-8", newline="") as rows:
        return [
            Marked(row["text"], metrics.labels_of(ast.literal_eval(row["spans"]), len(row["text"])))
            for row in csv.DictReader(rows)
            if len(row["text"]) < below
        ]


def read_lexicon(file: Path) -> dict[str, float]:
    """Word to mean valence, from `word <tab> mean <tab> ..` lines."""
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line)
    return {row[0]: float(row[1]) for row in rows}


def lexicon_rewards(lexicon: dict[str, float], text: str, tokens: Spans) -> Floats:
    """Valence of each token's word, 0 where the lexicon lacks it; `tokens` (T, 2) without leading white space.

    A word is looked up as it stands in lower case, else without its outer punctuation, whose tokens then get 0.
    """
    rewards = np.zeros(len(tokens))
    for start, end in metrics.word_spans(text):
        word = text[start:end].lower()
        core = word if word in lexicon else word.strip(PUNCTUATION)
        begin = start + word.find(core)
        touched = (tokens[:, 0] < begin + len(core)) & (tokens[:, 1] > np.maximum(begin, tokens[:, 0]))
        rewards[touched] = lexicon.get(core, 0.0)
    return rewards


def add_baselines(items: Sequence[Marked], scored: Sequence[TextRewards], lexicon: dict[str, float]) -> None:
    """Put the lexicon's, a constant and random rewards beside the model's, on the same tokens, in `scored` itself."""
    rng = np.random.default_rng(RANDOM_SEED)
    for item, result in zip(items, scored, strict=True):
        count = len(result.spans)
        tokens = metrics.stripped(item.text, result.spans)
        result.rewards["lexicon"] = lexicon_rewards(lexicon, item.text, tokens)
        result.rewards["constant"] = np.zeros(count)
        result.rewards["random"] = rng.random(count)


def text_metrics(item: Marked, result: TextRewards, method: str) -> tuple[float, float, float]:
    """Token AUROC, word-mean AUROC and top-1 of one text; nan where its labels are all of one class."""
    rewards = result.rewards[method]
    tokens, words = metrics.stripped(item.text, result.spans), metrics.word_spans(item.text)
    token_labels = metrics.overlaps(tokens, item.characters)
    word_labels = metrics.overlaps(words, item.characters)
    one_class = token_labels.all() or not token_labels.any()
    return (
        metrics.auroc(rewards, token_labels),
        metrics.auroc(metrics.word_means(words, tokens, rewards), word_labels),
        float("nan") if one_class else metrics.lowest_is_harmful(rewards, token_labels),
    )


def token_table(items: Sequence[Marked], scored: Sequence[TextRewards]) -> str:
    """Markdown: a row a method; mean over texts and 95 % interval of each metric; n in the heading."""
    methods = list(scored[0].rewards)
    values = np.array([[text_metrics(i, s, m) for i, s in zip(items, scored, strict=True)] for m in methods])
    counts = np.isfinite(values[0]).sum(axis=0)
    heads = ["AUROC, tokens", "AUROC, word means", "lowest token inside a span"]
    lines = [
        "| method | " + " | ".join(f"{head} (n = {count})" for head, count in zip(heads, counts, strict=True)) + " |",
        "|---|---|---|---|",
    ]
    for method, rows in zip(methods, values, strict=True):
        cells = [with_interval(column[np.isfinite(column)]) for column in rows.T]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_interval(values: Floats) -> str:
    """Mean of `values` with its bootstrap interval, three digits."""
    low, high = metrics.bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def pair_table(scorer: Scorer, folder: Path) -> str:
    """Markdown: a row a data set and margin, held-out texts only; then the mean over sets at the first margin."""
    lines = ["| set | margin | texts | pairs | accuracy |", "|---|---|---|---|---|"]
    headline: list[metrics.Accuracy] = []
    rated = [item for item in data.read_rated(folder) if data.is_held_out(item)]
    for source in dict.fromkeys(item.source for item in rated):
        items = [item for item in rated if item.source == source]
        rewards = scorer.answers([item.text for item in items])
        labels = np.array([item.label for item in items])
        margins: Sequence[float | str] = MARGINS
        if source == "davidson":
            labels, margins = (
                (labels >= OFFENSIVE_FROM).astype(np.float64),
                ("clean against offensive or hate",),
            )
        for index, margin in enumerate(margins):
            accuracy = metrics.ranking_accuracy(rewards, labels, margin if isinstance(margin, float) else 1.0)
            lines.append(row(source, margin, len(items), accuracy))
            headline += [accuracy] if index == 0 else []
    preference = preference_accuracy(scorer, folder)
    lines.append(row("hh_harmless", "chosen against rejected", 2 * preference.pairs, preference))
    for name, parts in (
        ("mean of the five rated sets", headline),
        ("mean of all six", [*headline, preference]),
    ):
        lines.append(row(name, "first of each set", "", metrics.mean_accuracy(parts)))
    return "\n".join(lines)


def preference_accuracy(scorer: Scorer, folder: Path) -> metrics.Accuracy:
    """Share of held-out preference pairs whose chosen dialogue has the higher reward."""
    pairs = [pair for pair in data.read_preferences(folder) if data.is_held_out(pair)]
    chosen, rejected = ([getattr(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    return metrics.preference_accuracy(scorer.dialogues(chosen), scorer.dialogues(rejected))


def row(name: str, margin: float | str, texts: int | str, accuracy: metrics.Accuracy) -> str:
    """One line of the pair table."""
    low, high = accuracy.interval
    return f"| {name} | {margin} | {texts} | {accuracy.pairs} | {accuracy.mean:.3f} [{low:.3f}, {high:.3f}] |"


def report(folder: Path, model_folder: Path) -> str:
    """Both tables as Markdown."""
    items = read_marked(folder / "toxic_spans" / "tsd_trial.csv")
    with Scorer(model_folder) as scorer:
        scored = scorer.texts([item.text for item in items])
        pairs = pair_table(scorer, folder)
    add_baselines(items, scored, read_lexicon(folder / "vader" / "vader_lexicon.txt"))
    return f"{token_table(items, scored)}\n\n{pairs}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the embedded reward model.")
    parser.add_argument("--data", type=Path, required=True, help="folder with vader/, davidson/, toxic_spans/ ..")
    parser.add_argument("--model", type=Path, help="a model folder; the embedded model if left out")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tables = report(arguments.data, arguments.model or ensure_default_model())
    print(tables)
    if arguments.output:
        arguments.output.write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    main()
