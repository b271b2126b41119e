"""Pads the rewards of an answer into the [B, T] array that a trainer computes with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .wire import SampleTokenRewards, TokenRewardsResponse

if TYPE_CHECKING:
    import torch

__all__ = ["Padded", "to_padded"]


class Padded(NamedTuple):
    """Token rewards of a batch. Unpacks: `rewards, mask = to_padded(answer, "red")`.

    Attributes:
        rewards: float32[B, T]; 0 for padding.
        mask: bool[B, T]; True for tokens, also those with 0 in `response_mask`; False for padding.
    """

    rewards: NDArray[np.float32]
    mask: NDArray[np.bool_]

    def to_torch(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (torch.float32) and mask (torch.bool), both [B, T]; on the CPU they share this object's memory."""
        import torch

        return torch.from_numpy(self.rewards).to(device), torch.from_numpy(self.mask).to(device)


def to_padded(
    answer: TokenRewardsResponse,
    method: str,
    *,
    length: int | None = None,
    padding_side: Literal["right", "left"] = "right",
) -> Padded:
    """Token rewards of one method, one row per sample, in the order of the request.

    Args:
        answer: What `Client.token_rewards` returned.
        method: The method's name, or the label it was requested with.
        length: T, the number of columns; by default the length of the longest row.
        padding_side: "right" starts every row in column 0, "left" ends every row in column T - 1.

    Raises:
        ValueError: A sample was not served, has no rewards of this method, or has more tokens than `length`.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', not {padding_side!r}")
    rows = [row_of(item, method) for item in answer.data]
    longest = max(map(len, rows), default=0)
    columns = longest if length is None else length
    if longest > columns:
        index = next(index for index, row in enumerate(rows) if len(row) == longest)
        raise ValueError(f"sample {index} has {longest} tokens, more than length={columns}; rows are never cut")
    rewards = np.zeros((len(rows), columns), dtype=np.float32)
    mask = np.zeros((len(rows), columns), dtype=np.bool_)
    for index, row in enumerate(rows):
        filled = slice(0, len(row)) if padding_side == "right" else slice(columns - len(row), columns)
        rewards[index, filled] = row
        mask[index, filled] = True
    return Padded(rewards, mask)


def row_of(item: SampleTokenRewards, method: str) -> NDArray[np.float32]:
    """An item's token rewards of one method.

    Raises:
        ValueError: The item was not served, or has none of this method.
    """
    if item.error is not None:
        raise ValueError(
            f"sample {item.index} (id {item.id!r}) was not served: {item.error.code}: {item.error.message}"
        )
    if method not in item.token_rewards:
        available = ", ".join(sorted(item.token_rewards)) or "none"
        raise ValueError(f"sample {item.index} has no token rewards of {method!r}; there are: {available}")
    return item.token_rewards[method]
