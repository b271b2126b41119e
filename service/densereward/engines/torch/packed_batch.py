"""A packed batch: the chunks of many sequences in one row of tokens, and where each part of them is.

    | shared prompts | own tokens, those after one prompt side by side | blocks of closed prefixes |  (cached keys)

A place is an index into that row. Cached keys have places too, behind the row's last token, so that a sequence can
begin there: the attention function appends them to the row's keys and values, and none of their tokens runs again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from densereward.capture import AttentionRow, Contributions, Need
from densereward.engines.torch.chunks import Chunk
from densereward.engines.torch.kv_cache import KVCache

__all__ = ["PackedBatch", "PlacedChunk", "ScoredAttention", "array_of"]


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """One chunk and its places.

    Attributes:
        chunk: what runs.
        context: where the sequence begins, if not in `own`: in a shared prompt, or in cached keys.
        own: the sequence's tokens after the context that run in this chunk.
        blocks: its closed prefixes, (blocks of the chunk) * c places.
    """

    chunk: Chunk
    context: range
    own: range
    blocks: range = range(0)

    @property
    def prompt(self) -> list[range]:
        """Places of the prompt, as one range or two."""
        length = self.chunk.expanded.sequence.prompt_length
        parts = [self.context[:length], self.own[: max(length - len(self.context), 0)]]
        return [part for part in parts if part]

    @property
    def response(self) -> range:
        """Places of the response; only right where these are one range, as they are where there are blocks."""
        sequence = self.chunk.expanded.sequence
        start, stop = (position - len(self.context) for position in (sequence.prompt_length, sequence.response_stop))
        return self.own[start:stop] if start >= 0 else self.context[sequence.prompt_length : sequence.response_stop]

    @property
    def read_indices(self) -> Int64[np.ndarray, " r"]:
        """Which entries of the sequence's `read_at` are in this chunk."""
        read_at = self.chunk.expanded.read_at
        return np.flatnonzero((read_at >= self.chunk.start) & (read_at < self.chunk.stop))

    @property
    def read_at(self) -> Int64[np.ndarray, " r"]:
        """Places of these."""
        at = self.chunk.expanded.read_at[self.read_indices]
        length = self.chunk.expanded.length
        context, own = self.context.start + at, self.own.start + at - len(self.context)
        blocks = self.blocks.start + at - max(self.chunk.start, length)
        places: Int64[np.ndarray, " r"] = np.where(at >= length, blocks, np.where(at < len(self.context), context, own))
        return places

    @property
    def next_ids(self) -> Int64[np.ndarray, " _"]:
        """The token after each of these, for a language model's head; otherwise empty."""
        next_ids = self.chunk.expanded.next_ids
        return next_ids[self.read_indices] if len(next_ids) else next_ids

    @property
    def gate(self) -> int:
        """Place of the sequence's gate; only right where the whole sequence runs in this chunk."""
        position = self.chunk.expanded.sequence.gate
        length = len(self.context)
        return self.context.start + position if position < length else self.own.start + position - length

    @property
    def scored(self) -> int:
        """Place of the scored token."""
        return self.own.start + self.chunk.expanded.sequence.scored_position - len(self.context)

    @property
    def row_keys(self) -> Int64[np.ndarray, " r"]:
        """Places of the keys that the scored token can attend to, from the sequence's first token on."""
        return np.concatenate([array_of(self.context), np.arange(self.own.start, self.scored + 1)])


@dataclass(frozen=True, slots=True)
class ScoredAttention:
    """What the scored tokens attended to in one layer.

    Attributes:
        weights: of each of `row_keys`, in each head.
        values: of each of them, not yet expanded to all heads.
    """

    weights: Float32[Tensor, "K H"]
    values: Float[Tensor, "G K E"]


@dataclass(frozen=True)
class PackedBatch:
    """B chunks in one row of N tokens, and M cached keys behind it.

    Attributes:
        token_ids, position_ids: [1, N]; a token's position is the one it has in its own sequence.
        key_positions: [N + M], those of the keys.
        placed: the chunks, in the batch's order.
        groups: each context, with the places of all the own tokens that come after it.
        caches: of earlier passes, in the order of their places.
        to_cache: places whose keys and values are cached, and the cache that they are appended to.
        read_at: every place the head is read at, chunk after chunk.
        next_ids: the token after each, for a language model's head; otherwise empty.
        gates: the place of each chunk's gate.
        row_chunks: indices of the chunks whose scored tokens' attention is captured.
        row_needs: what is captured of any of them, layers counted from 0.
        row_keys: keys that these scored tokens can attend to, row after row.
        row_owner: the row of each such key.
        scored: places of these scored tokens.
        received: per chunk and layer as it is needed, the attention that the chunk's queries in the response give to
            the sequence's keys so far; filled by the attention function.
        rows: filled by the attention function, layer by layer: the scored rows, laid out as `row_keys`.
        scored_attention: likewise, in layers whose contributions are needed.
        outputs: likewise, in every layer: the attention's output at the scored tokens.
    """

    token_ids: Int64[Tensor, "1 N"]
    position_ids: Int64[Tensor, "1 N"]
    key_positions: Int64[Tensor, " L"]
    placed: list[PlacedChunk]
    groups: list[tuple[range, range]]
    caches: list[KVCache]
    to_cache: list[tuple[range, KVCache]]
    read_at: Int64[Tensor, " _"]
    next_ids: Int64[Tensor, " _"]
    gates: Int64[Tensor, " B"]
    row_chunks: list[int]
    row_needs: frozenset[AttentionRow | Contributions]
    row_keys: Int64[Tensor, " K"]
    row_owner: Int64[Tensor, " K"]
    scored: Int64[Tensor, " R"]
    received: dict[tuple[int, int], Float32[Tensor, " _"] | None]
    rows: dict[Need, Float32[Tensor, " K"]] = field(default_factory=dict)
    scored_attention: dict[int, ScoredAttention] = field(default_factory=dict)
    outputs: dict[int, Float[Tensor, "1 R H E"]] = field(default_factory=dict)

    @property
    def contributions(self) -> list[Contributions]:
        """The contributions that are needed."""
        return [need for need in self.row_needs if isinstance(need, Contributions)]

    @cached_property
    def segments(self) -> list[range]:
        """Shared prompts and own tokens, in the order of their places: each attends to itself causally."""
        length = self.token_ids.shape[1]
        prompts = {context for context, _ in self.groups if context.start < length}
        return sorted(filter(None, prompts | {each.own for each in self.placed}), key=lambda places: places.start)

    @cached_property
    def blocks(self) -> list[PlacedChunk]:
        """The chunks with closed prefixes."""
        return [each for each in self.placed if each.blocks]

    @cached_property
    def longest(self) -> int:
        """One more than the highest position."""
        return max(int(each.chunk.expanded.positions.max(initial=0)) for each in self.placed) + 1


def array_of(places: range) -> Int64[np.ndarray, " n"]:
    """The places as an array."""
    return np.arange(places.start, places.stop)
