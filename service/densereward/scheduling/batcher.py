"""Batches sequences in front of the engine: what waits at the same time runs in one pass, up to the batch size.

There is no time window. An idle engine starts at once on whatever waits, and a busy one finds a full batch when its
pass is over. `queue` chooses what runs next. Work whose caller left is dropped before it runs. All state belongs to the
event loop; the engine runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from densereward.capture import Captured, ScoringInput
from densereward.engines.base import Engine
from densereward.errors import EngineFailure, NotReady, Overloaded, TooLarge
from densereward.metrics import Metrics
from densereward.scheduling.cost import BatchCost, SequenceCost, cost_of
from densereward.scheduling.queue import Queue, Scored, Waiting

__all__ = ["Batcher", "Scored", "as_failure"]

_MANY = 512
"""A call with more sequences has their cost counted in a thread."""

_SHORTEST_WAIT = 0.1
"""Seconds that a refused caller is told to wait at least."""


class Batcher:
    """Owns the queue and the only thread that touches the engine.

    Args:
        engine: what runs the batches.
        max_batch_tokens: work in one forward pass, in tokens' worth (see `cost`); a larger sequence runs by itself.
        max_queue_tokens: tokens that may wait; a request beyond that is refused.
        metrics: where queue and batches are counted.
    """

    def __init__(self, engine: Engine, *, max_batch_tokens: int, max_queue_tokens: int, metrics: Metrics) -> None:
        self._engine = engine
        self._max_batch_tokens = max_batch_tokens
        self.max_queue_tokens = max_queue_tokens
        self._metrics = metrics
        self._queue = Queue(max_batch_tokens, engine.facts.pair_cost, metrics)
        self._speed = _Speed()
        self._arrived = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._task = asyncio.get_running_loop().create_task(self._work(), name="batcher")

    async def score(self, sequences: Sequence[ScoringInput], priority: int = 0) -> list[Scored | EngineFailure]:
        """Run sequences, in their order; a failure stands in its own sequence's place.

        Args:
            sequences: the sequences.
            priority: lower numbers run before all that waits with a higher one.

        Raises:
            Overloaded: the queue has no room now.
            TooLarge: it never will have.
            NotReady: the server is shutting down.
            EngineDied: nothing can be scored any more.
        """
        if len(sequences) > _MANY:  # counting their cost would block the loop for long
            costs = await asyncio.to_thread(self._costs, sequences)
        else:
            costs = self._costs(sequences)
        waiting = self._waiting(sequences, costs)
        self._admit(sum(each.queued_tokens for each in waiting))
        call = self._queue.join(waiting, priority)
        self._arrived.set()
        try:
            results = await asyncio.gather(*(each.future for each in waiting), return_exceptions=True)
        except asyncio.CancelledError:
            self._queue.leave(call)
            raise
        return [_scored_or_failure(result) for result in results]

    def _costs(self, sequences: Sequence[ScoringInput]) -> list[SequenceCost]:
        """The cost of each; a prompt that several begin with is stored once."""
        prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
        return [cost_of(sequence, prompts, shares=self._engine.facts.shares_prompts) for sequence in sequences]

    def _waiting(self, sequences: Sequence[ScoringInput], costs: Sequence[SequenceCost]) -> list[Waiting]:
        """The sequences with their cost in a batch and in the queue, where a prompt counts once a call, too."""
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        cost = BatchCost(self._engine.facts.pair_cost)
        return [
            Waiting(sequence, item, cost.add(item).tokens, loop.create_future(), now)
            for sequence, item in zip(sequences, costs, strict=True)
        ]

    async def close(self) -> None:
        """Finish what waits, then stop."""
        self._closing = True
        self._arrived.set()
        await self._task
        self._thread.shutdown()

    def _admit(self, tokens: int) -> None:
        if self._closing or self._task.done():
            raise NotReady("the server is shutting down; try another one", retry_after=1.0, code="draining")
        if tokens > self.max_queue_tokens:
            raise TooLarge(
                f"the request holds {tokens} tokens and the queue {self.max_queue_tokens}; send it in parts",
                tokens=tokens,
                limit=self.max_queue_tokens,
            )
        beyond = self._queue.tokens + tokens - self.max_queue_tokens
        if beyond > 0:
            wait = max(self._speed.seconds(beyond), _SHORTEST_WAIT)
            raise Overloaded(
                f"{self._queue.tokens} tokens are waiting and the queue holds {self.max_queue_tokens}; try again in "
                f"{wait:.1f} s",
                retry_after=wait,
                tokens=tokens,
                limit=self.max_queue_tokens,
            )

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._queue.next_batch():
                await self._run(batch)
            if self._closing:
                return

    async def _run(self, batch: Sequence[Waiting]) -> None:
        """One forward pass; where it fails, each half by itself, so that an error reaches only its own sequence."""
        started = time.perf_counter()
        sequences = [each.sequence for each in batch]
        try:
            captured = await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.forward, sequences)
        except Exception as error:  # whatever it is, the queue must go on
            failure = as_failure(error)
        else:
            self._deliver(batch, captured, started)
            return
        # Outside the handler, where nothing holds the failed pass's memory any more.
        if len(batch) == 1:
            if not batch[0].future.done():
                batch[0].future.set_exception(failure)
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            if stayed := [each for each in half if not each.future.done()]:
                await self._run(stayed)

    def _deliver(self, batch: Sequence[Waiting], captured: Sequence[Captured], started: float) -> None:
        seconds = time.perf_counter() - started
        self._speed.add(sum(each.queued_tokens for each in batch), seconds)
        self._count(batch, seconds)
        for each, result in zip(batch, captured, strict=True):
            if not each.future.done():
                each.future.set_result(Scored(result, started - each.since, seconds))

    def _count(self, batch: Sequence[Waiting], seconds: float) -> None:
        cost = BatchCost(self._engine.facts.pair_cost)
        for each in batch:
            cost.add(each.cost)
        tokens = cost.total.tokens
        self._metrics.batch(
            sequences=len(batch),
            tokens=tokens,
            shared=sum(each.sequence.forward_tokens for each in batch) - tokens,
            fill=cost.work / self._max_batch_tokens,
            seconds=seconds,
        )


class _Speed:
    """How fast the queue empties, over the last ten passes or so; a long pass counts for more than a short one."""

    _MEMORY = 0.9

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """A pass freed so many tokens of the queue."""
        self._tokens = self._MEMORY * self._tokens + tokens
        self._seconds = self._MEMORY * self._seconds + seconds

    def seconds(self, tokens: int) -> float:
        """Until so many tokens have left the queue; a guess of 1 before any has."""
        return tokens * self._seconds / self._tokens if self._tokens else 1.0


def _scored_or_failure(result: Scored | BaseException) -> Scored | EngineFailure:
    if isinstance(result, Scored | EngineFailure):
        return result
    raise result


def as_failure(error: BaseException) -> EngineFailure:
    """The failure by its message alone: a traceback would keep the pass's tensors alive."""
    if isinstance(error, EngineFailure):
        return EngineFailure(error.message, code=error.error_code, **error.details)
    return EngineFailure(f"the engine failed: {type(error).__name__}: {error}")
