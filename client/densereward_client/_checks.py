"""Checks that an answer fits its request: a wrong number that nobody notices is worse than an outage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ._errors import InvalidAnswer
from .wire import (
    RewardsRequest,
    RewardsResponse,
    Sample,
    SampleReward,
    SampleTokenRewards,
    TokenRewardsRequest,
    TokenRewardsResponse,
)

_SUM_TOLERANCE = 1e-4  # float32 sums, relative to the largest term


def check_rewards(request: RewardsRequest, answer: RewardsResponse) -> None:
    """Raises `InvalidAnswer` unless there is one reward or allowed error for each sample, in order."""
    _check_items(request, answer.data)


def check_token_rewards(request: TokenRewardsRequest, answer: TokenRewardsResponse) -> None:
    """As `check_rewards`; every requested method also has one finite reward per token, and they sum to the reward."""
    _check_items(request, answer.data)
    for sample, item in zip(request.samples, answer.data, strict=True):
        if item.error is None:
            _raise_first(item.index, _token_faults(request, sample, item))


def _check_items(request: RewardsRequest, items: Sequence[SampleReward]) -> None:
    if len(items) != len(request.samples):
        raise InvalidAnswer(f"{len(request.samples)} samples were sent and {len(items)} items came back")
    for index, (sample, item) in enumerate(zip(request.samples, items, strict=True)):
        _raise_first(index, _item_faults(index, request, sample, item))


def _raise_first(index: int, faults: Iterator[str]) -> None:
    # Only the first: a check may rely on those before it, as the mask does on the lengths.
    for fault in faults:
        raise InvalidAnswer(f"item {index}: {fault}")


def _item_faults(index: int, request: RewardsRequest, sample: Sample, item: SampleReward) -> Iterator[str]:
    if item.index != index:
        yield f"index {item.index} came back instead"
    if sample.id is not None and item.id != sample.id:
        yield f"id {item.id!r} came back for {sample.id!r}"
    if item.error is None and item.reward is None:
        yield "it has neither a reward nor an error"
    if item.error is not None and request.on_error == "request":
        yield f"it has an error, which on_error='request' rules out: {item.error.code}: {item.error.message}"


def _token_faults(request: TokenRewardsRequest, sample: Sample, item: SampleTokenRewards) -> Iterator[str]:
    yield from _method_faults(request, item)
    for name, array in (("prefix_scores", item.prefix_scores), ("attention", item.attention)):
        if array is not None:
            yield from _finite_faults(name, array)
    for name, rewards in item.token_rewards.items():
        yield from _finite_faults(name, rewards)
        yield from _length_faults(name, rewards, sample)
        yield from _sum_faults(name, rewards, item)
        yield from _mask_faults(name, rewards, sample)
    lengths = {name: len(rewards) for name, rewards in item.token_rewards.items()}
    if len(set(lengths.values())) > 1:
        yield f"the methods disagree on the number of tokens: {lengths}"


def _method_faults(request: TokenRewardsRequest, item: SampleTokenRewards) -> Iterator[str]:
    requested = {method if isinstance(method, str) else method.key for method in request.methods or ()}
    if missing := requested - item.token_rewards.keys():
        yield f"no token rewards of {', '.join(sorted(missing))}"
    if not item.token_rewards:
        yield "no token rewards at all"


def _finite_faults(name: str, array: NDArray[np.float32]) -> Iterator[str]:
    for position in np.flatnonzero(~np.isfinite(array)):
        yield f"{name} is not finite at {position}"


def _length_faults(name: str, rewards: NDArray[np.float32], sample: Sample) -> Iterator[str]:
    for field in ("response_spans", "response_token_ids", "response_mask"):
        per_token = getattr(sample, field)
        if per_token is not None and len(per_token) != len(rewards):
            yield f"{name} has {len(rewards)} token rewards for {len(per_token)} {field}"


def _sum_faults(name: str, rewards: NDArray[np.float32], item: SampleTokenRewards) -> Iterator[str]:
    if item.reward is None:
        return
    baseline = item.baseline.get(name, 0.0)
    total = float(rewards.sum(dtype=np.float64)) + baseline
    reward = item.reward * (item.scale or {}).get(name, 1.0)
    size = max(1.0, abs(reward), float(np.abs(rewards).sum(dtype=np.float64)))
    if abs(total - reward) > _SUM_TOLERANCE * size:
        yield f"{name} and its baseline sum to {total:.6g} and not to the reward, {reward:.6g}"


def _mask_faults(name: str, rewards: NDArray[np.float32], sample: Sample) -> Iterator[str]:
    if sample.response_mask is not None and np.any(rewards[np.equal(sample.response_mask, 0)]):
        yield f"{name} rewards a token that response_mask leaves out"
