"""Many sequences as one row of tokens, nothing in it twice, and where everything lies.

    | shared prompts | trunks, sharers of a prompt side by side | blocks of closed prefixes |  (kept keys)

A prompt that several sequences begin with stands once. A trunk is what else a piece has of its sequence's own tokens.
Keys kept from earlier passes have places too, behind the row's last token, so that a sequence may begin there: keys
and values are extended by them layer by layer, while no token runs again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64

from densereward.capture import AttentionRow, Contributions, ReceivedAttention
from densereward.engines.torch.kept import KeptKeys, Prompt
from densereward.engines.torch.packed_batch import PackedBatch, Placed, places_of
from densereward.engines.torch.pieces import Piece

__all__ = ["counted_from_0", "pack"]

_NOWHERE = range(0)


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
        np.concatenate([*keys, places_of(_NOWHERE)]),
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
