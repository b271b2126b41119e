"""What waits, and what runs next: fair among callers, prompts together, batches full.

Each call to the server has its own place in the queue. Calls with a lower priority number come first. A batch begins
with the call whose turn it is, so no call of its priority waits without end. It is then filled in turn from all calls
with whatever still fits. What does not fit stays where it is and blocks nobody. A sequence that is taken brings the
other sequences with its prompt into the batch: the prompt runs once, so they cost only what follows it.

No step goes through all that waits: it tries a few sequences of a call, and a batch ends after some calls in vain.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from densereward.capture import Captured, ScoringInput
from densereward.metrics import Metrics
from densereward.scheduling.cost import BatchCost, SequenceCost

__all__ = ["Call", "Queue", "Scored", "Waiting"]

_CANDIDATES = 4
"""Prompts of a call, and sequences of a prompt, that are tried before the next call has its turn."""

_MAX_MISSES = 64
"""Calls tried in vain before a batch counts as full."""

_MAX_SAME_PROMPT = 64
"""Other calls whose sequences with the same prompt join a batch at once."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A sequence's capture, and how long it waited and ran (seconds)."""

    captured: Captured
    queue_seconds: float
    forward_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A sequence that waits.

    Attributes:
        sequence: the sequence.
        cost: what it adds to a batch.
        queued_tokens: tokens of the queue that it takes up; a prompt that a call repeats counts once.
        future: its result; done while it waits means that the caller left.
        since: when it came, in seconds of the batcher's clock.
    """

    sequence: ScoringInput
    cost: SequenceCost
    queued_tokens: int
    future: asyncio.Future[Scored]
    since: float


@dataclass(frozen=True, slots=True, eq=False)
class _PromptGroup:
    """Sequences of one call with the same prompt, in their order."""

    call: Call
    prompt_ids: tuple[int, ...]
    waiting: deque[Waiting] = field(default_factory=deque)

    def take(self, batch: _Batch, limit: float) -> Waiting | None:
        """The first of the next few that fits."""
        for i, each in enumerate(islice(self.waiting, _CANDIDATES)):
            if batch.fits(each, limit):
                del self.waiting[i]
                return each
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What waits of one call, by prompt.

    Attributes:
        priority: of the call; lower numbers come first.
    """

    priority: int = 0
    groups: OrderedDict[_PromptGroup, None] = field(default_factory=OrderedDict)

    @property
    def abandoned(self) -> bool:
        """Whether the caller left; all the futures of a call are cancelled together."""
        return any(group.waiting[0].future.done() for group in islice(self.groups, 1))


class _RoundRobin:
    """Whose turn it is: the calls of the lowest priority number, one after the other."""

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Call, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def __contains__(self, call: Call) -> bool:
        return call in self._levels.get(call.priority, ())

    def first(self) -> Call:
        return next(iter(self._levels[min(self._levels)]))

    def to_end(self, call: Call) -> None:
        """To the end of its priority level, whether it was there before or not."""
        level = self._levels.setdefault(call.priority, OrderedDict())
        level[call] = None
        level.move_to_end(call)

    def to_front(self, call: Call) -> None:
        self.to_end(call)
        self._levels[call.priority].move_to_end(call, last=False)

    def remove(self, call: Call) -> None:
        if call in self:
            level = self._levels[call.priority]
            del level[call]
            if not level:
                del self._levels[call.priority]


class _Batch:
    """What is taken so far, sequences with the same prompt side by side."""

    def __init__(self, budget: float, pair_cost: float) -> None:
        self._budget = budget
        self._cost = BatchCost(pair_cost)
        self._taken: dict[tuple[int, ...], list[Waiting]] = {}

    @property
    def work(self) -> float:
        return self._cost.work

    @property
    def full(self) -> bool:
        return self.work >= self._budget

    @property
    def taken(self) -> list[Waiting]:
        return list(chain.from_iterable(self._taken.values()))

    def fits(self, each: Waiting, limit: float) -> bool:
        """Whether it leaves the work within a limit; the first of a batch always fits."""
        return not self._taken or self._cost.fits(each.cost, limit)

    def add(self, each: Waiting) -> None:
        self._cost.add(each.cost)
        self._taken.setdefault(each.cost.prompt_ids, []).append(each)


