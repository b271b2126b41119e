"""A sequence written out for the engine, and the pieces it runs in.

A sequence is written out as its own tokens followed by the blocks of its closed prefixes: the closing tokens once for
each prefix that is scored closed, at the positions they would have if the response ended there. A piece is a stretch
of that. A batch runs every sequence in one piece; a sequence too long for one pass runs in several, each on the keys
that those before it left.

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
from densereward.engines.torch.kept import KeptKeys

__all__ = ["Piece", "WrittenOut", "in_pieces", "write_out"]

_OPEN = PrefixScores("open")


@dataclass(frozen=True, slots=True)
class WrittenOut:
    """One sequence and its closed prefixes.

    A prefix that already ends with a part of the closing tokens is only given the rest; its block is filled up behind
    the tokens that count, where nothing looks at them.

    Attributes:
        sequence: the sequence.
        ids, positions: [S + B * c], block after block behind the sequence.
        closed_at: [B], response tokens before each block, in order; empty where no closed prefix is needed.
        reads: where the head is read: R, then open s_0 (if there is a token before it) and s_1..s_T, then closed s_0
            (likewise) and one score a block, then one a step.
        following: the token after each read, for a head that judges it; otherwise empty.
    """

    sequence: ScoringInput
    ids: Int64[np.ndarray, " N"]
    positions: Int64[np.ndarray, " N"]
    closed_at: Int64[np.ndarray, " B"]
    reads: Int64[np.ndarray, " R"]
    following: Int64[np.ndarray, " _"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def length(self) -> int:
        """S: where the blocks begin."""
        return len(self.sequence.token_ids)


def write_out(sequence: ScoringInput) -> WrittenOut:
    """Lay out a sequence's tokens, its closed prefixes' blocks, and what is read of both."""
    ids, start = np.asarray(sequence.token_ids, dtype=np.int64), sequence.prompt_length
    positions = np.arange(len(ids))
    reads = [sequence.scored_position]
    if _OPEN in sequence.needs:
        reads += range(max(start - 1, 0), sequence.response_stop)
    closed_at = np.asarray(sequence.closed_prefixes, dtype=np.int64)
    if len(closed_at):
        size = len(sequence.closing_ids)
        blocks, closed_reads = _blocks(sequence)
        ids = np.concatenate([ids, blocks])
        positions = np.concatenate([positions, (start + closed_at[:, None] + np.arange(size)).ravel()])
        reads += closed_reads
    reads += sequence.steps
    return WrittenOut(sequence, ids, positions, closed_at, np.array(reads))


def _blocks(sequence: ScoringInput) -> tuple[Int64[np.ndarray, " M"], list[int]]:
    """Ids of the blocks, and where each closed prefix is read."""
    closing, response = sequence.closing_ids, sequence.response_ids
    size = len(closing)
    ids: list[int] = []
    reads = []
    for block, t in enumerate(sequence.closed_prefixes):
        missing = missing_closing(response[max(t - size, 0) : t], closing, sequence.least_closing)
        ids += [*missing, *closing[: size - len(missing)]]
        if missing:
            reads.append(len(sequence.token_ids) + block * size + len(missing) - 1)
        elif sequence.prompt_length + t:  # before an empty prompt there is nothing to read
            reads.append(sequence.prompt_length + t - 1)
    return np.array(ids, dtype=np.int64), reads


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a written-out sequence that runs in one pass.

    Attributes:
        whole: the sequence.
        start, stop: what of it runs; blocks are never cut.
        kept: keys of all the sequence's tokens before `start`; None where it begins with its first token.
        grows: whether the keys of this piece's tokens are added to them.
    """

    whole: WrittenOut
    start: int
    stop: int
    kept: KeptKeys | None = None
    grows: bool = False

    @classmethod
    def after(cls, whole: WrittenOut, kept: KeptKeys | None) -> Piece:
        """All of a sequence, or all after the keys that are kept of it."""
        return cls(whole, 0 if kept is None else kept.length, len(whole.ids), kept)

    @property
    def blocks(self) -> range:
        """Which of the closed prefixes' blocks run."""
        size, length = max(len(self.whole.sequence.closing_ids), 1), self.whole.length
        return range(max(self.start - length, 0) // size, max(self.stop - length, 0) // size)

    @property
    def reads_row(self) -> bool:
        """Whether the scored token is in it."""
        return self.start <= self.whole.sequence.scored_position < self.stop


def in_pieces(whole: WrittenOut, tokens: int) -> Iterator[Piece]:
    """Pieces of about equal size, at most `tokens` each or one block; the keys grow while they are run in order."""
    kept = KeptKeys()
    length, size = whole.length, max(len(whole.sequence.closing_ids), 1)
    for start, stop in _cuts(0, length, tokens):
        yield Piece(whole, start, stop, kept, grows=stop < len(whole.ids))
    for first, last in _cuts(0, (len(whole.ids) - length) // size, max(tokens // size, 1)):
        yield Piece(whole, length + first * size, length + last * size, kept)


def _cuts(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in as few parts as may be, of equal size but for one."""
    count = ceil((stop - start) / most)
    edges = [start + (stop - start) * part // count for part in range(count + 1)] if count else []
    yield from pairwise(edges)
