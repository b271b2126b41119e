"""Who waits, and who runs next: fair among callers, whole among prompts, full up to a budget.

Every call is a line of its own, and lines of a lower priority number come before all of a higher one. A batch begins
with the line whose turn it is, so that nobody of its priority is passed over for ever, and goes on round the lines with
whatever still fits. What does not fit stays where it is and blocks nobody. Whoever is taken brings along what waits
with the same prompt, since that only costs what follows the prompt.

Nothing here looks at all that waits: a visit looks at a few sequences, a batch gives up after some lines in vain.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from densereward.capture import Captured, ScoringInput
from densereward.metrics import Metrics
from densereward.scheduling.cost import Bill, Price

__all__ = ["Line", "Lines", "Scored", "Waiting"]

_LOOKS = 4
"""Prompts of a line, and sequences of a prompt, that a visit looks at before it goes on."""

_PATIENCE = 64
"""Lines that a batch visits in vain before it is called full."""

_MATES = 64
"""Other callers' bunches that one sequence brings along."""


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
        price: what it adds to a batch.
        held: tokens of the queue that it takes up; a prompt that a call repeats is held once.
        future: its result; done while it waits means that the caller left.
        since: when it came, in seconds of the batcher's clock.
    """

    sequence: ScoringInput
    price: Price
    held: int
    future: asyncio.Future[Scored]
    since: float


@dataclass(frozen=True, slots=True, eq=False)
class _Bunch:
    """Sequences of one line with one prompt, in their order."""

    line: Line
    prompt_ids: tuple[int, ...]
    waiting: deque[Waiting] = field(default_factory=deque)

    def take(self, batch: _Batch, limit: float) -> Waiting | None:
        """The first of the next few that fits."""
        for i, each in enumerate(islice(self.waiting, _LOOKS)):
            if batch.fits(each, limit):
                del self.waiting[i]
                return each
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """What waits of one call, bunch after bunch.

    Attributes:
        priority: of the call; lower numbers come first.
    """

    priority: int = 0
    bunches: OrderedDict[_Bunch, None] = field(default_factory=OrderedDict)

    @property
    def abandoned(self) -> bool:
        """Whether the caller left; all the futures of a call are cancelled together."""
        return any(bunch.waiting[0].future.done() for bunch in islice(self.bunches, 1))


class _Turns:
    """Whose turn it is: among the lines of the lowest priority number, one after the other."""

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Line, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def __contains__(self, line: Line) -> bool:
        return line in self._levels.get(line.priority, ())

    def first(self) -> Line:
        return next(iter(self._levels[min(self._levels)]))

    def to_end(self, line: Line) -> None:
        """To the end of its level, whether it was there before or not."""
        level = self._levels.setdefault(line.priority, OrderedDict())
        level[line] = None
        level.move_to_end(line)

    def to_front(self, line: Line) -> None:
        self.to_end(line)
        self._levels[line.priority].move_to_end(line, last=False)

    def remove(self, line: Line) -> None:
        if line in self:
            level = self._levels[line.priority]
            del level[line]
            if not level:
                del self._levels[line.priority]


class _Batch:
    """What is taken so far, sequences with one prompt side by side."""

    def __init__(self, budget: float, pair_cost: float) -> None:
        self._budget = budget
        self._bill = Bill(pair_cost)
        self._taken: dict[tuple[int, ...], list[Waiting]] = {}

    @property
    def work(self) -> float:
        return self._bill.work

    @property
    def full(self) -> bool:
        return self.work >= self._budget

    @property
    def taken(self) -> list[Waiting]:
        return list(chain.from_iterable(self._taken.values()))

    def fits(self, each: Waiting, limit: float) -> bool:
        """Whether it leaves the work within a limit; the first of a batch always fits."""
        return not self._taken or self._bill.fits(each.price, limit)

    def add(self, each: Waiting) -> None:
        self._bill.add(each.price)
        self._taken.setdefault(each.price.prompt_ids, []).append(each)


class Lines:
    """All that waits.

    Args:
        budget: work in one batch, in tokens' worth; a sequence beyond it is a batch by itself.
        pair_cost: what one query looking at one key costs, in tokens' worth.
        metrics: where what waits is counted, and what was dropped.

    Attributes:
        tokens: held by all that waits.
    """

    def __init__(self, budget: int, pair_cost: float, metrics: Metrics) -> None:
        self._budget = float(budget)
        self._pair_cost = pair_cost
        self._metrics = metrics
        self._beginners = _Turns()  # to begin a batch
        self._round = _Turns()  # in filling one
        self._bunches: dict[tuple[int, ...], OrderedDict[_Bunch, None]] = {}  # of all lines, by prompt
        self.tokens = 0

    def join(self, waiting: Sequence[Waiting], priority: int = 0) -> Line:
        """A new line, behind all others of its priority."""
        line = Line(priority)
        bunches: dict[tuple[int, ...], _Bunch] = {}
        for each in waiting:
            prompt_ids = each.price.prompt_ids
            bunches.setdefault(prompt_ids, _Bunch(line, prompt_ids)).waiting.append(each)
        for bunch in bunches.values():
            line.bunches[bunch] = None
            if bunch.prompt_ids:
                self._bunches.setdefault(bunch.prompt_ids, OrderedDict())[bunch] = None
        if bunches:
            self._beginners.to_end(line)
            self._round.to_end(line)
        self._count(len(waiting), sum(each.held for each in waiting))
        return line

    def leave(self, line: Line) -> None:
        """Drop what still waits of a line whose caller left."""
        left = [each for bunch in line.bunches for each in bunch.waiting]
        for bunch in list(line.bunches):
            bunch.waiting.clear()
            self._remove(bunch)
        self._count(-len(left), -sum(each.held for each in left))
        self._metrics.dropped(len(left))

    def next_batch(self) -> list[Waiting]:
        """What runs next, and waits no longer; empty if nothing waits."""
        batch = _Batch(self._budget, self._pair_cost)
        while self._beginners and not batch.taken:
            line = self._beginners.first()
            self._beginners.to_end(line)
            self._visit(line, batch)
        self._fill(batch)
        taken = batch.taken
        self._count(-len(taken), -sum(each.held for each in taken))
        return taken

    def _fill(self, batch: _Batch) -> None:
        """Go round the lines: who is served goes to the end, who is passed over will be asked first next time."""
        passed: list[Line] = []
        served: set[Line] = set()
        while self._round and not batch.full and len(passed) < _PATIENCE:
            line = self._round.first()
            if self._visit(line, batch):
                served.add(line)
            elif line in self._round:
                self._round.remove(line)
                passed.append(line)
        passed = [line for line in passed if line.bunches]  # others' mates may have taken along all that waited
        for line in passed:
            self._round.to_end(line)
        for line in reversed(passed):
            if line not in served:
                self._round.to_front(line)

    def _visit(self, line: Line, batch: _Batch) -> bool:
        """Take the line's next sequence that fits, with what has the same prompt; False if none does."""
        if line.abandoned:
            self.leave(line)
            return False
        for bunch in list(islice(line.bunches, _LOOKS)):
            if self._take(bunch, batch, self._budget):
                self._bring_along(bunch, batch)
                if line in self._round:
                    self._round.to_end(line)
                return True
        return False

    def _bring_along(self, bunch: _Bunch, batch: _Batch) -> None:
        """Take what has the same prompt, the same line first; at most half a batch at once while others wait."""
        limit = min(self._budget, batch.work + self._budget / 2) if len(self._round) > 1 else self._budget
        for mate in [bunch, *islice(self._bunches.get(bunch.prompt_ids, ()), _MATES)]:
            if mate.line.abandoned:
                self.leave(mate.line)
            while self._take(mate, batch, limit):
                pass

    def _take(self, bunch: _Bunch, batch: _Batch, limit: float) -> bool:
        """Take a bunch's next sequence that fits."""
        if (each := bunch.take(batch, limit)) is None:
            return False
        batch.add(each)
        if not bunch.waiting:
            self._remove(bunch)
        return True

    def _remove(self, bunch: _Bunch) -> None:
        """A bunch of which nothing waits any more, and its line if it was the last."""
        line = bunch.line
        del line.bunches[bunch]
        if alike := self._bunches.get(bunch.prompt_ids):
            del alike[bunch]
            if not alike:
                del self._bunches[bunch.prompt_ids]
        if not line.bunches:
            self._beginners.remove(line)
            self._round.remove(line)

    def _count(self, sequences: int, tokens: int) -> None:
        self.tokens += tokens
        self._metrics.queue(sequences, tokens)
