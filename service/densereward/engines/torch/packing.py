"""Many sequences as one row of tokens, nothing in it twice, and where everything lies.

    | shared prompts | trunks, sharers of a prompt side by side | blocks of closed prefixes |  (kept keys)

A prompt that several sequences begin with stands once. A trunk is what else a piece has of its sequence's own tokens.
Keys kept from earlier passes have places too, behind the row's last token, so that a sequence may begin there: keys
and values are extended by them layer by layer, while no token runs again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from densereward.capture import AttentionRow, Contributions, Need, ReceivedAttention
from densereward.engines.torch.kept import KeptKeys, Prompt
from densereward.engines.torch.pieces import Piece

__all__ = ["Look", "PackedBatch", "Placed", "counted_from_0", "pack"]

_NOWHERE = range(0)


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
    blocks: range = _NOWHERE

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
        return np.concatenate([_places(self.shared), np.arange(self.trunk.start, self.scored + 1)])


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


def pack(
    pieces: Sequence[Piece], device: torch.device, layers: int, keep: Mapping[Prompt, KeptKeys] | None = None
) -> PackedBatch:
    """Lay pieces out in one row, with one copy to the device.

    Args:
        pieces: B pieces, of different sequences.
        device: where the model is.
        layers: how many the model has.
        keep: prompts without their last token, whose keys are kept.
    """
    row = _Row(pieces)
    ids, positions, key_positions = _fill(row)
    wanted = [_row_needs(each.piece, layers) for each in row.placed]
    rows_of = [index for index, needs in enumerate(wanted) if needs]
    rows = [row.placed[index] for index in rows_of]
    keys = [each.row_keys for each in rows]
    on_host = [
        ids,
        positions,
        key_positions,
        np.concatenate([each.reads for each in row.placed]),
        np.concatenate([each.following for each in row.placed]),
        np.array([each.gate for each in row.placed], dtype=np.int64),
        np.concatenate([*keys, _places(_NOWHERE)]),
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
        kept=row.kept,
        grows=list(_growing(row.placed, keep or {})),
        read=parts[3],
        following=parts[4],
        gates=parts[5],
        rows_of=rows_of,
        row_needs=frozenset().union(*wanted),
        row_keys=parts[6],
        row_owner=parts[7],
        scored=parts[8],
        sums={(i, n): None for i, each in enumerate(row.placed) for n in _sum_layers(each.piece, layers)},
    )


class _Row:
    """Hands out places, one after the other: what is shared first, then trunks, blocks, and kept keys.

    Attributes:
        placed: the pieces, in their order.
        groups, kept: as in `PackedBatch`.
        length: N.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.length = 0
        self.groups: list[tuple[range, range]] = []
        self.kept: list[KeptKeys] = []
        self._placed: dict[int, Placed] = {}
        shared, recalled, alone = _sorted_by_beginning(pieces)
        prompts = [self._take(pieces[members[0]].whole.sequence.prompt_length) for members in shared]
        for prompt, members in zip(prompts, shared, strict=True):
            self._place_group(pieces, members, prompt)
        blocks = sum(len(piece.blocks) * len(piece.whole.sequence.closing_ids) for piece in pieces)
        trunks = sum(_trunk_length(pieces[i]) for members in [*(each for _, each in recalled), alone] for i in members)
        behind = self.length + trunks + blocks
        for kept, members in recalled:
            self.kept.append(kept)
            self._place_group(pieces, members, range(behind, behind + kept.length))
            behind += kept.length
        for i in alone:
            self._placed[i] = Placed(pieces[i], _NOWHERE, self._take(_trunk_length(pieces[i])))
        self.placed = [self._with_blocks(self._placed[i]) for i in range(len(pieces))]

    def _take(self, count: int) -> range:
        self.length += count
        return range(self.length - count, self.length)

    def _place_group(self, pieces: Sequence[Piece], members: Sequence[int], beginning: range) -> None:
        first = self.length
        for i in members:
            start = max(pieces[i].start, len(beginning))
            trunk = self._take(max(min(pieces[i].stop, pieces[i].whole.length) - start, 0))
            self._placed[i] = Placed(pieces[i], beginning, trunk)
        self.groups.append((beginning, range(first, self.length)))

    def _with_blocks(self, placed: Placed) -> Placed:
        piece = placed.piece
        places = self._take(len(piece.blocks) * len(piece.whole.sequence.closing_ids))
        return Placed(piece, placed.shared, placed.trunk, places)


