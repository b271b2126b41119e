"""Token rewards inside the advantages of methods with a group baseline (GRPO, RLOO and their kin)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["with_token_rewards"]


def with_token_rewards(
    sequence_advantages: ArrayLike, rewards: ArrayLike, mask: ArrayLike, alpha: float
) -> NDArray[np.float32]:
    """`A + alpha * (r_t - mean r)` at every token: float32[B, T], zero where the mask is.

    The mean is over the row's own tokens, so a row's mean advantage stays the sequence's. That is why token rewards
    can be added to a group's advantages without counting the sequence's reward, or its baseline, a second time.

    Args:
        sequence_advantages: [B], one for each sequence, the group's baseline already taken off.
        rewards: [B, T], such as `to_padded` gives. Their level is of no consequence, only their differences.
        mask: [B, T], true or 1 for the tokens that are learned from.
        alpha: How much of a difference of 1 between two tokens' rewards becomes a difference of their advantages.

    Raises:
        ValueError: Shapes do not fit, the mask holds something else than 0 and 1, or a number is not finite.
    """
    sequence, dense, given = np.asarray(sequence_advantages, "f8"), np.asarray(rewards, "f8"), np.asarray(mask)
    if dense.ndim != 2 or sequence.shape != dense.shape[:1] or given.shape != dense.shape:
        raise ValueError(
            f"advantages are [B], rewards and mask [B, T], not {sequence.shape}, {dense.shape} and {given.shape}"
        )
    if not np.isin(given, (0, 1)).all():
        raise ValueError("the mask holds something else than 0 and 1")
    if not (np.isfinite(sequence).all() and np.isfinite(dense).all() and np.isfinite(alpha)):
        raise ValueError("advantages, rewards and alpha must be finite: a NaN would become a gradient in silence")
    kept = given.astype(np.bool_)
    counts = np.maximum(kept.sum(axis=1, keepdims=True), 1)
    means = np.where(kept, dense, 0.0).sum(axis=1, keepdims=True) / counts
    return np.where(kept, sequence[:, None] + alpha * (dense - means), 0.0).astype(np.float32)
