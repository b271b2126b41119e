"""Many sequences as one row of tokens, and where everything lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from densereward.capture import AttentionRow, PrefixScores, ScoringInput

__all__ = ["PackedBatch", "pack"]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B sequences in one row of N tokens.

    Attributes:
        token_ids, position_ids: [1, N]; positions start at 0 in every sequence.
        bounds: where each sequence starts, and N at the end, on the host.
        cumulative_lengths: the same on the device, as variable-length attention wants it.
        segment: [N], which sequence a token belongs to.
        scored: [B], where each sequence's score is read.
        read: [M], every position the score head is read at, sequence after sequence: the scored one first, then
            the prefixes where they are asked for.
        row_layers: layers whose scored rows are kept, counted from 0.
        rows: filled by the attention function, layer by layer: [N], each sequence's scored row in its own place.
    """

    token_ids: Int64[Tensor, "1 N"]
    position_ids: Int64[Tensor, "1 N"]
    bounds: list[int]
    cumulative_lengths: Int32[Tensor, " _"]
    segment: Int64[Tensor, " N"]
    scored: Int64[Tensor, " B"]
    read: Int64[Tensor, " M"]
    row_layers: frozenset[int]
    rows: dict[int, Float32[Tensor, " N"]] = field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """Tokens in the longest sequence."""
        return max(stop - start for start, stop in self.segments)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """[start, stop) of each sequence."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))


def read_positions(sequence: ScoringInput) -> list[int]:
    """Where the head is read in one sequence: the scored position, then s_0 (if there is a prompt) and s_1..s_T."""
    positions = [sequence.scored_position]
    if PrefixScores() in sequence.needs:
        positions.extend(range(max(sequence.prompt_length - 1, 0), sequence.response_stop))
    return positions


def pack(batch: Sequence[ScoringInput], device: torch.device, layers: int) -> PackedBatch:
    """Lay a batch out in one row, with one copy to the device.

    Args:
        batch: B sequences.
        device: where the model is.
        layers: how many the model has.
    """
    lengths = torch.tensor([len(sequence.token_ids) for sequence in batch])
    bounds = [0, *lengths.cumsum(0).tolist()]
    starts = torch.tensor(bounds[:-1])
    segment = torch.repeat_interleave(torch.arange(len(batch)), lengths)
    token_ids = torch.tensor([token for sequence in batch for token in sequence.token_ids])
    position_ids = torch.arange(bounds[-1]) - starts[segment]
    scored = torch.tensor([sequence.scored_position for sequence in batch]) + starts
    read = [start + p for start, sequence in zip(bounds[:-1], batch, strict=True) for p in read_positions(sequence)]
    on_host = (token_ids, position_ids, segment, scored, torch.tensor(read))
    moved = torch.split(torch.cat(on_host).to(device, non_blocking=True), [len(part) for part in on_host])
    return PackedBatch(
        token_ids=moved[0][None],
        position_ids=moved[1][None],
        bounds=bounds,
        cumulative_lengths=torch.tensor(bounds, dtype=torch.int32, device=device),
        segment=moved[2],
        scored=moved[3],
        read=moved[4],
        row_layers=frozenset(
            need.layer % layers for each in batch for need in each.needs if isinstance(need, AttentionRow)
        ),
    )
