"""Token rewards inside the advantages of methods with a group baseline (GRPO, RLOO and the like)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["with_token_rewards"]


def with_token_rewards(
    sequence_advantages: ArrayLike, rewards: ArrayLike, mask: ArrayLike, alpha: float
) -> NDArray[np.float32]:
    """`A + alpha * (r_t - mean r)` at every token: float32[B, T], zero where the mask is.

    The mean is over the row's unmasked tokens, so the mean advantage of a row stays A. Token rewards therefore count
    neither the sequence's reward nor the group's baseline a second time.

    Args:
        sequence_advantages: A, [B], one per sequence, with the group's baseline already subtracted.
        rewards: r, [B, T], as `to_padded` returns them. Only differences within a row matter.
        mask: [B, T], true or 1 for the tokens to learn from.
        alpha: The weight of token rewards.

    Raises:
        ValueError: Shapes do not match, the mask holds other values than 0 and 1, or a number is not finite.
    """
    advantages, dense, given = np.asarray(sequence_advantages, "f8"), np.asarray(rewards, "f8"), np.asarray(mask)
    if dense.ndim != 2 or advantages.shape != dense.shape[:1] or given.shape != dense.shape:
        raise ValueError(
            f"advantages must be [B], rewards and mask [B, T], not {advantages.shape}, {dense.shape} and {given.shape}"
        )
    if not np.isin(given, (0, 1)).all():
        raise ValueError("the mask holds something else than 0 and 1")
    if not (np.isfinite(advantages).all() and np.isfinite(dense).all() and np.isfinite(alpha)):
        raise ValueError("advantages, rewards and alpha must be finite: a NaN would silently become a gradient")
    kept = given.astype(np.bool_)
    counts = np.maximum(kept.sum(axis=1, keepdims=True), 1)
    means = np.where(kept, dense, 0.0).sum(axis=1, keepdims=True) / counts
    return np.where(kept, advantages[:, None] + alpha * (dense - means), 0.0).astype(np.float32)
