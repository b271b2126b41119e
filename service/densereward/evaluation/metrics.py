"""Token rewards against human spans, sequence rewards against human orders: pure functions on arrays."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Spans = NDArray[np.int64]  # (n, 2): start and end, in characters


def auroc(rewards: Floats, harmful: Bools) -> float:
    """Chance that a harmful item has a lower reward than a harmless one, ties one half; both of shape (n,).

    nan where the labels are all of one class. The rank form of Mann and Whitney's statistic.
    """
    positives = int(harmful.sum())
    negatives = harmful.size - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    below = np.sort(rewards[~harmful])
    higher = below.size - np.searchsorted(below, rewards[harmful], side="right")
    equal = below.size - np.searchsorted(below, rewards[harmful], side="left") - higher
    return float((higher + 0.5 * equal).sum() / (positives * negatives))


def lowest_is_harmful(rewards: Floats, harmful: Bools) -> float:
    """Share of the lowest-reward items (one, or all that tie for it) that are harmful; nan without items."""
    return float(harmful[rewards == rewards.min()].mean()) if rewards.size else float("nan")


def overlaps(spans: Spans, characters: Bools) -> Bools:
    """Whether each span (n, 2) touches a marked character; `characters` has one flag a character of the text."""
    marked = np.concatenate([[0], np.cumsum(characters)])
    limited = np.minimum(spans, characters.size)
    overlap: Bools = marked[limited[:, 1]] > marked[limited[:, 0]]
    return overlap


def stripped(text: str, spans: Spans) -> Spans:
    """The spans without the white space they begin with; an all-white span becomes empty at its end."""
    starts = [end - len(text[start:end].lstrip()) for start, end in spans]
    return np.stack([np.array(starts, dtype=np.int64), spans[:, 1]], axis=1)


def word_spans(text: str) -> Spans:
    """Spans of the white-space separated words, (words, 2)."""
    return np.array([match.span() for match in re.finditer(r"\S+", text)], dtype=np.int64).reshape(-1, 2)


def word_means(words: Spans, tokens: Spans, rewards: Floats) -> Floats:
    """Mean reward of the tokens that touch each word, (words,); `tokens` without leading white space."""
    touches = (tokens[None, :, 0] < words[:, None, 1]) & (tokens[None, :, 1] > words[:, None, 0])
    counts = touches.sum(axis=1)
    means: Floats = (touches @ rewards) / np.maximum(counts, 1)
    return means


def bootstrap_interval(values: Floats, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, which are drawn again with replacement."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, values.size, values.size)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs in the right order, how many pairs, and the means of bootstrap draws (draws,)."""

    mean: float
    pairs: int
    draws: Floats

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile interval."""
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return float(low), float(high)


def ranking_accuracy(rewards: Floats, labels: Floats, margin: float, draws: int = 500, seed: int = 0) -> Accuracy:
    """Share of all pairs of texts with labels at least `margin` apart that the rewards put in the same order.

    Ties count one half. The bootstrap draws texts, not pairs: pairs that share a text are not independent.
    """
    clear = (labels[:, None] - labels[None, :] >= margin).astype(np.float64)
    hits = clear * ((rewards[:, None] > rewards[None, :]) + 0.5 * (rewards[:, None] == rewards[None, :]))
    size, rng = labels.size, np.random.default_rng(seed)
    counts = rng.multinomial(size, np.full(size, 1 / size), size=draws).astype(np.float64)
    means = ((counts @ hits) * counts).sum(axis=1) / ((counts @ clear) * counts).sum(axis=1)
    return Accuracy(float(hits.sum() / clear.sum()), int(clear.sum()), means)


def preference_accuracy(better: Floats, worse: Floats, draws: int = 500, seed: int = 0) -> Accuracy:
    """Share of pairs (n,) whose better side has the higher reward, ties one half; the bootstrap draws pairs."""
    hits = (better > worse) + 0.5 * (better == worse)
    means = hits[np.random.default_rng(seed).integers(0, hits.size, (draws, hits.size))].mean(axis=1)
    return Accuracy(float(hits.mean()), hits.size, means)


def mean_accuracy(parts: Sequence[Accuracy]) -> Accuracy:
    """Mean over sets, each with the same weight; the sets' bootstrap draws are independent of one another."""
    means = np.mean([part.draws for part in parts], axis=0)
    return Accuracy(float(np.mean([part.mean for part in parts])), sum(part.pairs for part in parts), means)


def labels_of(indexes: Sequence[int], length: int) -> Bools:
    """Flags a character from a list of marked character offsets; offsets past the end are dropped."""
    flags = np.zeros(length, dtype=bool)
    flags[[i for i in indexes if 0 <= i < length]] = True
    return flags
