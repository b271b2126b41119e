"""Log-probabilities in packed passes against the model's own softmax over the whole vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import reference
import tiny
from densereward.capture import LogProbabilities, LogRatios, Need, PrefixScores, ScoringInput
from densereward.checks.numbers import self_check
from densereward.engines.torch import attention
from densereward.engines.torch.language_model import LanguageModel
from densereward.engines.torch.pair import Pair
from densereward.errors import ModelError
from densereward.heads import language_model as head
from densereward.heads import products

ARCHITECTURES = (*tiny.ARCHITECTURES, "cohere", "granite", "phi")
LOGS: frozenset[Need] = frozenset([LogProbabilities()])
ALONE: frozenset[Need] = frozenset([LogProbabilities(alone=True)])
ALL: frozenset[Need] = frozenset([LogProbabilities(), LogRatios(), PrefixScores("open")])
Two = tuple[LanguageModel, Any]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Two:
    """Our engine and the eager reference on the same random weights."""
    folder = tiny.save_language_model(tmp_path_factory.mktemp(request.param), request.param)
    return LanguageModel.load(str(folder), device="cpu"), _eager(folder)


def _eager(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def sequences(needs: frozenset[Need] = LOGS, longest: int = 90) -> list[ScoringInput]:
    """Some with one prompt, one without a response, one whose prompt is the whole of another's sequence."""
    random = np.random.default_rng(0)
    prompt = random.integers(3, 320, 70).tolist()
    lengths = [(70, 20, 2), (70, 5, 0), (70, 0, 2), (12, longest, 2), (1, 1, 0), (3, 8, 1)]
    return [
        ScoringInput(
            [*prompt[:start], *random.integers(3, 320, length).tolist(), *[2, 201][:closing]],
            start,
            length,
            start + length + closing - 1,
            needs=needs,
        )
        for start, length, closing in lengths
    ]


def assert_log_probabilities(found: Any, model: Any, each: ScoringInput) -> None:
    expected = reference.log_probabilities(model, each.token_ids, each.prompt_length)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


def test_log_probabilities_are_those_of_the_whole_softmax(two: Two) -> None:
    engine, model = two
    batch = sequences()
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        assert_log_probabilities(captured.log_probabilities, model, each)
        assert captured.reward == pytest.approx(
            reference.log_probabilities(model, each.token_ids, each.prompt_length).sum(), abs=2e-4
        )