class Queue:
    """All that waits for the engine.

    Args:
        budget: work in one batch, in tokens' worth; a sequence beyond it is a batch by itself.
        pair_cost: what a query and a key cost, in tokens' worth.
        metrics: where what waits is counted, and what was dropped.

    Attributes:
        tokens: of all that waits.
    """

    def __init__(self, budget: int, pair_cost: float, metrics: Metrics) -> None:
        self._budget = float(budget)
        self._pair_cost = pair_cost
        self._metrics = metrics
        self._to_begin = _RoundRobin()  # whose turn it is to begin a batch
        self._to_fill = _RoundRobin()  # whose turn it is to fill one
        self._groups: dict[tuple[int, ...], OrderedDict[_PromptGroup, None]] = {}  # of all calls, by prompt
        self.tokens = 0

    def join(self, waiting: Sequence[Waiting], priority: int = 0) -> Call:
        """Add a call, behind all others of its priority."""
        call = Call(priority)
        groups: dict[tuple[int, ...], _PromptGroup] = {}
        for each in waiting:
            prompt_ids = each.cost.prompt_ids
            groups.setdefault(prompt_ids, _PromptGroup(call, prompt_ids)).waiting.append(each)
        for group in groups.values():
            call.groups[group] = None
            if group.prompt_ids:
                self._groups.setdefault(group.prompt_ids, OrderedDict())[group] = None
        if groups:
            self._to_begin.to_end(call)
            self._to_fill.to_end(call)
        self._count(len(waiting), sum(each.queued_tokens for each in waiting))
        return call

    def leave(self, call: Call) -> None:
        """Drop what still waits of a call whose caller left."""
        left = [each for group in call.groups for each in group.waiting]
        for group in list(call.groups):
            group.waiting.clear()
            self._remove(group)
        self._count(-len(left), -sum(each.queued_tokens for each in left))
        self._metrics.dropped(len(left))

    def next_batch(self) -> list[Waiting]:
        """Take the sequences that run next; empty if nothing waits."""
        batch = _Batch(self._budget, self._pair_cost)
        while self._to_begin and not batch.taken:
            call = self._to_begin.first()
            self._to_begin.to_end(call)
            self._visit(call, batch)
        self._fill(batch)
        taken = batch.taken
        self._count(-len(taken), -sum(each.queued_tokens for each in taken))
        return taken

    def _fill(self, batch: _Batch) -> None:
        """Take from the calls in turn: a call that is served goes to the end, one that is passed over to the front."""
        passed: list[Call] = []
        served: set[Call] = set()
        while self._to_fill and not batch.full and len(passed) < _MAX_MISSES:
            call = self._to_fill.first()
            if self._visit(call, batch):
                served.add(call)
            elif call in self._to_fill:
                self._to_fill.remove(call)
                passed.append(call)
        passed = [call for call in passed if call.groups]  # their last sequence may have joined another's prompt
        for call in passed:
            self._to_fill.to_end(call)
        for call in reversed(passed):
            if call not in served:
                self._to_fill.to_front(call)

    def _visit(self, call: Call, batch: _Batch) -> bool:
        """Take the call's next sequence that fits, with all that has the same prompt; False if none fits."""
        if call.abandoned:
            self.leave(call)
            return False
        for group in list(islice(call.groups, _CANDIDATES)):
            if self._take(group, batch, self._budget):
                self._take_same_prompt(group, batch)
                if call in self._to_fill:
                    self._to_fill.to_end(call)
                return True
        return False

    def _take_same_prompt(self, group: _PromptGroup, batch: _Batch) -> None:
        """Take what has the same prompt, the same call first; at most half a batch at once while other calls wait."""
        limit = min(self._budget, batch.work + self._budget / 2) if len(self._to_fill) > 1 else self._budget
        for other in [group, *islice(self._groups.get(group.prompt_ids, ()), _MAX_SAME_PROMPT)]:
            if other.call.abandoned:
                self.leave(other.call)
            while self._take(other, batch, limit):
                pass

    def _take(self, group: _PromptGroup, batch: _Batch, limit: float) -> bool:
        """Take a group's next sequence that fits; False if none does."""
        if (each := group.take(batch, limit)) is None:
            return False
        batch.add(each)
        if not group.waiting:
            self._remove(group)
        return True

    def _remove(self, group: _PromptGroup) -> None:
        """Remove an empty group, and its call if it was the call's last."""
        call = group.call
        del call.groups[group]
        if alike := self._groups.get(group.prompt_ids):
            del alike[group]
            if not alike:
                del self._groups[group.prompt_ids]
        if not call.groups:
            self._to_begin.remove(call)
            self._to_fill.remove(call)

    def _count(self, sequences: int, tokens: int) -> None:
        self.tokens += tokens
        self._metrics.queue(sequences, tokens)
