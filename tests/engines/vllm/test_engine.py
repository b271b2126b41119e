"""The vLLM engine against transformers' eager attention, whole and in chunks; preempted, over two ranks, killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reference
import tiny
from densereward.capture import AttentionRow, Need, PrefixScores, ScoringInput
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import EngineDied, EngineFailure, ModelError
from serving import children_named

pytestmark = pytest.mark.vllm

SCORES = 5e-5
ROWS = 1e-5
CHUNK = 64
LENGTHS = (1, 2, 40, CHUNK, CHUNK + 1, 150, 300)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen3": {},
    "mistral": {"head_dim": 32, "sliding_window": 50},
    "gemma2": {"head_dim": 32, "sliding_window": 50},
    "mixtral": {"head_dim": 32},
}
Start = Callable[..., Any]


def sequence(length: int, seed: int = 0, layers: int = 3, words: int = 320) -> ScoringInput:
    ids = random.Random(seed * 1000 + length).choices(range(3, words), k=length)
    needs: frozenset[Need] = frozenset([PrefixScores(), *(AttentionRow(layer) for layer in range(layers))])
    return ScoringInput(ids, length // 3, length - length // 3, length - 1, needs=needs)


def assert_eager(engine: Any, batch: list[ScoringInput], eager: Any) -> None:
    for captured, asked in zip(engine.forward(batch), batch, strict=True):
        read = reference.padded(eager, [asked.token_ids])[0]
        start = asked.prompt_length
        assert captured.reward == pytest.approx(float(read.scores[-1]), abs=SCORES)
        np.testing.assert_allclose(captured.prefixes["open"].after, read.scores[start:], atol=SCORES)
        for layer, row in captured.attention_rows.items():
            np.testing.assert_allclose(row, read.rows[layer][start:], atol=ROWS)


def metric(engine: Any, name: str) -> float:
    lines = [line for line in engine.metrics().decode().splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_and_every_prefix_is_eager_attentions_in_chunks_and_whole(
    architecture: str, start_vllm: Start, tmp_path: Path
) -> None:
    tiny.save(tmp_path, architecture, **ARCHITECTURES[architecture])
    engine = start_vllm(tmp_path, batch_tokens=CHUNK, max_num_seqs=8)
    try:
        assert engine.facts.notice is None
        assert_eager(engine, [sequence(length) for length in LENGTHS], reference.eager(tmp_path))
    finally:
        engine.close()


@pytest.fixture(scope="module")
def chunked(model_folder: Path, start_vllm: Start) -> Iterator[Any]:
    """Passes of 64 tokens in which several sequences grow at once, and no room for the keys of all of them."""
    squeezed = {"num_gpu_blocks_override": 8, "scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 16}
    engine = start_vllm(model_folder, batch_tokens=CHUNK, max_num_seqs=4, **squeezed)
    yield engine
    engine.close()


def test_preempted_sequences_have_the_same_numbers(chunked: Any, model_folder: Path) -> None:
    assert_eager(chunked, [sequence(300, seed) for seed in range(12)], reference.eager(model_folder))
    assert metric(chunked, "vllm:num_preemptions_total") > 0


def test_cancelled_sequences_are_removed_from_vllm(chunked: Any) -> None:
    waiting = [chunked.submit(sequence(300, seed)) for seed in range(40)]
    for each in waiting[1:]:
        each.cancel()
    assert waiting[0].result(60).length == 200
    deadline = time.monotonic() + 30
    while chunked._llm.output_processor.has_unfinished_requests():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("ids", [[], [320], [-1, 5], [7] * 513], ids=["none", "too high", "negative", "too many"])
def test_ids_that_would_end_the_process_never_reach_it(ids: list[int], chunked: Any) -> None:
    with pytest.raises(EngineFailure, match=r"tokens|below 320"):
        chunked.forward([ScoringInput(ids, 0, len(ids), len(ids) - 1)])
    assert chunked.forward([sequence(20)])[0].length == 14


def test_the_embedded_model_has_the_numbers_it_has_in_the_torch_engine(start_vllm: Start) -> None:
    from densereward.default_model import ensure_default_model

    folder = ensure_default_model()
    torch_engine = TorchEngine.load(str(folder), device="cpu", longest=512)
    engine = start_vllm(folder, kv_cache_memory_bytes=2**28)
    batch = [sequence(length, layers=6, words=49152) for length in LENGTHS]
    try:
        for one, two in zip(engine.forward(batch), torch_engine.forward(batch), strict=True):
            assert one.reward == pytest.approx(two.reward, abs=SCORES)
            np.testing.assert_allclose(one.prefixes["open"].after, two.prefixes["open"].after, atol=SCORES)
            for layer, row in one.attention_rows.items():
                np.testing.assert_allclose(row, two.attention_rows[layer], atol=ROWS)
    finally:
        engine.close()


def test_heads_split_over_two_ranks_are_averaged(
    start_vllm: Start, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    engine = start_vllm(model_folder, tensor_parallel_size=2)
    try:
        assert_eager(engine, [sequence(length) for length in LENGTHS], reference.eager(model_folder))
    finally:
        engine.close()


def test_half_precision_keeps_a_float32_head_and_stays_near_float32(start_vllm: Start, model_folder: Path) -> None:
    from densereward.engines import ENGINES

    engine = ENGINES["vllm"].load(
        str(model_folder), arguments={"kv_cache_memory_bytes": 2**26}, dtype="bfloat16", longest=512
    )
    exact = TorchEngine.load(str(model_folder), device="cpu")
    batch = [sequence(length) for length in LENGTHS]
    try:
        rewards = np.array([each.reward for each in engine.forward(batch)])
        others = np.array([each.reward for each in exact.forward(batch)])
    finally:
        engine.close()
    np.testing.assert_allclose(rewards, others, atol=5e-2 * np.abs(others).max())
    as_bfloat16 = torch.tensor(rewards).to(torch.bfloat16).double().numpy()
    assert (rewards != as_bfloat16).any()  # as it would be, were the head in it


def test_a_process_that_ends_fails_all_it_held_and_all_that_comes(start_vllm: Start, model_folder: Path) -> None:
    others = children_named("EngineCore", os.getpid())
    engine = start_vllm(model_folder)
    (process,) = children_named("EngineCore", os.getpid()) - others
    try:
        assert not engine.death.done()
        waiting = [engine.submit(sequence(512, seed)) for seed in range(64)]
        os.kill(process, signal.SIGKILL)
        failed = [each.exception(60) for each in waiting]
        assert any(isinstance(each, EngineDied) for each in failed)
        assert all(each is None or isinstance(each, EngineDied) for each in failed)
        assert isinstance(engine.death.result(30), EngineDied)
        with pytest.raises(EngineDied):
            engine.forward([sequence(5)])
    finally:
        engine.close()


def test_a_start_that_fails_leaves_no_process_behind(
    start_vllm: Start, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = children_named("EngineCore", os.getpid())
    # As where the model's window were another than the kernel's, so that its rows are off.
    monkeypatch.setattr("densereward.engines.vllm.checks.TOLERANCE", {"float32": 1e-12})
    with pytest.raises(ModelError, match=r"is off by|moves by"):
        start_vllm(model_folder)
    assert children_named("EngineCore", os.getpid()) == others


def test_a_model_with_a_short_maximum_length_is_checked_within_it(model_folder: Path) -> None:
    from densereward.engines import ENGINES

    engine = ENGINES["vllm"].load(str(model_folder), arguments={"kv_cache_memory_bytes": 2**26}, longest=20)
    engine.close()
    engine.close()


def test_arguments_that_vllm_refuses_are_a_model_error(start_vllm: Start, model_folder: Path) -> None:
    with pytest.raises(ModelError, match="vLLM cannot load"):
        start_vllm(model_folder, kv_cache_memory_bytes=1)
