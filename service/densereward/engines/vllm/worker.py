"""Inside vLLM's workers: capture what the scoring token attends to, and return it beside the scores.

vLLM's kernels never write attention weights down. So in a pass in which a request asks for a layer's row, that layer's
queries and keys are copied as they come to its kernel, rotated and normalised. The pooler runs after the last layer of
the same pass and is handed the requests in the order of their tokens. There the keys are split by request. Those of a
prompt that runs in chunks are kept with its pooling state. With a request's last chunk its row is computed, averaged
over the heads of all tensor-parallel ranks, and appended to its scores as further columns.

    [S, 1] scores  ->  [S, 1 + A] scores, then a row for each of A layers
                   ->  [S, 1 + 2 A] for a request that checks: how far each row is from giving the layer's output

Nothing is copied for requests that ask for no rows. A request that vLLM preempted starts again at its first token. A
failure here costs a request its columns, which the engine notices, and never the process, which all requests share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from densereward.engines.vllm.attention_rows import RowRequest, attention_weights, over_ranks, row_error
from densereward.engines.vllm.layers import attention_layers

__all__ = ["RowCapture", "RowsExtension"]

logger = logging.getLogger("vllm.densereward")

_CHUNKS = "densereward_keys"
"""The attribute of a request's pooling state that holds its earlier chunks."""


@dataclass(frozen=True, slots=True)
class _KernelCall:
    """What came to a layer's kernel in the running pass, and what it gave: all tokens of all requests."""

    query: Float[Tensor, "N H D"]
    key: Float[Tensor, "N K D"]
    value: Float[Tensor, "N K V"] | None = None
    output: Float[Tensor, "N H V"] | None = None


