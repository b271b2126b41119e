"""Inside vLLM's workers: what the scoring token attends to, given back beside the scores.

vLLM's kernels never write attention weights down. So in the passes in which some request wants a layer's row, that
layer's queries and keys are kept as they come to its kernel, rotated and normalised. The pooler, which runs behind the
last layer of the same pass, is handed the requests in the order of their tokens: there the keys are cut up by request,
and those of a prompt that runs in chunks are put by with its pooling state. With a request's last chunk its row is
made, averaged over the heads of all tensor-parallel ranks, and appended to its scores as further columns.

    [S, 1] scores  ->  [S, 1 + A] scores, then a row for each of A layers
                   ->  [S, 1 + 2 A] for a request that checks: how far each row is from giving the layer's output

Nothing is kept of requests that want no rows. A request that vLLM preempted starts again at its first token. Whatever
goes wrong here costs a request its columns, which the engine misses, and never the process, which is everybody's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from densereward.engines.vllm.layers import attention_layers
from densereward.engines.vllm.rows import Asked, attended, off, over_ranks

__all__ = ["Rows", "RowsExtension"]

logger = logging.getLogger("vllm.densereward")

_KEPT = "densereward_keys"
"""Under this name a request's pooling state holds what its earlier chunks left."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What came to a layer's kernel in the running pass, and what it gave: all tokens of all requests."""

    query: Float[Tensor, "N H D"]
    key: Float[Tensor, "N K D"]
    value: Float[Tensor, "N K V"] | None = None
    output: Float[Tensor, "N H V"] | None = None


@dataclass(slots=True)
class _Chunks:
    """Keys, and values where they are checked, of one request in one layer, chunk after chunk."""

    keys: list[Float[Tensor, "_ K D"]] = field(default_factory=list)
    values: list[Float[Tensor, "_ K V"]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """From the sequence's first on."""
        return sum(map(len, self.keys))


class RowsExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`); called by `collective_rpc`."""

    def densereward_watch(self) -> dict[str, Any]:
        """Put the hooks in place.

        Returns:
            `layers`: those whose rows can be had; `missing`: what keeps the others from it, by layer.
        """
        from vllm.distributed import get_tp_group

        worker: Any = self
        layers, missing = attention_layers(worker.vllm_config)
        rows = Rows(layers, get_tp_group())
        for index, layer in layers.items():
            layer.impl.forward = rows.around_kernel(index, layer.impl.forward)
        pooler = worker.model_runner.get_model().pooler
        pooler.forward = rows.around_pooler(pooler.forward)
        worker.execute_model = rows.around_pass(worker.execute_model)
        return {"layers": sorted(layers), "missing": missing}


class Rows:
    """Owns what is kept between the hooks.

    Args:
        layers: vLLM's attention layers whose rows can be had.
        ranks: vLLM's group of tensor-parallel workers, each of which has a part of the heads.
    """

    def __init__(self, layers: dict[int, Any], ranks: Any) -> None:
        self._layers = layers
        self._ranks = ranks
        self._asked: dict[str, Asked] = {}
        self._watched: frozenset[int] = frozenset()
        self._checks = False
        self._passes: dict[int, _Pass] = {}

    def around_pass(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        """Before a pass: which layers anyone in it wants."""

        def run(scheduled: Any, *given: Any, **named: Any) -> Any:
            for request in scheduled.scheduled_new_reqs:
                if (asked := Asked.read(request.pooling_params)).layers:
                    self._asked[request.req_id] = asked
            for request_id in scheduled.finished_req_ids:
                self._asked.pop(request_id, None)
            wanted = [self._asked[each] for each in scheduled.num_scheduled_tokens if each in self._asked]
            self._watched = frozenset(layer for asked in wanted for layer in asked.layers)
            self._checks = any(asked.checks for asked in wanted)
            self._passes.clear()
            return execute(scheduled, *given, **named)

        return run

    def around_kernel(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """In a pass: keep what comes to a watched layer's kernel, before anything writes over it."""

        def run(
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            cache: Any,
            metadata: Any,
            output: Any,
            *rest: Any,
            **named: Any,
        ) -> Any:
            result = forward(layer, query, key, value, cache, metadata, output, *rest, **named)
            if index in self._watched and metadata is not None:
                self._copy(index, query, key, value, output)
            return result

        return run

    def _copy(self, index: int, query: Any, key: Any, value: Any, output: Any) -> None:
        try:
            checked = (value.clone(), output.clone()) if self._checks else (None, None)
            self._passes[index] = _Pass(query.clone(), key.clone(), *checked)
        except Exception:  # most of all, no memory
            logger.exception("attention of layer %d could not be kept", index)

    def around_pooler(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Behind a pass: cut up by request what was kept, and give whole requests their rows."""

        def run(hidden_states: Any, pooling_metadata: Any) -> Any:
            cursor = pooling_metadata.pooling_cursor
            wanted = [Asked.read(each) for each in pooling_metadata.pooling_params]
            if cursor is not None:
                _start_again(pooling_metadata.pooling_states, _starts(cursor))
            outputs = forward(hidden_states, pooling_metadata)
            if cursor is None or not any(asked.layers for asked in wanted):
                return outputs
            try:
                rows = self._rows(pooling_metadata, wanted)
            except Exception:  # most of all, no memory
                logger.exception("attention rows could not be made")
                return outputs
            finally:
                self._passes.clear()
            return [_appended(each, rows.get(i)) for i, each in enumerate(outputs)]

        return run

    def _rows(self, metadata: Any, wanted: Sequence[Asked]) -> dict[int, Float32[Tensor, "S _"]]:
        """The further columns of each request that is whole, by its place in the pass."""
        cursor, stop = metadata.pooling_cursor, 0
        columns: dict[int, Float32[Tensor, "S _"]] = {}
        counts, finished = cursor.num_scheduled_tokens_cpu.tolist(), cursor.get_finished_mask()
        places = zip(wanted, metadata.pooling_states, counts, _starts(cursor), strict=True)
        for i, (asked, state, count, start) in enumerate(places):
            stop += count
            if not asked.layers:
                continue
            kept = self._keep(state, asked, slice(stop - count, stop), start)
            if finished[i]:
                if kept is not None:
                    columns[i] = self._columns(asked, kept, stop - 1)
                _forget(state)
        return over_ranks(columns, wanted, self._ranks)

    def _keep(self, state: Any, asked: Asked, tokens: slice, start: int) -> dict[int, _Chunks] | None:
        """This pass's part of a request, behind those of earlier ones; None if any of them was lost."""
        kept: dict[int, _Chunks] = getattr(state, _KEPT, None) or {layer: _Chunks() for layer in asked.layers}
        setattr(state, _KEPT, kept)
        if not self._passes.keys() >= kept.keys() or any(chunks.tokens != start for chunks in kept.values()):
            return None
        for layer, chunks in kept.items():
            seen = self._passes[layer]
            chunks.keys.append(seen.key[tokens].clone())
            if asked.checks and seen.value is not None:
                chunks.values.append(seen.value[tokens].clone())
        return kept

    def _columns(self, asked: Asked, kept: dict[int, _Chunks], scored: int) -> Float32[Tensor, "S _"]:
        rows, errors = [], []
        for layer in asked.layers:
            chunks, seen = kept[layer], self._passes[layer]
            weights = attended(self._layers[layer], seen.query[scored], torch.cat(chunks.keys))
            rows.append(weights.mean(dim=(0, 1)))
            if asked.checks and seen.output is not None:
                error = off(weights, torch.cat(chunks.values), seen.output[scored])
                errors.append(error.expand(len(rows[-1])))
        return torch.stack([*rows, *errors], dim=1)


def _starts(cursor: Any) -> list[int]:
    """Where in its sequence each request's part of the pass begins."""
    starts: list[int] = (cursor.seq_lens_cpu - cursor.num_scheduled_tokens_cpu).tolist()
    return starts


def _start_again(states: Sequence[Any], starts: Sequence[int]) -> None:
    """A request that starts at its first token has no earlier chunks; those of before a preemption are dropped."""
    for state, start in zip(states, starts, strict=True):
        if start == 0:
            state.clean()
            _forget(state)


def _forget(state: Any) -> None:
    if hasattr(state, _KEPT):
        delattr(state, _KEPT)


def _appended(scores: Tensor | None, columns: Tensor | None) -> Tensor | None:
    return scores if scores is None or columns is None else torch.cat([scores.float(), columns], dim=1)