def _sorted_by_beginning(
    pieces: Sequence[Piece],
) -> tuple[list[list[int]], list[tuple[KeptKeys, list[int]]], list[int]]:
    """Indices of the pieces that share a prompt in the row, that begin with the same kept keys, and of the rest."""
    by_prompt, by_kept = defaultdict[Prompt, list[int]](list), defaultdict[KeptKeys, list[int]](list)
    alone = []
    for i, piece in enumerate(pieces):
        sequence = piece.whole.sequence
        if piece.kept is not None and piece.kept.length:
            by_kept[piece.kept].append(i)
        elif piece.start == 0 and 0 < sequence.prompt_length < min(piece.stop, piece.whole.length):
            by_prompt[tuple(sequence.token_ids[: sequence.prompt_length])].append(i)
        else:
            alone.append(i)
    shared = [members for members in by_prompt.values() if len(members) > 1]
    alone += [i for members in by_prompt.values() if len(members) == 1 for i in members]
    return shared, list(by_kept.items()), sorted(alone)


def _trunk_length(piece: Piece) -> int:
    """Tokens of the sequence itself that run in a piece, where its beginning does not stand in the row."""
    return max(min(piece.stop, piece.whole.length) - piece.start, 0)


def _fill(row: _Row) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"], Int64[np.ndarray, " L"]]:
    """Token ids and positions of the row, and positions of all keys."""
    ids = np.zeros(row.length, dtype=np.int64)
    positions = np.zeros(row.length + sum(kept.length for kept in row.kept), dtype=np.int64)
    for each in row.placed:
        whole, shared = each.piece.whole, len(each.shared)
        positions[each.shared.start : each.shared.stop] = np.arange(shared)
        if each.shared.start < row.length:
            ids[each.shared.start : each.shared.stop] = whole.ids[:shared]
        first = max(each.piece.start, whole.length)
        stretches = [(each.trunk, shared), (each.blocks, first)]
        for places, start in stretches:
            ids[places.start : places.stop] = whole.ids[start : start + len(places)]
            positions[places.start : places.stop] = whole.positions[start : start + len(places)]
    return ids, positions[: row.length], positions


def _growing(placed: Sequence[Placed], keep: Mapping[Prompt, KeptKeys]) -> Iterator[tuple[range, KeptKeys]]:
    """What is kept of this pass: of pieces their trunks, of prompts that come again all but the last token."""
    left = dict(keep)
    for each in placed:
        sequence = each.piece.whole.sequence
        if each.piece.grows and each.piece.kept is not None:
            yield each.trunk, each.piece.kept
        elif left and (kept := left.pop(tuple(sequence.token_ids[: sequence.prompt_length]), None)) is not None:
            yield (each.shared or each.trunk)[: sequence.prompt_length - 1], kept


def _row_needs(piece: Piece, layers: int) -> frozenset[AttentionRow | Contributions]:
    """The rows of its scored token that a piece must give, layers counted from 0."""
    needs = piece.whole.sequence.needs if piece.reads_row else frozenset()
    return frozenset(counted_from_0(need, layers) for need in needs if isinstance(need, AttentionRow | Contributions))


def counted_from_0(need: AttentionRow | Contributions, layers: int) -> AttentionRow | Contributions:
    """The same need, its layer not counted from the last."""
    return need if need.layer is None else replace(need, layer=need.layer % layers)


def _sum_layers(piece: Piece, layers: int) -> frozenset[int]:
    """Layers in which a piece must sum up attention, counted from 0."""
    needs = piece.whole.sequence.needs
    return frozenset(need.layer % layers for need in needs if isinstance(need, ReceivedAttention))


def _places(places: range) -> Int64[np.ndarray, " n"]:
    return np.arange(places.start, places.stop)
