"""Rewards onto the trainer's tokens: byte overlap, the mix with the sparse reward, mask, scale and clip.

Sums are computed in float64 and become float32 at the very end. A slot is one token of the trainer's: a span it sent,
or the reward model's own token where it sent none. T tokens, L slots.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from densereward.capture import Span
from densereward.errors import EngineFailure, InvalidRequest
from densereward.methods.base import Credit, Params
from densereward_client.wire import Sample

__all__ = ["Placed", "Slots", "check_sum", "move_to_spans", "place", "slot_boundaries", "slots_of"]


@dataclass(frozen=True, slots=True)
class Slots:
    """The trainer's tokens, on which it wants its rewards.

    Attributes:
        count: L.
        spans: the trainer's spans; None where the slots are the reward model's own tokens.
        kept: indices of the slots that may carry a reward; None keeps all.
    """

    count: int
    spans: Sequence[Span] | None = None
    kept: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.count and self.kept is not None and not self.kept:
            raise InvalidRequest("response_mask keeps no token, so the reward has nowhere to go", code="empty_mask")


@dataclass(frozen=True, slots=True)
class Placed:
    """Rewards on the trainer's tokens: sum(rewards) + baseline == scale * R.

    Attributes:
        rewards: one a slot.
        baseline: what their sum leaves out, clipped parts included; all of R where there is no slot.
        scale: what everything was multiplied by.
        clipped: what was cut off, summed with its signs.
    """

    rewards: Float32[np.ndarray, " L"]
    baseline: float
    scale: float = 1.0
    clipped: float = 0.0


def slots_of(sample: Sample, response_length: int) -> Slots:
    """Where the rewards go; every list with an entry for each slot must have their number.

    Args:
        sample: as the trainer sent it.
        response_length: T.

    Raises:
        InvalidRequest: a list has another number of entries, or spans are not in order.
    """
    spans = sample.response_spans
    if spans is not None:
        _check_spans(spans, len((sample.response or "").encode()), response_length)
    count = response_length if spans is None else len(spans)
    for name in ("response_mask", "weights", "token_entropies"):
        values = getattr(sample, name)
        if values is not None and len(values) != count:
            unit = "the response's tokens" if spans is None else "response_spans"
            raise InvalidRequest(
                f"{name} has {len(values)} entries for {count} {unit}",
                code="length_mismatch",
                field=name,
                given=len(values),
                expected=count,
            )
    kept = None if sample.response_mask is None else [i for i, keep in enumerate(sample.response_mask) if keep]
    return Slots(count, spans, kept)


def _check_spans(spans: Sequence[Span], size: int, response_length: int) -> None:
    if response_length and not spans:
        raise InvalidRequest("response_spans is empty", code="invalid_spans", field="response_spans")
    reached = 0
    for i, (start, stop) in enumerate(spans):
        if not reached <= start <= stop <= size:
            raise InvalidRequest(
                f"response_spans[{i}] = [{start}, {stop}] must lie in order, without overlap, within the response's "
                f"{size} UTF-8 bytes",
                code="invalid_spans",
                field="response_spans",
            )
        reached = stop


def place(credit: Credit, reward: float, params: Params, slots: Slots, token_spans: Sequence[Span] | None) -> Placed:
    """A method's dense rewards on the trainer's slots: mixed with the sparse reward, masked, scaled and clipped.

    Args:
        credit: dense rewards on tokens or slots.
        reward: R.
        params: the method's, settled: `normalize` is a number or None.
        slots: where the rewards go.
        token_spans: the reward model's tokens in the response; needed where the trainer sent spans.

    Raises:
        EngineFailure: a reward is not finite, or the sum is not what it must be.
    """
    if params.normalize == "running":
        raise ValueError("the parameters were not settled")
    scale, beta = 1.0 / (params.normalize or 1.0), params.beta
    if not slots.count:
        check_sum(np.zeros(0, np.float32), scale * reward, scale * reward)
        return Placed(np.zeros(0, np.float32), scale * reward, scale)
    dense = credit.rewards
    if credit.on == "tokens" and slots.spans is not None:
        if token_spans is None:
            raise ValueError("the reward model's tokens have no spans to map from")
        dense = move_to_spans(dense, token_spans, slots.spans)
    mixed = beta * dense
    mixed[-1] += (1.0 - beta) * reward
    if slots.kept is not None:
        mixed = _move_to_kept(mixed, slots.kept)
    placed = scale * mixed
    clipped = 0.0
    if params.clip is not None:
        within = placed.clip(-params.clip, params.clip)
        placed, clipped = within, float((placed - within).sum())
    baseline = scale * beta * credit.baseline + clipped
    rewards = placed.astype(np.float32)
    check_sum(rewards, baseline, scale * reward)
    return Placed(rewards, baseline, scale, clipped)


def slot_boundaries(boundaries: Sequence[int], slots: Slots, token_spans: Sequence[Span] | None) -> list[int]:
    """The number of slots before each boundary between the reward model's tokens; a slot across it counts as before."""
    if slots.spans is None or token_spans is None:
        return list(boundaries)
    starts = [start for start, _ in slots.spans]
    ends = [0, *(stop for _, stop in token_spans)]
    return [slots.count if each == len(token_spans) else bisect_left(starts, ends[each]) for each in boundaries]


