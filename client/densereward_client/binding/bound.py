"""A sample ready to be sent, and the way of its answer back to the policy's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .._errors import InvalidAnswer
from ..wire import Error, Sample, SampleReward, SampleTokenRewards, Segment

__all__ = ["Bound", "with_refused"]

_Item = TypeVar("_Item", bound=SampleReward)


@dataclass(frozen=True)
class Bound:
    """One response, ready to be sent.

    Attributes:
        sample: As the reward model reads it.
        count: The number of the policy's tokens; as many rewards come back.
        kept: How many of them, from the first, were sent. The rest get no reward: they follow the EOS, or are an EOS
            that no closing token stands for.
        warnings: `code: message` each, for the answer.
    """

    sample: Sample
    count: int
    kept: int
    warnings: list[str] = field(default_factory=list)

    def on_policy_tokens(self, item: SampleTokenRewards) -> SampleTokenRewards:
        """The answer to this sample, changed in place to have one entry for each of the policy's tokens.

        Raises:
            InvalidAnswer: There are fewer rewards than tokens were sent, or some that would be lost.
        """
        item.warnings.extend(self.warnings)
        if item.error is not None:
            return item
        item.token_rewards = {name: self._rewards(rewards) for name, rewards in item.token_rewards.items()}
        if item.mask is not None:
            unsent = [0] * (self.count - self.kept)
            item.mask = {name: [*mask[: self.kept], *unsent] for name, mask in item.mask.items()}
        if item.segments is not None:
            item.segments = {name: self._segments(segments) for name, segments in item.segments.items()}
        return item

    def _rewards(self, rewards: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(rewards) < self.kept or rewards[self.kept :].any():
            raise InvalidAnswer(f"{len(rewards)} rewards came back for {self.kept} tokens")
        return np.concatenate([rewards[: self.kept], np.zeros(self.count - self.kept, dtype=np.float32)])

    def _segments(self, segments: Sequence[Segment]) -> list[Segment]:
        """Segments of the tokens that were sent; a segment of further closing tokens joins the one before it."""
        joined: list[Segment] = []
        for segment in segments:
            if joined and segment.start >= self.kept:
                joined[-1].score += segment.score
            else:
                joined.append(segment.model_copy(update={"end": min(segment.end, self.kept)}))
        return joined


def with_refused(served: Sequence[_Item], refused: Mapping[int, str], kind: type[_Item]) -> list[_Item]:
    """The items in the order of the request, with an error for each sample that was refused before sending."""
    remaining = iter(served)
    data: list[_Item] = []
    for index in range(len(served) + len(refused)):
        if index in refused:
            data.append(kind(index=index, error=Error(code="invalid_tokens", message=refused[index])))
        else:
            data.append(next(remaining).model_copy(update={"index": index}))
    return data
