"""Many sequences as one row of tokens, nothing in it twice, and where everything lies.

    | shared prompts | trunks, sharers of a prompt side by side | blocks of closed prefixes |

A prompt that several sequences begin with stands once. A trunk is what else a sequence has: its response and closing
tokens, and its prompt if that is its own. The blocks of closed prefixes are the closing tokens of every prefix of a
response, T + 1 blocks of equal size, each at the positions it would have if the response ended there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from densereward.capture import AttentionRow, PrefixScores, ScoringInput, missing_closing

__all__ = ["Blocks", "PackedBatch", "Placed", "pack"]

_OPEN, _CLOSED = PrefixScores("open"), PrefixScores("closed")
_NOWHERE = range(0)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The closed prefixes of one sequence; block t, t = 0..T, follows t response tokens.

    A prefix that already ends with a part of the closing tokens is only given the rest; its block is filled up behind
    the tokens that count, where nothing looks at them.

    Attributes:
        tokens: where the blocks lie, (T + 1) * size places.
        size: tokens in a block.
        ids: what stands there.
        reads: places where the scores of s_0..s_T are read; without s_0 if there is no token before it.
    """

    tokens: range
    size: int
    ids: list[int]
    reads: list[int]


@dataclass(frozen=True, slots=True)
class Placed:
    """One sequence and its places in the row.

    Attributes:
        sequence: the sequence.
        shared: its prompt, where it is shared; otherwise empty.
        trunk: its own tokens.
        blocks: its closed prefixes, where they are needed.
    """

    sequence: ScoringInput
    shared: range
    trunk: range
    blocks: Blocks | None = None

    def place(self, position: int) -> int:
        """Where a position of the sequence lies."""
        own = position - len(self.shared)
        return self.trunk.start + own if own >= 0 else self.shared.start + position

    @property
    def prompt(self) -> range:
        """Where the prompt lies."""
        return self.shared or self.trunk[: self.sequence.prompt_length]

    @property
    def response(self) -> range:
        """Where the response lies."""
        start = self.place(self.sequence.prompt_length)
        return range(start, start + self.sequence.response_length)

    @property
    def reads(self) -> list[int]:
        """Places the head is read at: R, then s_0 (if there is a prompt) and s_1..s_T open, then s_0..s_T closed."""
        places = [self.place(self.sequence.scored_position)]
        if _OPEN in self.sequence.needs:
            places += [*self.prompt[-1:], *self.response]
        if self.blocks is not None:
            places += self.blocks.reads
        return places

    @property
    def row_keys(self) -> Int64[Tensor, " _"]:
        """Places of the keys that the scored token can look at, from the sequence's first on."""
        own = torch.arange(self.trunk.start, self.place(self.sequence.scored_position) + 1)
        return torch.cat([torch.arange(self.shared.start, self.shared.stop), own])


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in one row of N tokens.

    Attributes:
        token_ids, position_ids: [1, N]; a token's position is the one it has in its own sequence.
        placed: the sequences, in the batch's order.
        groups: each shared prompt, with the places of all the trunks that follow it.
        read: every place the score head is read at, sequence after sequence.
        row_layers: layers whose scored rows are kept, counted from 0.
        row_keys: keys that scored tokens can look at, sequence after sequence.
        row_owner: the sequence of each such key.
        scored: [B], where the scores are read.
        rows: filled by the attention function, layer by layer: the scored rows, laid out as `row_keys`.
    """

    token_ids: Int64[Tensor, "1 N"]
    position_ids: Int64[Tensor, "1 N"]
    placed: list[Placed]
    groups: list[tuple[range, range]]
    read: Int64[Tensor, " _"]
    row_layers: frozenset[int]
    row_keys: Int64[Tensor, " K"]
    row_owner: Int64[Tensor, " K"]
    scored: Int64[Tensor, " B"]
    rows: dict[int, Float32[Tensor, " K"]] = field(default_factory=dict)

    @cached_property
    def segments(self) -> list[range]:
        """What attends to itself causally: shared prompts and trunks, in the order they lie in."""
        every = [prompt for prompt, _ in self.groups] + [each.trunk for each in self.placed]
        return sorted(every, key=lambda places: places.start)

    @cached_property
    def blocks(self) -> list[tuple[Placed, Blocks]]:
        """The closed prefixes, with the sequences they are of."""
        return [(each, each.blocks) for each in self.placed if each.blocks is not None and each.blocks.size]

    @cached_property
    def longest(self) -> int:
        """Tokens in the longest sequence, or a little more."""
        return max(len(each.sequence.token_ids) + (each.blocks.size if each.blocks else 0) for each in self.placed)


def pack(batch: Sequence[ScoringInput], device: torch.device, layers: int) -> PackedBatch:
    """Lay a batch out in one row, with one copy to the device.

    Args:
        batch: B sequences.
        device: where the model is.
        layers: how many the model has.
    """
    placed, groups = _lay_out(batch)
    length = max(each.blocks.tokens.stop if each.blocks else each.trunk.stop for each in placed)
    ids, positions = _fill(placed, length)
    row_layers = frozenset(n.layer % layers for each in batch for n in each.needs if isinstance(n, AttentionRow))
    keys = [each.row_keys for each in placed] if row_layers else []
    on_host = [
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor([place for each in placed for place in each.reads]),
        torch.cat(keys) if keys else torch.zeros(0, dtype=torch.int64),
        torch.repeat_interleave(torch.arange(len(keys)), torch.tensor([len(each) for each in keys], dtype=torch.int64)),
        torch.tensor([each.place(each.sequence.scored_position) for each in placed]),
    ]
    moved = torch.split(torch.cat(on_host).to(device, non_blocking=True), [len(part) for part in on_host])
    return PackedBatch(
        token_ids=moved[0][None],
        position_ids=moved[1][None],
        placed=placed,
        groups=groups,
        read=moved[2],
        row_layers=row_layers,
        row_keys=moved[3],
        row_owner=moved[4],
        scored=moved[5],
    )


class _Row:
    """Hands out places, one after the other."""

    def __init__(self) -> None:
        self.length = 0

    def take(self, count: int) -> range:
        self.length += count
        return range(self.length - count, self.length)


def _lay_out(batch: Sequence[ScoringInput]) -> tuple[list[Placed], list[tuple[range, range]]]:
    """Give every sequence its places, in the batch's order, and name the shared prompts."""
    row = _Row()
    sharers = _sharers(batch)
    prompts = [row.take(batch[members[0]].prompt_length) for members in sharers]
    placed: dict[int, Placed] = {}
    groups = []
    for prompt, members in zip(prompts, sharers, strict=True):
        first = row.length
        for i in members:
            placed[i] = Placed(batch[i], prompt, row.take(len(batch[i].token_ids) - len(prompt)))
        groups.append((prompt, range(first, row.length)))
    for i, sequence in enumerate(batch):
        if i not in placed:
            placed[i] = Placed(sequence, _NOWHERE, row.take(len(sequence.token_ids)))
    in_order = [placed[i] for i in range(len(batch))]
    return [_with_blocks(each, row) if _CLOSED in each.sequence.needs else each for each in in_order], groups


