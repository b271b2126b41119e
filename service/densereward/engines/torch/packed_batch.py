"""A packed batch: many sequences as one row of tokens, and where everything of each lies in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from densereward.capture import AttentionRow, Contributions, Need
from densereward.engines.torch.kept import KeptKeys
from densereward.engines.torch.pieces import Piece

__all__ = ["Look", "PackedBatch", "Placed", "places_of"]


@dataclass(frozen=True, slots=True)
class Placed:
    """One piece and its places.

    Attributes:
        piece: what runs.
        shared: where the sequence's beginning stands, if elsewhere: a prompt of several, or kept keys.
        trunk: the tokens of its own that follow.
        blocks: its closed prefixes, (blocks of the piece) * size places.
    """

    piece: Piece
    shared: range
    trunk: range
    blocks: range = range(0)

    @property
    def prompt(self) -> list[range]:
        """Where the prompt lies, in one stretch or two."""
        length = self.piece.whole.sequence.prompt_length
        parts = [self.shared[:length], self.trunk[: max(length - len(self.shared), 0)]]
        return [part for part in parts if part]

    @property
    def response(self) -> range:
        """Where the response lies; of use where it lies together, as it does wherever there are blocks."""
        sequence = self.piece.whole.sequence
        start, stop = (position - len(self.shared) for position in (sequence.prompt_length, sequence.response_stop))
        return self.trunk[start:stop] if start >= 0 else self.shared[sequence.prompt_length : sequence.response_stop]

    @property
    def read_slots(self) -> Int64[np.ndarray, " r"]:
        """Which of the sequence's reads this piece holds."""
        reads = self.piece.whole.reads
        return np.flatnonzero((reads >= self.piece.start) & (reads < self.piece.stop))

    @property
    def reads(self) -> Int64[np.ndarray, " r"]:
        """Their places."""
        at = self.piece.whole.reads[self.read_slots]
        length = self.piece.whole.length
        shared, trunk = self.shared.start + at, self.trunk.start + at - len(self.shared)
        blocks = self.blocks.start + at - max(self.piece.start, length)
        places: Int64[np.ndarray, " r"] = np.where(at >= length, blocks, np.where(at < len(self.shared), shared, trunk))
        return places

    @property
    def following(self) -> Int64[np.ndarray, " _"]:
        """The token after each of them, where a head judges it."""
        following = self.piece.whole.following
        return following[self.read_slots] if len(following) else following

    @property
    def gate(self) -> int:
        """Where the sequence's gate is read; of use where it runs in one piece, from its first token on."""
        position = self.piece.whole.sequence.gate
        shared = len(self.shared)
        return self.shared.start + position if position < shared else self.trunk.start + position - shared

    @property
    def scored(self) -> int:
        """Where the score is read."""
        return self.trunk.start + self.piece.whole.sequence.scored_position - len(self.shared)

    @property
    def row_keys(self) -> Int64[np.ndarray, " r"]:
        """Places of the keys that the scored token can look at, from the sequence's first on."""
        return np.concatenate([places_of(self.shared), np.arange(self.trunk.start, self.scored + 1)])


@dataclass(frozen=True, slots=True)
class Look:
    """What the scored tokens looked at in one layer.

    Attributes:
        weights: of each of `row_keys`, in each head.
        values: theirs, not yet expanded to all heads.
    """

    weights: Float32[Tensor, "K H"]
    values: Float[Tensor, "G K E"]


@dataclass(frozen=True)
class PackedBatch:
    """B pieces in one row of N tokens, and M kept keys behind it.

    Attributes:
        token_ids, position_ids: [1, N]; a token's position is the one it has in its own sequence.
        key_positions: [N + M], those of the keys.
        placed: the pieces, in the batch's order.
        groups: where sequences begin, if elsewhere, with the places of all the trunks that follow there.
        kept: keys from earlier passes, in the order of their places.
        grows: places whose keys are kept, and what they are added to.
        read: every place the head is read at, piece after piece.
        following: the token after each, for a head that judges it; otherwise empty.
        gates: where each piece's gate is read.
        rows_of: indices of the pieces of whose scored tokens rows are kept.
        row_needs: the rows, of any of them, with layers counted from 0.
        row_keys: keys that scored tokens can look at, row after row.
        row_owner: the row of each such key.
        scored: where the rows' scored tokens stand.
        sums: per piece and layer as it is needed, the attention that its queries in the response give to the
            sequence's keys so far; filled by the attention function.
        rows: filled by the attention function, layer by layer: the scored rows, laid out as `row_keys`.
        looks: filled likewise where contributions are needed: what the scored tokens looked at.
        outputs: filled likewise in every layer: the attention's output at the scored tokens.
    """

    token_ids: Int64[Tensor, "1 N"]
    position_ids: Int64[Tensor, "1 N"]
    key_positions: Int64[Tensor, " L"]
    placed: list[Placed]
    groups: list[tuple[range, range]]
    kept: list[KeptKeys]
    grows: list[tuple[range, KeptKeys]]
    read: Int64[Tensor, " _"]
    following: Int64[Tensor, " _"]
    gates: Int64[Tensor, " B"]
    rows_of: list[int]
    row_needs: frozenset[AttentionRow | Contributions]
    row_keys: Int64[Tensor, " K"]
    row_owner: Int64[Tensor, " K"]
    scored: Int64[Tensor, " R"]
    sums: dict[tuple[int, int], Float32[Tensor, " _"] | None]
    rows: dict[Need, Float32[Tensor, " K"]] = field(default_factory=dict)
    looks: dict[int, Look] = field(default_factory=dict)
    outputs: dict[int, Float[Tensor, "1 R H E"]] = field(default_factory=dict)

    @property
    def contributions(self) -> list[Contributions]:
        """The contributions that are needed."""
        return [need for need in self.row_needs if isinstance(need, Contributions)]

    @cached_property
    def segments(self) -> list[range]:
        """What attends to itself causally: prompts that stand in the row and trunks, in the order they lie in."""
        length = self.token_ids.shape[1]
        every = {prompt for prompt, _ in self.groups if prompt.start < length} | {each.trunk for each in self.placed}
        return sorted(filter(None, every), key=lambda places: places.start)

    @cached_property
    def blocks(self) -> list[Placed]:
        """The pieces with closed prefixes."""
        return [each for each in self.placed if each.blocks]

    @cached_property
    def longest(self) -> int:
        """The furthest position and one."""
        return max(int(each.piece.whole.positions.max(initial=0)) for each in self.placed) + 1


def places_of(places: range) -> Int64[np.ndarray, " n"]:
    """The places as an array."""
    return np.arange(places.start, places.stop)