@dataclass(slots=True)
class _Chunks:
    """Keys, and values where rows are checked, of one request in one layer, chunk after chunk."""

    keys: list[Float[Tensor, "_ K D"]] = field(default_factory=list)
    values: list[Float[Tensor, "_ K V"]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens so far, from the sequence's first."""
        return sum(map(len, self.keys))


class RowsExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`); called by `collective_rpc`."""

    def densereward_install_hooks(self) -> dict[str, Any]:
        """Put the hooks in place.

        Returns:
            `layers`: those whose rows can be captured; `missing`: for the others, the reason why not.
        """
        from vllm.distributed import get_tp_group

        worker: Any = self
        layers, missing = attention_layers(worker.vllm_config)
        capture = RowCapture(layers, get_tp_group())
        for index, layer in layers.items():
            layer.impl.forward = capture.around_kernel(index, layer.impl.forward)
        pooler = worker.model_runner.get_model().pooler
        pooler.forward = capture.around_pooler(pooler.forward)
        worker.execute_model = capture.around_pass(worker.execute_model)
        return {"layers": sorted(layers), "missing": missing}


class RowCapture:
    """The hooks, and what they keep between them.

    Args:
        layers: vLLM's attention layers whose rows can be captured.
        ranks: vLLM's group of tensor-parallel workers, each of which has a part of the heads.
    """

    def __init__(self, layers: dict[int, Any], ranks: Any) -> None:
        self._layers = layers
        self._ranks = ranks
        self._requests: dict[str, RowRequest] = {}
        self._captured_layers: frozenset[int] = frozenset()
        self._checks = False
        self._calls: dict[int, _KernelCall] = {}

    def around_pass(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        """Before a pass: find the layers that its requests ask for."""

        def run(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            for new in scheduled.scheduled_new_reqs:
                if (request := RowRequest.read(new.pooling_params)).layers:
                    self._requests[new.req_id] = request
            for request_id in scheduled.finished_req_ids:
                self._requests.pop(request_id, None)
            running = [self._requests[each] for each in scheduled.num_scheduled_tokens if each in self._requests]
            self._captured_layers = frozenset(layer for request in running for layer in request.layers)
            self._checks = any(request.checks for request in running)
            self._calls.clear()
            return execute(scheduled, *args, **kwargs)

        return run

    def around_kernel(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """In a pass: copy what comes to the kernel of a captured layer, before the next layer writes over it."""

        def run(
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            cache: Any,
            metadata: Any,
            output: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            result = forward(layer, query, key, value, cache, metadata, output, *args, **kwargs)
            if index in self._captured_layers and metadata is not None:
                self._copy(index, query, key, value, output)
            return result

        return run

    def _copy(self, index: int, query: Any, key: Any, value: Any, output: Any) -> None:
        try:
            checked = (value.clone(), output.clone()) if self._checks else (None, None)
            self._calls[index] = _KernelCall(query.clone(), key.clone(), *checked)
        except Exception:  # most of all, no memory
            logger.exception("attention of layer %d could not be copied", index)

    def around_pooler(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """After a pass: split the copies by request, and give finished requests their rows."""

        def run(hidden_states: Any, pooling_metadata: Any) -> Any:
            cursor = pooling_metadata.pooling_cursor
            requests = [RowRequest.read(each) for each in pooling_metadata.pooling_params]
            if cursor is not None:
                _drop_preempted(pooling_metadata.pooling_states, _starts(cursor))
            outputs = forward(hidden_states, pooling_metadata)
            if cursor is None or not any(request.layers for request in requests):
                return outputs
            try:
                rows = self._rows(pooling_metadata, requests)
            except Exception:  # most of all, no memory
                logger.exception("attention rows could not be computed")
                return outputs
            finally:
                self._calls.clear()
            return [_appended(each, rows.get(i)) for i, each in enumerate(outputs)]

        return run

    def _rows(self, metadata: Any, requests: Sequence[RowRequest]) -> dict[int, Float32[Tensor, "S _"]]:
        """The further columns of each finished request, by its index in the pass."""
        cursor, stop = metadata.pooling_cursor, 0
        columns: dict[int, Float32[Tensor, "S _"]] = {}
        counts, finished = cursor.num_scheduled_tokens_cpu.tolist(), cursor.get_finished_mask()
        parts = zip(requests, metadata.pooling_states, counts, _starts(cursor), strict=True)
        for i, (request, state, count, start) in enumerate(parts):
            stop += count
            if not request.layers:
                continue
            chunks = self._add_chunk(state, request, slice(stop - count, stop), start)
            if finished[i]:
                if chunks is not None:
                    columns[i] = self._columns(request, chunks, stop - 1)
                _forget(state)
        return over_ranks(columns, requests, self._ranks)

    def _add_chunk(self, state: Any, request: RowRequest, tokens: slice, start: int) -> dict[int, _Chunks] | None:
        """A request's chunks by layer, with that of this pass; None if any chunk was lost."""
        by_layer: dict[int, _Chunks] = getattr(state, _CHUNKS, None) or {layer: _Chunks() for layer in request.layers}
        setattr(state, _CHUNKS, by_layer)
        if not self._calls.keys() >= by_layer.keys() or any(chunks.tokens != start for chunks in by_layer.values()):
            return None
        for layer, chunks in by_layer.items():
            call = self._calls[layer]
            chunks.keys.append(call.key[tokens].clone())
            if request.checks and call.value is not None:
                chunks.values.append(call.value[tokens].clone())
        return by_layer

    def _columns(self, request: RowRequest, by_layer: dict[int, _Chunks], scored: int) -> Float32[Tensor, "S _"]:
        rows, errors = [], []
        for layer in request.layers:
            chunks, call = by_layer[layer], self._calls[layer]
            weights = attention_weights(self._layers[layer], call.query[scored], torch.cat(chunks.keys))
            rows.append(weights.mean(dim=(0, 1)))
            if request.checks and call.output is not None:
                error = row_error(weights, torch.cat(chunks.values), call.output[scored])
                errors.append(error.expand(len(rows[-1])))
        return torch.stack([*rows, *errors], dim=1)


def _starts(cursor: Any) -> list[int]:
    """The position in its sequence at which each request's part of the pass begins."""
    starts: list[int] = (cursor.seq_lens_cpu - cursor.num_scheduled_tokens_cpu).tolist()
    return starts


def _drop_preempted(states: Sequence[Any], starts: Sequence[int]) -> None:
    """Drop the chunks of requests that start at their first token: they are from before a preemption."""
    for state, start in zip(states, starts, strict=True):
        if start == 0:
            state.clean()
            _forget(state)


def _forget(state: Any) -> None:
    if hasattr(state, _CHUNKS):
        delattr(state, _CHUNKS)


def _appended(scores: Tensor | None, columns: Tensor | None) -> Tensor | None:
    return scores if scores is None or columns is None else torch.cat([scores.float(), columns], dim=1)