def _sharers(batch: Sequence[ScoringInput]) -> list[list[int]]:
    """Indices of the sequences that begin with one prompt and go on after it, for each prompt that several have."""
    by_prompt = defaultdict(list)
    for i, sequence in enumerate(batch):
        if 0 < sequence.prompt_length < len(sequence.token_ids):
            by_prompt[tuple(sequence.token_ids[: sequence.prompt_length])].append(i)
    return [members for members in by_prompt.values() if len(members) > 1]


def _with_blocks(placed: Placed, row: _Row) -> Placed:
    """The sequence with a block of closing tokens for each prefix of its response."""
    sequence = placed.sequence
    closing, response = sequence.closing_ids, sequence.response_ids
    size = len(closing)
    tokens = row.take(size * (len(response) + 1))
    ids: list[int] = []
    reads = []
    for t in range(len(response) + 1):
        missing = missing_closing(response[:t], closing)
        ids += [*missing, *closing[: size - len(missing)]]
        if missing:
            reads.append(tokens.start + t * size + len(missing) - 1)
        elif sequence.prompt_length + t:  # before an empty prompt there is nothing to read
            reads.append(placed.place(sequence.prompt_length + t - 1))
    return replace(placed, blocks=Blocks(tokens, size, ids, reads))


def _fill(placed: Sequence[Placed], length: int) -> tuple[list[int], list[int]]:
    """Token ids and positions of the whole row."""
    ids, positions = [0] * length, [0] * length
    for each in placed:
        sequence, shared = each.sequence, each.shared
        _write(ids, shared, sequence.token_ids[: len(shared)])
        _write(positions, shared, range(len(shared)))
        _write(ids, each.trunk, sequence.token_ids[len(shared) :])
        _write(positions, each.trunk, range(len(shared), len(sequence.token_ids)))
        if each.blocks is not None:
            starts = range(sequence.prompt_length, sequence.response_stop + 1)
            _write(ids, each.blocks.tokens, each.blocks.ids)
            _write(positions, each.blocks.tokens, [start + j for start in starts for j in range(each.blocks.size)])
    return ids, positions


def _write(row: list[int], places: range, values: Sequence[int]) -> None:
    row[places.start : places.stop] = values
