"""Lay the chunks of many sequences out in one row, each token once (`packed_batch` says where)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64

from densereward.capture import AttentionRow, Contributions, ReceivedAttention
from densereward.engines.torch.chunks import Chunk
from densereward.engines.torch.kv_cache import KVCache, Prompt
from densereward.engines.torch.packed_batch import PackedBatch, PlacedChunk, array_of

__all__ = ["counted_from_0", "pack"]

_EMPTY = range(0)


def pack(
    chunks: Sequence[Chunk], device: torch.device, layers: int, new_caches: Mapping[Prompt, KVCache] | None = None
) -> PackedBatch:
    """Lay chunks out in one row, with one copy to the device.

    Args:
        chunks: B chunks, of different sequences.
        device: where the model is.
        layers: how many the model has.
        new_caches: empty caches, for the keys and values of these prompts but their last token.
    """
    row = _Row(chunks)
    ids, positions, key_positions = _fill(row)
    needs_each = [_row_needs(each.chunk, layers) for each in row.placed]
    row_chunks = [index for index, needs in enumerate(needs_each) if needs]
    rows = [row.placed[index] for index in row_chunks]
    keys = [each.row_keys for each in rows]
    on_host = [
        ids,
        positions,
        key_positions,
        np.concatenate([each.read_at for each in row.placed]),
        np.concatenate([each.next_ids for each in row.placed]),
        np.array([each.gate for each in row.placed], dtype=np.int64),
        np.concatenate([*keys, array_of(_EMPTY)]),
        np.repeat(np.arange(len(keys)), [len(each) for each in keys]),
        np.array([each.scored for each in rows], dtype=np.int64),
    ]
    moved = torch.from_numpy(np.concatenate(on_host)).to(device, non_blocking=True)
    parts = torch.split(moved, [len(part) for part in on_host])
    return PackedBatch(
        token_ids=parts[0][None],
        position_ids=parts[1][None],
        key_positions=parts[2],
        placed=row.placed,
        groups=row.groups,
        caches=row.caches,
        to_cache=list(_to_cache(row.placed, new_caches or {})),
        read_at=parts[3],
        next_ids=parts[4],
        gates=parts[5],
        row_chunks=row_chunks,
        row_needs=frozenset().union(*needs_each),
        row_keys=parts[6],
        row_owner=parts[7],
        scored=parts[8],
        received={(i, n): None for i, each in enumerate(row.placed) for n in _received_layers(each.chunk, layers)},
    )


class _Row:
    """Gives out places in order: shared prompts first, then own tokens, blocks, and cached keys.

    Attributes:
        placed: the chunks, in their order.
        groups, caches: as in `PackedBatch`.
        length: N.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.length = 0
        self.groups: list[tuple[range, range]] = []
        self.caches: list[KVCache] = []
        self._placed: dict[int, PlacedChunk] = {}
        sharing, cached, others = _by_context(chunks)
        prompts = [self._take(chunks[members[0]].expanded.sequence.prompt_length) for members in sharing]
        for prompt, members in zip(prompts, sharing, strict=True):
            self._place_group(chunks, members, prompt)
        blocks = sum(len(chunk.blocks) * len(chunk.expanded.sequence.closing_ids) for chunk in chunks)
        own = sum(_own_length(chunks[i]) for members in [*(each for _, each in cached), others] for i in members)
        behind = self.length + own + blocks
        for cache, members in cached:
            self.caches.append(cache)
            self._place_group(chunks, members, range(behind, behind + cache.length))
            behind += cache.length
        for i in others:
            self._placed[i] = PlacedChunk(chunks[i], _EMPTY, self._take(_own_length(chunks[i])))
        self.placed = [self._with_blocks(self._placed[i]) for i in range(len(chunks))]

    def _take(self, count: int) -> range:
        self.length += count
        return range(self.length - count, self.length)

    def _place_group(self, chunks: Sequence[Chunk], members: Sequence[int], context: range) -> None:
        first = self.length
        for i in members:
            start = max(chunks[i].start, len(context))
            own = self._take(max(min(chunks[i].stop, chunks[i].expanded.length) - start, 0))
            self._placed[i] = PlacedChunk(chunks[i], context, own)
        self.groups.append((context, range(first, self.length)))

    def _with_blocks(self, placed: PlacedChunk) -> PlacedChunk:
        chunk = placed.chunk
        places = self._take(len(chunk.blocks) * len(chunk.expanded.sequence.closing_ids))
        return PlacedChunk(chunk, placed.context, placed.own, places)


