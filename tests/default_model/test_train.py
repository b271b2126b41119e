"""Trees equal separate passes, targets are the running sums, and a resumed run equals one that never stopped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from densereward.default_model import data, train
from densereward.default_model.batches import (
    BatchBuilder,
    Deck,
    Joined,
    Places,
    Sampler,
    Template,
    dialogue_ids,
    join,
    pool_of,
)
from densereward.default_model.train import Recipe, Trainer
from densereward.default_model.trees import TokenTree, collate, score_nodes

RECIPE = Recipe(steps=6, rank=2, texts=4, warmup=0.2, learning_rate=5e-3)
GOOD = ["A calm and sunny day.", "The soup was lovely.", "What a kind thing to do."]
BAD = ["A cold and rainy day.", "The soup was awful.", "What a tiresome thing to do."]


def items() -> tuple[list[data.Rated], list[data.Preference]]:
    sources = ("movie", "amazon", "davidson")
    rated = [data.Rated(s, text, text, 2.0) for s, text in zip(sources, GOOD, strict=True)]
    rated += [data.Rated(s, text, text, -2.0) for s, text in zip(sources, BAD, strict=True)]
    asked = {"role": "user", "content": "Tea?"}
    answers = [{"role": "assistant", "content": text} for text in ("Yes, please.", "Go away.")]
    return rated, [data.Preference("hh", "Tea?", (asked, answers[0]), (asked, answers[1]))]


def test_template_of_the_base(tokenizer: PreTrainedTokenizerBase) -> None:
    template = Template.of(tokenizer)
    assert template.closing == [2, 198]
    assert tokenizer.decode(template.closing) == "<|im_end|>\n"
    assert str(tokenizer.decode(template.prompt)).endswith("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")


def test_tree_scores_equal_separate_passes(classifier: LlamaForSequenceClassification) -> None:
    sequences = [[1, 5, 6, 7], [1, 5, 6, 8, 9], [1, 5], [1, 5, 6, 7, 2], [3, 4]]
    trees = [TokenTree(), TokenTree()]
    places = [(i % 2, trees[i % 2].add(ids)) for i, ids in enumerate(sequences)]
    assert [len(tree) for tree in trees] == [6, 7]
    with torch.no_grad():
        scores = score_nodes(classifier.model, classifier.score, collate(trees))
        for ids, (row, nodes) in zip(sequences, places, strict=True):
            hidden = classifier.model(torch.tensor([ids])).last_hidden_state
            torch.testing.assert_close(scores[row, nodes], classifier.score(hidden)[0, :, 0], atol=1e-6, rtol=1e-5)


def test_joined_targets_are_clipped_running_sums() -> None:
    joined = join([([10, 11], 2.5), ([12], -1.0), ([13, 14], 9.0)], limit=6.0)
    assert joined == Joined([10, 11, 12, 13, 14], [2.5, 2.5, 1.5, 6.0, 6.0], [0.5, 1.0, 1.0, 0.5, 1.0])
    assert joined.ends == [2, 3, 5]


def test_builder_points_at_the_right_tokens() -> None:
    template = Template(prompt=[1, 9], closing=[2, 3])
    builder = BatchBuilder(template, np.random.default_rng(0), cuts=4)
    builder.add_text(join([([10, 11], 1.0), ([12], 2.0)]))
    builder.add_pair([1, 9, 20, 2, 3], [1, 9, 21, 2, 3])
    batch, places = builder.build()
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    assert ids[places.open].tolist() == [9, 10, 11, 12]
    assert places.open_target == [0.0, 1.0, 1.0, 3.0]
    assert places.open_weight == [1.0, 0.5, 1.0, 1.0]
    assert (ids[places.final].tolist(), positions[places.final].tolist()) == ([3, 3], [5, 6])
    assert places.final_target == [1.0, 3.0]
    assert positions[places.cut_closed].tolist() == (positions[places.cut_open] + 2).tolist()
    assert ids[places.cut_closed].tolist() == [3] * 4
    assert ids[[places.chosen[0] - 2, places.rejected[0] - 2]].tolist() == [20, 21]


def test_losses_on_literal_scores() -> None:
    places = Places(
        final=[0], final_target=[1.0], cut_closed=[1], cut_open=[2], cut_target=[0.0], open=[2, 3],
        open_target=[0.0, 2.0], open_weight=[1.0, 3.0], chosen=[3], rejected=[0],
    )  # fmt: skip
    terms = train.loss_terms(torch.tensor([[3.0, 2.0], [1.0, 4.0]]), places)
    expected = {"final": 4.0, "cut": 4.0, "open": (1 + 3 * 4) / 4, "distil": 1.0}
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected)
    assert terms["pair"].item() == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-5)


def test_a_deck_deals_every_item_once_a_pass() -> None:
    deck, rng = Deck(5), np.random.default_rng(0)
    assert [sorted(deck.draw(rng) for _ in range(5)) for _ in range(2)] == [[0, 1, 2, 3, 4]] * 2


def test_sampler_splits_davidson_and_draws_the_asked_number(tokenizer: PreTrainedTokenizerBase) -> None:
    rated, pairs = items()
    sampler = Sampler(rated, pairs, tokenizer, seed=1)
    assert {pool_of(item) for item in rated} == {"movie", "amazon", "clean", "offensive"}
    texts = sampler.texts(30)
    assert sum(len(text.ends) for text in texts) == 30
    assert sampler.preferences(2) == pairs * 2


def make_trainer(
    base: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    recipe: Recipe = RECIPE,
) -> Trainer:
    output.mkdir(exist_ok=True)
    return Trainer(recipe, base, tokenizer, items(), output)


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def copy_of(model: LlamaForSequenceClassification) -> LlamaForSequenceClassification:
    other: LlamaForSequenceClassification = LlamaForSequenceClassification(model.config)
    other.load_state_dict(model.state_dict())
    return other


def test_a_resumed_run_equals_an_unbroken_one(
    classifier: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = make_trainer(copy_of(classifier), tokenizer, tmp_path / "whole")
    for _ in range(RECIPE.steps):
        whole.update()
    first = make_trainer(copy_of(classifier), tokenizer, tmp_path / "broken")
    for _ in range(2):
        first.update()
    first.save()
    second = make_trainer(copy_of(classifier), tokenizer, tmp_path / "broken")
    torch.manual_seed(123)  # the checkpoint must bring its own random state: dropout draws from it
    second.load()
    assert second.step == 2
    while second.progress() < 1:
        second.update()
    expected = trained_weights(whole)
    assert expected
    for name, weight in trained_weights(second).items():
        assert torch.equal(weight, expected[name]), name


def test_training_lowers_the_loss_and_exports_an_adapter_without_paths(
    classifier: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, steps=100, dropout=0.0, rank=8, texts=8, learning_rate=3e-2)
    trainer = make_trainer(classifier, tokenizer, tmp_path, recipe)
    log = tmp_path / "log.jsonl"
    with log.open("w") as file:
        train.run(trainer, file, every=20)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60, 80, 100]
    assert lines[-1]["final"] < 0.5 * lines[0]["final"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == train.BASE_NAME
    assert str(tmp_path) not in json.dumps(config)


def test_rewind_drops_what_will_be_written_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"recipe": {}}\n{"step": 20}\n{"step": 40}\n')
    train.rewind(log, 20)
    assert log.read_text() == '{"recipe": {}}\n{"step": 20}\n'


def test_long_pairs_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    _, pairs = items()
    longest = max(len(dialogue_ids(tokenizer, side)) for side in (pairs[0].chosen, pairs[0].rejected))
    assert train.short_pairs(pairs, tokenizer, longest) == pairs
    assert train.short_pairs(pairs, tokenizer, longest - 1) == []
