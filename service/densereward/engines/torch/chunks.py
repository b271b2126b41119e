"""A sequence expanded by its closed prefixes, and the chunks that it runs in.

The expanded sequence is its own tokens, then one block for each prefix that is scored closed: the closing tokens, at
the positions they would have if the response ended there. A batch runs every sequence in one chunk. A sequence too long
for one pass runs in several, each on the keys that the chunks before it left.

S tokens in the sequence, T in its response, c closing tokens, B closed prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil

import numpy as np
from jaxtyping import Int64

from densereward.capture import PrefixScores, ScoringInput, missing_closing
from densereward.engines.torch.kv_cache import KVCache

__all__ = ["Chunk", "ExpandedSequence", "chunks_of", "expand"]

_OPEN = PrefixScores("open")


@dataclass(frozen=True, slots=True)
class ExpandedSequence:
    """One sequence and the blocks of its closed prefixes.

    A prefix that already ends with some of the closing tokens only needs the others. Its block is padded behind those,
    where nothing attends to it.

    Attributes:
        sequence: the sequence.
        ids, positions: [S + B * c], the blocks behind the sequence.
        prefix_lengths: [B], response tokens in each closed prefix, ascending.
        read_at: indices into `ids` at which the head is read: for R; for open s_0 (if a token comes before it) and
            s_1..s_T; for closed s_0 (likewise) and one per block; one per step.
        next_ids: the token after each of these, for a language model's head; otherwise empty.
    """

    sequence: ScoringInput
    ids: Int64[np.ndarray, " N"]
    positions: Int64[np.ndarray, " N"]
    prefix_lengths: Int64[np.ndarray, " B"]
    read_at: Int64[np.ndarray, " R"]
    next_ids: Int64[np.ndarray, " _"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def length(self) -> int:
        """S: where the blocks begin."""
        return len(self.sequence.token_ids)


def expand(sequence: ScoringInput) -> ExpandedSequence:
    """Append the blocks of the closed prefixes that a sequence needs, and find where the head is read."""
    ids, start = np.asarray(sequence.token_ids, dtype=np.int64), sequence.prompt_length
    positions = np.arange(len(ids))
    read_at = [sequence.scored_position]
    if _OPEN in sequence.needs:
        read_at += range(max(start - 1, 0), sequence.response_stop)
    prefix_lengths = np.asarray(sequence.closed_prefixes, dtype=np.int64)
    if len(prefix_lengths):
        size = len(sequence.closing_ids)
        blocks, closed_at = _blocks(sequence)
        ids = np.concatenate([ids, blocks])
        positions = np.concatenate([positions, (start + prefix_lengths[:, None] + np.arange(size)).ravel()])
        read_at += closed_at
    read_at += sequence.steps
    return ExpandedSequence(sequence, ids, positions, prefix_lengths, np.array(read_at))


def _blocks(sequence: ScoringInput) -> tuple[Int64[np.ndarray, " M"], list[int]]:
    """Ids of the blocks, and where the head is read for each closed prefix."""
    closing, response = sequence.closing_ids, sequence.response_ids
    size = len(closing)
    ids: list[int] = []
    read_at = []
    for block, t in enumerate(sequence.closed_prefixes):
        missing = missing_closing(response[max(t - size, 0) : t], closing, sequence.least_closing)
        ids += [*missing, *closing[: size - len(missing)]]
        if missing:
            read_at.append(len(sequence.token_ids) + block * size + len(missing) - 1)
        elif sequence.prompt_length + t:  # an empty prefix of an empty prompt has no token to read
            read_at.append(sequence.prompt_length + t - 1)
    return np.array(ids, dtype=np.int64), read_at


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of an expanded sequence that runs in one pass.

    Attributes:
        expanded: the sequence.
        start, stop: what of it runs; blocks are never cut.
        cache: keys and values of all its tokens before `start`; None where the chunk starts with the first token.
        extends_cache: whether this chunk's keys and values are appended to the cache.
    """

    expanded: ExpandedSequence
    start: int
    stop: int
    cache: KVCache | None = None
    extends_cache: bool = False

    @classmethod
    def after(cls, expanded: ExpandedSequence, cache: KVCache | None) -> Chunk:
        """All of a sequence that is not in a cache."""
        return cls(expanded, 0 if cache is None else cache.length, len(expanded.ids), cache)

    @property
    def blocks(self) -> range:
        """Indices of the blocks that run."""
        size, length = max(len(self.expanded.sequence.closing_ids), 1), self.expanded.length
        return range(max(self.start - length, 0) // size, max(self.stop - length, 0) // size)

    @property
    def has_scored_token(self) -> bool:
        """Whether the scored token is in it."""
        return self.start <= self.expanded.sequence.scored_position < self.stop


def chunks_of(expanded: ExpandedSequence, tokens: int) -> Iterator[Chunk]:
    """Chunks of about equal size, to be run in order: at most `tokens` tokens each, or one block."""
    cache = KVCache()
    length, size = expanded.length, max(len(expanded.sequence.closing_ids), 1)
    for start, stop in _split(0, length, tokens):
        yield Chunk(expanded, start, stop, cache, extends_cache=stop < len(expanded.ids))
    for first, last in _split(0, (len(expanded.ids) - length) // size, max(tokens // size, 1)):
        yield Chunk(expanded, length + first * size, length + last * size, cache)


def _split(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in the fewest parts of at most `most`, of equal size but for rounding."""
    count = ceil((stop - start) / most)
    edges = [start + (stop - start) * part // count for part in range(count + 1)] if count else []
    yield from pairwise(edges)