def test_the_vocabulary_and_the_positions_may_be_taken_in_parts(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = two
    monkeypatch.setattr(head, "_POSITIONS", 7)
    monkeypatch.setitem(head._TOKENS, "cpu", 33)
    batch = sequences()
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        assert_log_probabilities(captured.log_probabilities, model, each)


def test_no_more_logits_are_there_than_the_parts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = products.product

    def watched(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = own(hidden, weight)
        sizes.append(logits.numel())
        return logits

    engine = LanguageModel(_prepared("llama"))
    monkeypatch.setattr(head, "product", watched)
    monkeypatch.setattr(head, "_POSITIONS", 64)
    monkeypatch.setitem(head._TOKENS, "cpu", 100)
    engine.forward(sequences(longest=200))
    assert max(sizes) == 6400


def _prepared(architecture: str) -> Any:
    model = tiny.make_model(architecture, 0, AutoModelForCausalLM)
    model.set_attn_implementation("densereward_packed")
    return model


def test_a_long_sequence_in_chunks_and_cached_prompts_give_the_same(two: Two, tmp_path: Path) -> None:
    _, model = two
    model.save_pretrained(tmp_path)
    engine = LanguageModel.load(str(tmp_path), device="cpu", batch_tokens=50, prompt_cache=2**24)
    for each in 3 * sequences(longest=150):
        [captured] = engine.forward([each])
        assert_log_probabilities(captured.log_probabilities, model, each)


def test_the_first_token_after_nothing_counts_as_given(two: Two) -> None:
    engine, model = two
    [captured] = engine.forward([ScoringInput([5, 6, 7], 0, 3, 2, needs=LOGS)])
    assert captured.log_probabilities is not None
    assert captured.log_probabilities[0] == 0
    expected = reference.log_probabilities(model, [5, 6, 7], 1)
    np.testing.assert_allclose(captured.log_probabilities[1:], expected, atol=2e-5)
    [single] = engine.forward([ScoringInput([5], 0, 1, 0, needs=LOGS)])
    assert single.reward == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [1.1, 0.9])
def test_a_model_that_does_more_with_its_logits_is_refused(dtype: torch.dtype, times: float) -> None:
    model = _prepared("llama").to(dtype)
    own = model.forward
    model.forward = lambda *args, **kwargs: _times(own(*args, **kwargs), times)
    with pytest.raises(ModelError, match="does something with its logits that is not known"):
        LanguageModel(model)


def _times(output: Any, factor: float) -> Any:
    output.logits = output.logits * factor
    return output


@pytest.mark.parametrize("name", ["logits_soft_cap", "lm_head_multiplier", "output_logit_soft_cap"])
def test_a_config_that_shapes_logits_in_an_unknown_way_is_refused(name: str) -> None:
    model = _prepared("llama")
    setattr(model.config, name, 30.0)
    with pytest.raises(ModelError, match=f"the config sets {name}"):
        LanguageModel(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_mix_tokens_by_other_means_than_attention_are_refused(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    kinds = ["linear_attention", "full_attention"]
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    attention.register()
    model = AutoModelForCausalLM.from_config(
        Qwen3NextConfig(**sizes, **heads, **ends, layer_types=kinds, linear_num_value_heads=4, linear_num_key_heads=2),
        dtype=dtype,
        attn_implementation=attention.IMPLEMENTATION,
    )
    with pytest.raises(ModelError, match="cannot be packed"):
        LanguageModel(model.eval(), longest=512)


def test_a_mixture_of_experts_is_read_like_any_other(tmp_path: Path) -> None:
    folder = tiny.save_language_model(tmp_path, "mixtral")
    engine = LanguageModel.load(str(folder), device="cpu")
    self_check(engine)
    batch = sequences()
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        assert_log_probabilities(captured.log_probabilities, _eager(folder), each)


def test_a_model_without_an_output_embedding_is_refused() -> None:
    model = tiny.make_model("llama")
    model.set_attn_implementation("densereward_packed")
    with pytest.raises(ModelError, match="it is no causal language model"):
        LanguageModel(model)


def test_a_pair_is_the_difference_of_its_models(tmp_path: Path) -> None:
    folders = [tiny.save_language_model(tmp_path / name, seed=seed) for seed, name in enumerate(["policy", "base"])]
    policy, base = (_eager(folder) for folder in folders)
    pair = Pair(*(LanguageModel.load(str(folder), device="cpu") for folder in folders))
    self_check(pair)
    batch = sequences(ALL)
    for each, captured in zip(batch, pair.forward(batch), strict=True):
        first, second = (
            reference.log_probabilities(model, each.token_ids, each.prompt_length) for model in (policy, base)
        )
        assert captured.log_probabilities is not None
        assert captured.log_ratios is not None
        np.testing.assert_allclose(captured.log_probabilities, first, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(captured.log_ratios, first - second, atol=4e-5)
        assert captured.reward == pytest.approx((first - second).sum(), abs=1e-3)
        after = np.cumsum((first - second)[: each.response_length])
        np.testing.assert_allclose(captured.prefixes["open"].after, after, atol=1e-3)
        assert captured.prefixes["open"].before == 0


def test_what_needs_only_the_policy_does_not_run_through_the_reference(tmp_path: Path) -> None:
    folders = [tiny.save_language_model(tmp_path / str(seed), seed=seed) for seed in range(2)]
    first, second = (LanguageModel.load(str(folder), device="cpu") for folder in folders)
    [own], [reference_own] = (model.forward([sequences()[0]]) for model in (first, second))
    alone, both = Pair(first, second).forward([sequences(ALONE)[0], sequences(ALL)[0]])
    assert alone.reward == pytest.approx(own.reward, abs=1e-4)
    assert both.reward == pytest.approx(own.reward - reference_own.reward, abs=1e-3)
    assert alone.log_ratios is None
    with pytest.raises(ModelError, match="policy and reference are the same model"):
        Pair(first, first)


def test_models_with_vocabularies_of_two_sizes_are_no_pair() -> None:
    larger = tiny.make_model("llama", 0, AutoModelForCausalLM, vocab_size=321)
    larger.set_attn_implementation("densereward_packed")
    with pytest.raises(ModelError, match="the policy has 320 tokens and the reference 321"):
        Pair(LanguageModel(_prepared("llama")), LanguageModel(larger))
