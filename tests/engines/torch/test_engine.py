"""The packed engine against transformers' eager attention, and against itself in other company."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, Qwen2MoeConfig

import reference
import tiny
from densereward.capture import (
    AttentionRow,
    Captured,
    Contributions,
    Gradients,
    Need,
    Prefixes,
    PrefixScores,
    ReceivedAttention,
    ScoringInput,
)
from densereward.engines.torch.chunks import Chunk, expand
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.kv_cache import KVCache, PromptCache
from densereward.engines.torch.packed_batch import PackedBatch
from densereward.engines.torch.packing import pack
from densereward.errors import EngineFailure, ModelError

LAYERS = 3
CLOSING = (2, 201)
ROWS = [AttentionRow(layer) for layer in range(LAYERS)]
OPEN: frozenset[Need] = frozenset([PrefixScores(), *ROWS])
SIGNED = [kind(layer) for kind in (Contributions, ReceivedAttention) for layer in range(LAYERS)]
ALL: frozenset[Need] = frozenset([PrefixScores(), PrefixScores("closed"), *ROWS, *SIGNED, Gradients()])


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchEngine, Any]:
    """Our engine and the eager reference on the same random weights."""
    folder = tiny.save(tmp_path_factory.mktemp(request.param), request.param)
    return TorchEngine.load(str(folder), device="cpu"), reference.eager(folder)


def sequence(
    length: int, prompt: int, closing: int = 0, *, seed: int = 0, needs: Any = ALL, prompt_seed: int | None = None
) -> ScoringInput:
    """`length` random ids, the last of them closing tokens; prompts of one `prompt_seed` begin alike."""
    before = random.Random(seed if prompt_seed is None else prompt_seed).choices(range(3, 320), k=prompt)
    after = random.Random(seed * 1000 + length).choices(range(3, 320), k=length - prompt - closing)
    return ScoringInput([*before, *after, *CLOSING[:closing]], prompt, len(after), length - 1, CLOSING, needs)


def mixed_batch(size: int) -> list[ScoringInput]:
    generator = random.Random(size)
    batch = []
    for seed in range(size):
        length = generator.choice([1, 2, 5, 9, 10, 17, 40, 90])
        closing = int(length > 3 and seed % 2)
        prompt = generator.randrange(length - closing)
        batch.append(sequence(length, prompt, closing, seed=seed, prompt_seed=generator.choice([0, 1, seed])))
    return batch


def packed_row(batch: list[ScoringInput]) -> PackedBatch:
    return pack([Chunk.after(expand(each), None) for each in batch], torch.device("cpu"), LAYERS)


def assert_prefixes(prefixes: Prefixes, expected: list[float]) -> None:
    """`expected` begins with s_0 wherever there is one."""
    scores = [*([] if prefixes.before is None else [prefixes.before]), *prefixes.after]
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)


def assert_same(first: Captured, second: Captured, tolerance: float) -> None:
    assert first.prefixes.keys() == second.prefixes.keys()
    largest = [float(np.abs(prefixes.after).max(initial=0)) for prefixes in second.prefixes.values()]
    scale = max(1.0, abs(second.reward), *largest)
    assert abs(first.reward - second.reward) <= tolerance * scale
    for mode, prefixes in second.prefixes.items():
        np.testing.assert_allclose(first.prefixes[mode].after, prefixes.after, atol=tolerance * scale, rtol=0)
        assert first.prefixes[mode].before == pytest.approx(prefixes.before, abs=tolerance * scale)
    if second.gradients is not None:
        assert first.gradients is not None
        size = max(1.0, float(np.abs(second.gradients).max(initial=0)))
        np.testing.assert_allclose(first.gradients, second.gradients, atol=tolerance * size, rtol=0)
    for kind in ("attention_rows", "contributions", "received_attention"):
        mine, others = getattr(first, kind), getattr(second, kind)
        assert mine.keys() == others.keys()
        for layer, row in mine.items():
            size = max(1.0, float(np.abs(others[layer]).max(initial=0)))
            np.testing.assert_allclose(row, others[layer], atol=tolerance * size, rtol=0)


def test_scores_prefixes_and_rows_equal_a_padded_eager_run(pair: tuple[TorchEngine, Any]) -> None:
    engine, model = pair
    lengths = [(30, 7, 0), (2, 1, 0), (90, 40, 2), (11, 0, 0), (1, 0, 0)]
    batch = [sequence(*each, needs=OPEN) for each in lengths]
    for each, captured, read in zip(
        batch, engine.forward(batch), reference.padded(model, [each.token_ids for each in batch]), strict=True
    ):
        response = slice(each.prompt_length, each.response_stop)
        expected = Captured(
            reward=float(read.scores[-1]),
            length=each.response_length,
            prefixes={
                "open": Prefixes(
                    before=float(read.scores[each.prompt_length - 1]) if each.prompt_length else None,
                    after=read.scores[response].numpy(),
                )
            },
            attention_rows={layer: read.rows[layer, response].numpy() for layer in range(LAYERS)},
        )
        assert_same(captured, expected, 1e-5)


def test_prefix_scores_equal_one_pass_per_prefix(pair: tuple[TorchEngine, Any]) -> None:
    engine, model = pair
    each = sequence(28, 9, 2)
    captured = engine.forward([each])[0]
    expected = reference.prefix_scores(model, each.token_ids[:9], each.response_ids)
    assert_prefixes(captured.prefixes["open"], expected)
    closed = reference.prefix_scores(model, each.token_ids[:9], each.response_ids, closing=CLOSING)
    assert_prefixes(captured.prefixes["closed"], closed)
    assert captured.reward == pytest.approx(reference.score(model, each.token_ids), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    "response", [[7, 8, 2], [7, 2, 201], [2, 2, 201, 7], [2], [201, 2, 9], []], ids=lambda ids: " ".join(map(str, ids))
)
@pytest.mark.parametrize("prompt", [[5, 6, 7], []], ids=["prompt", "no prompt"])
def test_a_prefix_that_ends_with_closing_tokens_is_only_given_the_rest(
    pair: tuple[TorchEngine, Any], prompt: list[int], response: list[int]
) -> None:
    engine, model = pair
    each = ScoringInput(
        [*prompt, *response, 9],
        prompt_length=len(prompt),
        response_length=len(response),
        scored_position=len(prompt) + len(response),
        closing_ids=CLOSING,
        needs=ALL,
    )
    expected = reference.prefix_scores(model, prompt, response, closing=CLOSING)
    assert_prefixes(engine.forward([each])[0].prefixes["closed"], expected)


def test_closed_prefixes_without_closing_tokens_are_the_open_ones(pair: tuple[TorchEngine, Any]) -> None:
    engine, _ = pair
    captured = engine.forward([replace(sequence(12, 4), closing_ids=()), replace(sequence(5, 0), closing_ids=())])
    for each in captured:
        np.testing.assert_allclose(each.prefixes["open"].after, each.prefixes["closed"].after, atol=1e-6)
        assert each.prefixes["open"].before == pytest.approx(each.prefixes["closed"].before, abs=1e-6)


def test_responses_that_share_a_prompt_have_the_numbers_they_have_alone(pair: tuple[TorchEngine, Any]) -> None:
    engine, _ = pair
    group = [sequence(40 + length, 40, 2 * (length > 4), seed=length, prompt_seed=7) for length in (1, 3, 9, 30, 55)]
    other = [sequence(12 + length, 12, seed=length, prompt_seed=8) for length in (2, 20)]
    batch = [group[0], other[0], *group[1:3], sequence(9, 3), *group[3:], other[1], replace(group[1], needs=OPEN)]
    packed = packed_row(batch)
    assert [len(prompt) for prompt, _ in packed.groups] == [40, 12]
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        assert_same(captured, engine.forward([each])[0], 2e-6)


def test_a_shared_prompt_stands_once_in_the_row() -> None:
    batch = [sequence(44, 40, seed=seed, prompt_seed=7, needs=OPEN) for seed in range(8)]
    assert packed_row(batch).token_ids.shape == (1, 40 + 8 * 4)


def test_a_sequence_that_is_all_prompt_is_read_at_its_end_beside_others_that_go_on(
    pair: tuple[TorchEngine, Any],
) -> None:
    engine, model = pair
    longer = sequence(12, 8, prompt_seed=7)
    ends = ScoringInput(longer.token_ids[:8], 8, 0, 7, CLOSING, ALL)
    captured = engine.forward([longer, ends, longer])
    assert captured[1].reward == pytest.approx(reference.score(model, ends.token_ids), abs=1e-5)
    assert captured[1].prefixes["open"].after.shape == (0,)


def test_a_sample_has_the_same_numbers_alone_in_a_batch_of_64_and_in_any_order(pair: tuple[TorchEngine, Any]) -> None:
    engine, _ = pair
    batch = mixed_batch(64)
    together = engine.forward(batch)
    order = random.Random(1).sample(range(64), 64)
    shuffled = engine.forward([batch[i] for i in order])
    for place, i in enumerate(order):
        assert_same(shuffled[place], together[i], 1e-6)
    for i in range(0, 64, 7):
        assert_same(engine.forward([batch[i]])[0], together[i], 1e-6)


@pytest.mark.parametrize("tokens", [7, 16, 50])
def test_a_sequence_too_long_for_one_pass_has_the_same_numbers_in_pieces(
    pair: tuple[TorchEngine, Any], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    engine, _ = pair
    batch = [sequence(90, 20, 2, seed=1), sequence(60, 0, 1, seed=2), sequence(61, 59, seed=3, needs=OPEN)]
    expected = [engine.forward([each])[0] for each in batch]
    monkeypatch.setattr(engine, "facts", replace(engine.facts, batch_tokens=tokens))
    for each, captured in zip(batch, expected, strict=True):
        assert_same(engine.forward([each])[0], captured, 4e-6)


def test_a_prompt_that_comes_again_is_kept_and_gives_the_same_numbers(tmp_path: Path) -> None:
    for architecture in tiny.ARCHITECTURES:
        folder = str(tiny.save(tmp_path / architecture, architecture))
        plain, keeping = TorchEngine.load(folder), TorchEngine.load(folder, prompt_cache=2**24)
        ran: list[int] = []
        count_tokens(keeping, ran)
        group = [sequence(70 + length, 70, 2 * (length > 3), seed=length, prompt_seed=7) for length in (1, 9, 30)]
        alone = sequence(80, 75, seed=5, prompt_seed=8)
        for batch in ([group[0], alone], group[1:], [group[2], alone], [*group, sequence(9, 2)], [alone]):
            for captured, each in zip(keeping.forward(batch), batch, strict=True):
                assert_same(captured, plain.forward([each])[0], 4e-6)
        trunk = len(expand(group[2]).ids) - 70
        # First sight, second sight (kept from here on), then only what follows the prompt's last token but one.
        assert ran[2] == 1 + trunk + len(expand(alone).ids)
        assert ran[4] == len(expand(alone).ids) - 74


def count_tokens(engine: TorchEngine, counts: list[int]) -> None:
    """Append the tokens of every pass; the scored tokens that run again for contributions are no pass."""

    def count(_: object, __: object, inputs: Any) -> None:
        if isinstance(inputs["packed"], PackedBatch):
            counts.append(inputs["input_ids"].shape[1])

    backbone: Any = engine._passes.backbone
    backbone.register_forward_pre_hook(count, with_kwargs=True)


def test_kept_prompts_stay_within_their_bytes_and_the_longest_unused_goes_first() -> None:
    kept = [KVCache() for _ in range(3)]
    for each in kept:
        each.extend(0, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))
    assert kept[0].size == 64
    prompts = PromptCache(128)
    prompts.store((0,), kept[0])
    prompts.store((1,), kept[1])
    assert prompts.get((0,)) is kept[0]
    prompts.store((2,), kept[2])
    assert [prompts.get((i,)) for i in range(3)] == [kept[0], None, kept[2]]


def test_without_bytes_no_prompt_is_kept() -> None:
    prompts = PromptCache(0)
    assert [prompts.seen_before((1,)) for _ in range(3)] == [False] * 3


def test_closed_prefixes_at_boundaries_are_those_of_all_prefixes(pair: tuple[TorchEngine, Any]) -> None:
    engine, _ = pair
    whole = sequence(50, 12, 2, seed=4)
    boundaries = [1, 7, 8, 30, whole.response_length]
    batch = [sequence(9, 3), replace(whole, boundaries=boundaries), sequence(12, 0)]
    some, every = engine.forward(batch)[1], engine.forward([whole])[0]
    closed = some.prefixes["closed"]
    assert closed.before == pytest.approx(every.prefixes["closed"].before, abs=2e-6)
    expected = every.prefixes["closed"].after[np.array(boundaries) - 1]
    np.testing.assert_allclose(closed.after, expected, atol=2e-6 * max(1.0, float(np.abs(expected).max())), rtol=0)
    np.testing.assert_allclose(some.prefixes["open"].after, every.prefixes["open"].after, atol=1e-5, rtol=0)


def test_running_out_of_memory_is_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _shared_engine()

    def too_much(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine._passes, "backbone", too_much)
    with pytest.raises(EngineFailure, match="--max-batch-tokens") as failure:
        engine.forward([sequence(9, 3)])
    assert failure.value.error_code == "out_of_memory"


def test_rows_are_shares_of_one_over_the_whole_sequence_and_its_sinks(pair: tuple[TorchEngine, Any]) -> None:
    engine, model = pair
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    for captured in engine.forward([sequence(40, 0), sequence(5, 0)]):
        for row in captured.attention_rows.values():
            assert (row >= 0).all()
            assert row.sum() < 0.9 if sinks else row.sum() == pytest.approx(1, abs=1e-5)


def test_the_head_is_read_at_the_scored_position_and_not_at_the_end() -> None:
    engine = TorchEngine(_prepared(tiny.make_model("llama")))
    whole = sequence(12, 4)
    cut = ScoringInput(whole.token_ids, 4, 6, scored_position=9, closing_ids=CLOSING, needs=ALL)
    short = ScoringInput(whole.token_ids[:10], 4, 6, scored_position=9, closing_ids=CLOSING, needs=ALL)
    assert_same(engine.forward([cut])[0], engine.forward([short])[0], 1e-6)


def test_a_pad_token_inside_a_sequence_changes_nothing_about_where_it_is_read() -> None:
    engine = TorchEngine(_prepared(tiny.make_model("llama")))
    pad = 2
    ids = [5, 6, 7, pad, 8, pad]
    with torch.no_grad():
        hidden = _eager_llama().base_model(input_ids=torch.tensor([ids])).last_hidden_state
        expected = _eager_llama().score(hidden)[0, -1, 0]
    captured = engine.forward([ScoringInput(ids, 2, 4, 5)])[0]
    assert captured.reward == pytest.approx(float(expected), abs=1e-6)


def test_only_what_a_sequence_needs_is_kept_for_it() -> None:
    engine = TorchEngine(_prepared(tiny.make_model("llama")))
    plain = sequence(9, 3, needs=frozenset())
    row = sequence(9, 3, needs=frozenset([AttentionRow(-1)]))
    prefixes = sequence(9, 3, needs=frozenset([PrefixScores()]))
    kept = engine.forward([plain, row, prefixes])
    assert kept[0] == Captured(reward=kept[0].reward, length=6)
    assert list(kept[1].attention_rows) == [-1]
    assert not kept[1].prefixes
    assert list(kept[2].prefixes) == ["open"]
    assert kept[2].prefixes["open"].after.shape == (6,)
    assert not kept[2].attention_rows
    assert len({captured.reward for captured in kept}) == 1


def test_a_layer_counted_from_the_end_is_the_layer_itself() -> None:
    engine = TorchEngine(_prepared(tiny.make_model("llama")))
    captured = engine.forward([sequence(9, 3, needs=frozenset([AttentionRow(2), AttentionRow(-1)]))])[0]
    np.testing.assert_array_equal(captured.attention_rows[2], captured.attention_rows[-1])
    assert AttentionRow(-LAYERS) in engine.provides
    assert AttentionRow(LAYERS) not in engine.provides
    assert AttentionRow(-LAYERS - 1) not in engine.provides


def test_an_empty_prompt_has_no_score_before_the_response() -> None:
    engine = TorchEngine(_prepared(tiny.make_model("llama")))
    captured = engine.forward([sequence(5, 0)])[0]
    assert captured.prefixes["open"].before is None
    assert captured.prefixes["open"].after.shape == (5,)
    assert captured.prefixes["closed"].before is not None


@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_packing_of_any_lengths_gives_each_sequence_its_own_numbers(lengths: list[int], seed: int) -> None:
    engine = _shared_engine()
    batch = [
        sequence(length, min(length, seed % 5), seed=seed + i, prompt_seed=i % 2) for i, length in enumerate(lengths)
    ]
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        assert_same(captured, engine.forward([each])[0], 2e-6)


def test_bfloat16_weights_keep_a_float32_head_and_stay_near_float32(tiny_llama: Path) -> None:
    wide = TorchEngine.load(str(tiny_llama), device="cpu")
    narrow = TorchEngine.load(str(tiny_llama), device="cpu", dtype="bfloat16")
    each = sequence(40, 10)
    captured, expected = narrow.forward([each])[0], wide.forward([each])[0]
    assert narrow.facts.dtype == "bfloat16"
    assert captured.reward == pytest.approx(expected.reward, abs=0.05)
    # A bfloat16 head would leave scores on bfloat16's grid.
    assert captured.reward != float(torch.tensor(captured.reward).bfloat16())


def test_an_attention_variant_that_is_not_computed_is_refused() -> None:
    from densereward.engines.torch.attention import packed_attention

    packed = packed_row([sequence(4, 1)])
    heads = torch.zeros(1, 2, packed.token_ids.shape[1], 8)
    module = torch.nn.Module()
    with pytest.raises(EngineFailure, match="position_bias"):
        packed_attention(module, heads, heads, heads, None, scaling=1.0, packed=packed, position_bias=torch.zeros(2))
    with pytest.raises(EngineFailure, match="does not hand the packed batch"):
        packed_attention(module, heads, heads, heads, None, scaling=1.0)
    module.is_causal = False  # type: ignore[assignment]
    with pytest.raises(EngineFailure, match="not plainly causal"):
        packed_attention(module, heads, heads, heads, None, scaling=1.0, packed=packed)


def test_a_window_that_only_a_mask_knows_of_is_refused() -> None:
    config: Any = Qwen2MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        pad_token_id=2,
    )
    config.num_labels = 1
    assert "sliding_attention" in config.layer_types
    with pytest.raises(ModelError, match="hides its sliding_attention"):
        TorchEngine(_prepared(AutoModelForSequenceClassification.from_config(config)))


def test_memory_on_the_blocked_path_grows_with_length_and_not_with_its_square() -> None:
    from densereward.engines.torch import attention, kernels

    seen: list[int] = []
    original = kernels.explicit

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(q.shape[1] * k.shape[1])
        return original(q, k, *rest)

    engine = TorchEngine(_prepared(tiny.make_model("gemma2")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "explicit", watched)
        engine.forward([sequence(1500, 10, needs=ALL - {Gradients()})])
    assert max(seen) <= kernels.QUERY_BLOCK * (1500 + kernels.QUERY_BLOCK)


def test_a_model_with_several_labels_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, num_labels=2)
    with pytest.raises(ModelError, match="num_labels = 2"):
        TorchEngine.load(str(folder), device="cpu")


def test_files_that_cannot_be_read_are_a_model_error(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="cannot load"):
        TorchEngine.load(str(folder), device="cpu")
    with pytest.raises(ModelError, match="cannot load"):
        TorchEngine.load(str(tmp_path / "nowhere"), device="cpu")


def test_a_model_whose_head_is_not_in_its_files_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.save(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["scores.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys .*score\.weight"):
        TorchEngine.load(str(folder), device="cpu")


def test_the_weights_fingerprint_changes_with_one_weight(tiny_llama: Path) -> None:
    model: Any = tiny.make_model("llama")
    first = TorchEngine(_prepared(model)).facts.weights_fingerprint
    assert TorchEngine(_prepared(model)).facts.weights_fingerprint == first
    with torch.no_grad():
        model.score.weight[0, 0] += 1e-3
    assert TorchEngine(_prepared(model)).facts.weights_fingerprint != first


def _prepared(model: Any) -> Any:
    from densereward.engines.torch import attention

    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return model


def _eager_llama() -> Any:
    model = tiny.make_model("llama")
    model.set_attn_implementation("eager")
    return model


_ENGINES: list[TorchEngine] = []


def _shared_engine() -> TorchEngine:
    if not _ENGINES:
        _ENGINES.append(TorchEngine(_prepared(tiny.make_model("llama"))))
    return _ENGINES[0]
