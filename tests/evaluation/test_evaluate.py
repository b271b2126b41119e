"""Metrics on literal arrays and beside naive loops; the scoring seam and the tables on a small random model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from densereward.default_model.batches import Template
from densereward.evaluation import metrics
from densereward.evaluation.evaluate import (
    Marked,
    add_baselines,
    lexicon_rewards,
    read_lexicon,
    read_marked,
    text_metrics,
    token_table,
)
from densereward.evaluation.scoring import Scorer, TextRewards, character_spans

TEXT = "  A dull, grey day."


@pytest.fixture
def scorer(
    classifier: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Iterator[Scorer]:
    """The small random classifier behind the service."""
    classifier.train(False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with Scorer(tmp_path) as scorer:
        yield scorer


def flags(text: str, *marked: str) -> metrics.Bools:
    characters = np.zeros(len(text), dtype=bool)
    for part in marked:
        characters[text.index(part) : text.index(part) + len(part)] = True
    return characters


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auroc_equals_counting_pairs(rows: list[tuple[int, bool]]) -> None:
    rewards, harmful = np.array([r for r, _ in rows], dtype=np.float64), np.array([h for _, h in rows])
    pairs = [(a, b) for a in rewards[harmful] for b in rewards[~harmful]]
    expected = np.mean([float(a < b) + 0.5 * float(a == b) for a, b in pairs]) if pairs else np.nan
    assert metrics.auroc(rewards, harmful) == pytest.approx(expected, nan_ok=True)


def test_lowest_shares_ties() -> None:
    assert metrics.lowest_is_harmful(np.array([1.0, -2.0, -2.0, -2.0]), np.array([True, True, False, False])) == 1 / 3


def test_spans_of_tokens_and_words() -> None:
    tokens = metrics.stripped(TEXT, np.array([[0, 3], [3, 8], [8, 9], [0, 1]]))
    assert tokens.tolist() == [[2, 3], [4, 8], [8, 9], [1, 1]]
    characters = flags(TEXT, "dull")
    assert metrics.overlaps(tokens, characters).tolist() == [False, True, False, False]
    words = metrics.word_spans(TEXT)
    assert [TEXT[start:end] for start, end in words] == ["A", "dull,", "grey", "day."]
    assert metrics.overlaps(words, characters).tolist() == [False, True, False, False]
    means = metrics.word_means(words, tokens, np.array([4.0, 1.0, 3.0, 9.0]))
    assert means.tolist() == [4.0, 2.0, 0.0, 0.0]


def test_marks_past_the_end_are_dropped() -> None:
    assert metrics.labels_of([1, 2, 7], 3).tolist() == [False, True, True]


def test_bootstrap_interval_holds_the_mean_and_narrows() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = metrics.bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)


def test_ranking_accuracy_equals_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    rewards, labels = rng.integers(0, 5, 40).astype(float), rng.normal(size=40)
    accuracy = metrics.ranking_accuracy(rewards, labels, 1.0)
    hits = [
        float(rewards[i] > rewards[j]) + 0.5 * float(rewards[i] == rewards[j])
        for i in range(40)
        for j in range(40)
        if labels[i] - labels[j] >= 1.0
    ]
    assert accuracy.mean == pytest.approx(np.mean(hits))
    assert accuracy.pairs == len(hits)
    assert accuracy.interval[0] < accuracy.mean < accuracy.interval[1]


def test_preference_accuracy_and_the_mean_over_sets() -> None:
    first = metrics.preference_accuracy(np.array([1.0, 2.0, 0.0, 5.0]), np.array([0.0, 2.0, 1.0, 4.0]))
    assert (first.mean, first.pairs) == (0.625, 4)
    second = metrics.preference_accuracy(np.ones(4), np.zeros(4))
    assert metrics.mean_accuracy([first, second]).mean == pytest.approx(0.8125)
    assert second.interval == (1.0, 1.0)


def test_token_rewards_through_the_service_equal_separate_prefixes(
    scorer: Scorer, classifier: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase
) -> None:
    (result,) = scorer.texts([TEXT])
    count = len(result.spans)
    assert {name: len(rewards) for name, rewards in result.rewards.items()} == dict.fromkeys(result.rewards, count)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    template = Template.of(tokenizer)
    with torch.no_grad():
        closed = [
            classifier(torch.tensor([template.prompt + ids[:end] + template.closing])).logits.item()
            for end in range(count + 1)
        ]
        started = classifier.score(classifier.model(torch.tensor([template.prompt])).last_hidden_state)[0, -1].item()
    np.testing.assert_allclose(result.rewards["red closed"], np.diff(closed), atol=1e-6)
    assert result.rewards["red open"].sum() == pytest.approx(closed[-1] - started, abs=1e-6)
    assert result.rewards["abc"].sum() == pytest.approx(closed[-1], abs=1e-6)


def test_answers_are_scored_where_stock_pooling_reads(
    scorer: Scorer, classifier: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = ["A fine day.", "Rain", "A fine evening with tea and cake."]
    template = Template.of(tokenizer)
    ids = [template.prompt + tokenizer(text, add_special_tokens=False).input_ids + template.closing for text in texts]
    padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        logits = classifier(**padded).logits[:, 0].numpy()
    np.testing.assert_allclose(scorer.answers(texts), logits, atol=1e-6)


def test_byte_spans_become_character_spans() -> None:
    text = "é 😀!"
    spans = character_spans(text, [(0, 2), (2, 5), (5, 7), (7, 8), (8, 8)])
    assert spans.tolist() == [[0, 1], [1, 3], [2, 3], [3, 4], [4, 4]]


def test_the_lexicon_looks_under_case_and_punctuation() -> None:
    text = "A Dull, grey day :) -"
    tokens = np.array([[0, 1], [2, 4], [4, 6], [6, 7], [8, 12], [13, 16], [17, 18], [18, 19], [20, 21], [21, 21]])
    rewards = lexicon_rewards({"dull": -1.5, ":)": 2.0, "day": 0.5}, text, tokens)
    assert rewards.tolist() == [0.0, -1.5, -1.5, 0.0, 0.0, 0.5, 2.0, 2.0, 0.0, 0.0]


def test_table_of_a_method_that_finds_the_marked_word(tmp_path: Path) -> None:
    file = tmp_path / "spans.csv"
    file.write_text('spans,text\n"[4, 5, 6, 7]",The dull day\n[],A fine day\n[0],' + "long " * 100 + "\n")
    items = read_marked(file)
    assert [item.text for item in items] == ["The dull day", "A fine day"]
    spans = np.array([[0, 3], [3, 8], [8, 12]])
    scored = [TextRewards(spans, {"finds": np.array([1.0, -1.0, 0.0])}) for _ in items]
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("dull\t-1.7\t0.9\t[-1]\n")
    add_baselines(items, scored, read_lexicon(lexicon))
    assert scored[0].rewards["lexicon"].tolist() == [0.0, -1.7, 0.0]
    assert text_metrics(items[0], scored[0], "finds") == (1.0, 1.0, 1.0)
    assert text_metrics(items[0], scored[0], "constant") == (0.5, 0.5, 1 / 3)
    assert np.isnan(text_metrics(items[1], scored[1], "finds")).all()
    lines = token_table(items, scored).splitlines()
    assert "(n = 1)" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["finds", "lexicon", "constant", "random"]
    assert "1.000 [1.000, 1.000]" in lines[2]


def test_marked_text_of_one_class_has_no_metric() -> None:
    item = Marked("Dull", flags("Dull", "Dull"))
    result = TextRewards(np.array([[0, 4]]), {"any": np.array([0.0])})
    assert np.isnan(text_metrics(item, result, "any")).all()
