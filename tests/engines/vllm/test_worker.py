"""What vLLM's workers do with queries and keys, on layers and passes made by hand: no vLLM is needed here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densereward.engines.vllm.attention_rows import RowRequest, attention_weights
from densereward.engines.vllm.worker import RowCapture

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def layer_of(**changes: Any) -> Any:
    settings = {"window": None, "cap": None, "sinks": None} | changes
    implementation = SimpleNamespace(
        scale=0.35, logits_soft_cap=settings["cap"], sinks=settings["sinks"], forward=lambda *given: given[-1]
    )
    return SimpleNamespace(impl=implementation, sliding_window=settings["window"])


def states(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(length, HEADS, SIZE), (length, KEY_HEADS, SIZE), (length, KEY_HEADS, SIZE)]
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    return query, key, value


def seed_of(name: str, layer: int) -> int:
    return 10 * ord(name) + layer


def by_hand(layer: Any, query: torch.Tensor, keys: torch.Tensor) -> list[list[float]]:
    """Each head by itself, in a loop over the keys."""
    weights = []
    for head in range(HEADS):
        logits = []
        for place in range(len(keys)):
            key = keys[place, head // (HEADS // KEY_HEADS)]
            logit = float(sum(float(q) * float(k) for q, k in zip(query[head], key, strict=True))) * layer.impl.scale
            if layer.impl.logits_soft_cap:
                logit = layer.impl.logits_soft_cap * math.tanh(logit / layer.impl.logits_soft_cap)
            too_far = layer.sliding_window is not None and len(keys) - 1 - place >= layer.sliding_window
            logits.append(-math.inf if too_far else logit)
        sink = 0.0 if layer.impl.sinks is None else math.exp(float(layer.impl.sinks[head]))
        total = sum(math.exp(each) for each in logits) + sink
        weights.append([math.exp(each) / total for each in logits])
    return weights


@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 3}, {"window": 100}, {"cap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}],
    ids=["plain", "window", "window beyond the text", "soft cap", "sinks"],
)
def test_weights_are_the_softmax_of_scaled_products_of_each_head(changes: dict[str, Any]) -> None:
    layer = layer_of(**changes)
    query, key, _ = states(7, seed=1)
    found = attention_weights(layer, query[-1], key).flatten(0, 1)
    np.testing.assert_allclose(found.numpy(), by_hand(layer, query[-1], key), atol=1e-6)


def test_a_request_for_rows_is_read_from_its_pooling_parameters() -> None:
    request = RowRequest((0, 5), checks=True)
    assert RowRequest.read(SimpleNamespace(extra_kwargs=request.extra_kwargs)) == request
    assert RowRequest.read(SimpleNamespace(extra_kwargs=None)) == RowRequest()
    assert RowRequest().extra_kwargs is None


class Worker:
    """Runs passes as vLLM's worker does: all scheduled tokens in a row, then the pooler."""

    def __init__(self, layers: dict[int, Any], ranks: Any = None) -> None:
        self.layers = layers
        self.capture = capture = RowCapture(layers, ranks or SimpleNamespace(world_size=1))
        for index, layer in layers.items():
            layer.impl.forward = capture.around_kernel(index, layer.impl.forward)
        self._run = capture.around_pass(self._pass)
        self._pool = capture.around_pooler(self._pooler)
        self._states: dict[str, Any] = {}
        self._known: set[str] = set()
        self.skips_kernels = False

    def run(self, *parts: tuple[str, RowRequest, int, int, int], finished: tuple[str, ...] = ()) -> dict[str, Any]:
        """Each part: the request, what it wants, its length, and from which token to which it runs now."""
        new = [
            SimpleNamespace(req_id=name, pooling_params=SimpleNamespace(extra_kwargs=request.extra_kwargs))
            for name, request, *_ in parts
            if name not in self._known
        ]
        self._known |= {name for name, *_ in parts}
        self._parts = parts
        scheduled = {name: stop - start for name, _, _, start, stop in parts}
        self._run(
            SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=set(finished), num_scheduled_tokens=scheduled)
        )
        cursor = SimpleNamespace(
            seq_lens_cpu=torch.tensor([stop for *_, stop in parts]),
            num_scheduled_tokens_cpu=torch.tensor([stop - start for *_, start, stop in parts]),
            get_finished_mask=lambda: [stop == length for _, _, length, _, stop in parts],
        )
        metadata = SimpleNamespace(
            pooling_cursor=cursor,
            pooling_params=[SimpleNamespace(extra_kwargs=request.extra_kwargs) for _, request, *_ in parts],
            pooling_states=[self._states.setdefault(name, _State()) for name, *_ in parts],
        )
        outputs = self._pool(torch.zeros(sum(scheduled.values()), 1), metadata)
        return {name: output for (name, *_), output in zip(parts, outputs, strict=True)}

    def _pass(self, _scheduled: Any) -> None:
        for index, layer in self.layers.items():
            whole = [
                [tensor[start:stop] for tensor in states(length, seed=seed_of(name, index))]
                for name, _, length, start, stop in self._parts
            ]
            query, key, value = (torch.cat(each) for each in zip(*whole, strict=True))
            output = torch.cat(
                [
                    self._attention(layer, *states(length, seed=seed_of(name, index)))[start:stop]
                    for name, _, length, start, stop in self._parts
                ]
            )
            if not self.skips_kernels:
                layer.impl.forward(layer, query, key, value, None, object(), output)
            for each in (query, key, value):
                each.fill_(torch.nan)  # as buffers are, which the next layer writes over

    @staticmethod
    def _attention(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        outputs = []
        for place in range(len(query)):
            weights = torch.tensor(by_hand(layer, query[place], key[: place + 1]))
            repeated = value[: place + 1].repeat_interleave(HEADS // KEY_HEADS, dim=1)
            outputs.append(torch.einsum("hs,shv->hv", weights, repeated))
        return torch.stack(outputs)

    def _pooler(self, hidden: torch.Tensor, metadata: Any) -> list[Any]:
        outputs: list[Any] = []
        for (_, _, length, start, stop), state in zip(self._parts, metadata.pooling_states, strict=True):
            state.chunks.append(torch.arange(start, stop).float()[:, None])
            outputs.append(torch.cat(state.chunks) if stop == length else None)
        return outputs


class _State:
    """As vLLM's: hidden states of earlier chunks."""

    def __init__(self) -> None:
        self.chunks: list[torch.Tensor] = []

    def clean(self) -> None:
        self.chunks.clear()


def expected(worker: Worker, name: str, length: int, layer: int) -> Any:
    query, key, _ = states(length, seed=seed_of(name, layer))
    return np.mean(by_hand(worker.layers[layer], query[-1], key), axis=0)


def test_rows_are_appended_to_the_scores_of_requests_that_ask_for_them_alone() -> None:
    worker = Worker({0: layer_of(), 1: layer_of(window=3)})
    outputs = worker.run(
        ("a", RowRequest((1, 0)), 5, 0, 5), ("b", RowRequest(), 4, 0, 4), ("c", RowRequest((0,)), 3, 0, 3)
    )
    assert [tuple(each.shape) for each in outputs.values()] == [(5, 3), (4, 1), (3, 2)]
    np.testing.assert_array_equal(outputs["a"][:, 0], range(5))
    np.testing.assert_allclose(outputs["a"][:, 1], expected(worker, "a", 5, 1), atol=1e-6)
    np.testing.assert_allclose(outputs["a"][:, 2], expected(worker, "a", 5, 0), atol=1e-6)
    np.testing.assert_allclose(outputs["c"][:, 1], expected(worker, "c", 3, 0), atol=1e-6)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_a_prompt_in_any_chunks_beside_another_gives_the_row_of_the_whole(one: list[int], two: list[int]) -> None:
    worker = Worker({0: layer_of()})
    chunks = {"a": one, "b": two}
    done = {"a": 0, "b": 0}
    found: dict[str, Any] = {}
    while waiting := [name for name in chunks if chunks[name]]:
        parts: list[tuple[str, RowRequest, int, int, int]] = []
        for name in waiting:
            start, length = done[name], done[name] + sum(chunks[name])
            done[name] += chunks[name].pop(0)
            parts.append((name, RowRequest((0,)), length, start, done[name]))
        outputs = worker.run(*parts)
        found |= {name: output for name, output in outputs.items() if output is not None}
    for name, output in found.items():
        np.testing.assert_allclose(output[:, 1], expected(worker, name, done[name], 0), atol=1e-6)


def test_a_preempted_request_starts_again_without_its_earlier_chunks() -> None:
    worker = Worker({0: layer_of()})
    assert worker.run(("a", RowRequest((0,)), 6, 0, 4)) == {"a": None}
    worker.run(("b", RowRequest(), 3, 0, 3))  # and "a" has lost its place
    assert worker.run(("a", RowRequest((0,)), 6, 0, 2)) == {"a": None}
    output = worker.run(("a", RowRequest((0,)), 6, 2, 6))["a"]
    np.testing.assert_array_equal(output[:, 0], range(6))
    np.testing.assert_allclose(output[:, 1], expected(worker, "a", 6, 0), atol=1e-6)


def test_a_checked_row_has_the_error_of_its_weighted_values_against_the_kernels() -> None:
    worker = Worker({0: layer_of()})
    right = worker.run(("a", RowRequest((0,), checks=True), 5, 0, 3), ("b", RowRequest((0,)), 2, 0, 2))
    right |= worker.run(("a", RowRequest((0,), checks=True), 5, 3, 5))
    assert tuple(right["a"].shape) == (5, 3)
    assert float(right["a"][:, 2].max()) < 1e-5
    wrong = Worker({0: layer_of()})
    kernel = Worker._attention
    worker_layer = layer_of(window=2)  # what the kernel does, and the row does not know of
    wrong._attention = lambda _, *given: kernel(worker_layer, *given)  # type: ignore[method-assign]
    assert float(wrong.run(("a", RowRequest((0,), checks=True), 5, 0, 5))["a"][:, 2].max()) > 0.01


def test_a_kernel_that_runs_without_its_hook_gives_no_column() -> None:
    worker = Worker({0: layer_of()})
    worker.skips_kernels = True
    assert tuple(worker.run(("a", RowRequest((0,)), 3, 0, 3))["a"].shape) == (3, 1)


def test_heads_of_several_ranks_are_averaged() -> None:
    twice = SimpleNamespace(world_size=2, all_reduce=lambda tensor: tensor * 3)  # the other rank's is twice as large
    worker = Worker({0: layer_of()}, twice)
    output = worker.run(("a", RowRequest((0,)), 4, 0, 4))["a"]
    np.testing.assert_allclose(output[:, 1], 1.5 * expected(worker, "a", 4, 0), atol=1e-6)


def test_a_chunk_that_was_lost_costs_the_row_and_not_the_scores() -> None:
    worker = Worker({0: layer_of()})
    worker.run(("a", RowRequest((0,)), 6, 0, 2))
    worker.skips_kernels = True
    worker.run(("a", RowRequest((0,)), 6, 2, 4))
    worker.skips_kernels = False
    assert tuple(worker.run(("a", RowRequest((0,)), 6, 4, 6))["a"].shape) == (6, 1)


def test_a_failure_of_a_hook_costs_the_row_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("no memory")

    worker = Worker({0: layer_of()})
    monkeypatch.setattr("densereward.engines.vllm.worker.attention_weights", fail)
    assert tuple(worker.run(("a", RowRequest((0,)), 3, 0, 3))["a"].shape) == (3, 1)
    monkeypatch.setattr("densereward.engines.vllm.worker._KernelCall", fail)
    assert tuple(worker.run(("b", RowRequest((0,)), 3, 0, 3))["b"].shape) == (3, 1)


def test_errors_of_several_ranks_are_not_averaged_away() -> None:
    other = SimpleNamespace(world_size=4, all_reduce=lambda tensor: tensor + 8)
    output = Worker({0: layer_of()}, other).run(("a", RowRequest((0,), checks=True), 4, 0, 4))["a"]
    assert float(output[0, 2]) == pytest.approx(8, abs=1e-4)


def test_nothing_is_copied_where_no_request_asks_for_rows() -> None:
    worker = Worker({0: layer_of()})
    worker.run(("a", RowRequest((0,)), 3, 0, 2))
    worker.run(("b", RowRequest(), 3, 0, 3), finished=("a",))
    assert not worker.capture._calls
    assert not worker.capture._requests