def _by_context(
    chunks: Sequence[Chunk],
) -> tuple[list[list[int]], list[tuple[KVCache, list[int]]], list[int]]:
    """Indices of the chunks that share a prompt in the row, of those that share cached keys, and of the others."""
    by_prompt, by_cache = defaultdict[Prompt, list[int]](list), defaultdict[KVCache, list[int]](list)
    others = []
    for i, chunk in enumerate(chunks):
        sequence = chunk.expanded.sequence
        if chunk.cache is not None and chunk.cache.length:
            by_cache[chunk.cache].append(i)
        elif chunk.start == 0 and 0 < sequence.prompt_length < min(chunk.stop, chunk.expanded.length):
            by_prompt[tuple(sequence.token_ids[: sequence.prompt_length])].append(i)
        else:
            others.append(i)
    sharing = [members for members in by_prompt.values() if len(members) > 1]
    others += [i for members in by_prompt.values() if len(members) == 1 for i in members]
    return sharing, list(by_cache.items()), sorted(others)


def _own_length(chunk: Chunk) -> int:
    """Tokens of the sequence itself that run in a chunk, if it shares no prompt."""
    return max(min(chunk.stop, chunk.expanded.length) - chunk.start, 0)


def _fill(row: _Row) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"], Int64[np.ndarray, " L"]]:
    """Token ids and positions of the row, and positions of all keys."""
    ids = np.zeros(row.length, dtype=np.int64)
    positions = np.zeros(row.length + sum(cache.length for cache in row.caches), dtype=np.int64)
    for each in row.placed:
        expanded, context = each.chunk.expanded, len(each.context)
        positions[each.context.start : each.context.stop] = np.arange(context)
        if each.context.start < row.length:
            ids[each.context.start : each.context.stop] = expanded.ids[:context]
        first = max(each.chunk.start, expanded.length)
        for places, start in [(each.own, context), (each.blocks, first)]:
            ids[places.start : places.stop] = expanded.ids[start : start + len(places)]
            positions[places.start : places.stop] = expanded.positions[start : start + len(places)]
    return ids, positions[: row.length], positions


def _to_cache(placed: Sequence[PlacedChunk], new_caches: Mapping[Prompt, KVCache]) -> Iterator[tuple[range, KVCache]]:
    """Places to cache: a chunk's own tokens, or a prompt without its last token, at which s_0 is read."""
    left = dict(new_caches)
    for each in placed:
        sequence = each.chunk.expanded.sequence
        if each.chunk.extends_cache and each.chunk.cache is not None:
            yield each.own, each.chunk.cache
        elif left and (cache := left.pop(tuple(sequence.token_ids[: sequence.prompt_length]), None)) is not None:
            yield (each.context or each.own)[: sequence.prompt_length - 1], cache


def _row_needs(chunk: Chunk, layers: int) -> frozenset[AttentionRow | Contributions]:
    """What a chunk needs of its scored token's attention, layers counted from 0."""
    needs = chunk.expanded.sequence.needs if chunk.has_scored_token else frozenset()
    return frozenset(counted_from_0(need, layers) for need in needs if isinstance(need, AttentionRow | Contributions))


def counted_from_0(need: AttentionRow | Contributions, layers: int) -> AttentionRow | Contributions:
    """The same need, its layer counted from the first."""
    return need if need.layer is None else replace(need, layer=need.layer % layers)


def _received_layers(chunk: Chunk, layers: int) -> frozenset[int]:
    """Layers whose received attention a chunk needs, counted from 0."""
    needs = chunk.expanded.sequence.needs
    return frozenset(need.layer % layers for need in needs if isinstance(need, ReceivedAttention))