def move_to_spans(
    values: Float64[np.ndarray, " T"], sources: Sequence[Span], targets: Sequence[Span]
) -> Float64[np.ndarray, " L"]:
    """Move values from source spans to target spans in proportion to the bytes they share; the sum stays the same.

    Targets are in order and do not overlap, so one walk over both finds every shared byte. A source that shares no
    byte with any target (white space the trainer skipped, a token of no bytes) goes whole to the next target that
    ends after it, or to the last one.
    """
    result = np.zeros(len(targets))
    first = 0
    for value, (start, stop) in sorted(zip(values, sources, strict=True), key=lambda each: each[1][0]):
        while first < len(targets) - 1 and targets[first][1] <= start:
            first += 1
        shares = _overlaps(start, stop, targets, first)
        total = sum(share for _, share in shares)
        if total == 0:
            result[first] += value
        for target, share in shares:
            result[target] += value * share / total
    return result


def _overlaps(start: int, stop: int, targets: Sequence[Span], first: int) -> list[tuple[int, int]]:
    """(target, shared bytes) of every target from `first` on that shares bytes with [start, stop)."""
    shares = []
    for target in range(first, len(targets)):
        target_start, target_stop = targets[target]
        if target_start >= stop:
            break
        if (shared := min(stop, target_stop) - max(start, target_start)) > 0:
            shares.append((target, shared))
    return shares


def _move_to_kept(values: Float64[np.ndarray, " L"], kept: Sequence[int]) -> Float64[np.ndarray, " L"]:
    """Move every value to the next kept slot, or to the last one."""
    where = np.asarray(kept)
    receivers = where[np.minimum(np.searchsorted(where, np.arange(len(values))), len(where) - 1)]
    return np.bincount(receivers, weights=values, minlength=len(values))


def check_sum(rewards: Float32[np.ndarray, " L"], baseline: float, reward: float) -> None:
    """Check that rewards are finite and sum to the reward, before they are sent.

    Raises:
        EngineFailure: they are not, or do not.
    """
    total = rewards.sum(dtype=np.float64) + baseline
    if not (np.isfinite(rewards).all() and np.isfinite(baseline)):
        raise EngineFailure("a token reward is not finite", code="not_finite")
    tolerance = 1e-6 * max(1.0, abs(reward), float(np.abs(rewards).sum(dtype=np.float64)))
    if abs(total - reward) > tolerance:
        raise EngineFailure(f"the token rewards sum to {total}, not to the reward {reward}", code="sum_mismatch")
