"""A queue in front of the engine: whoever waits together runs together, up to a budget of work.

There is no window to wait for: an idle engine starts at once on whatever is there, a busy one finds a full batch when
it comes back. Who runs next is decided in `lines`. Work whose caller left is dropped before it runs. All state belongs
to the event loop; the engine runs in one thread of its own.
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
from densereward.scheduling.cost import Bill, Price, price
from densereward.scheduling.queue import Lines, Scored, Waiting

__all__ = ["Batcher", "Scored", "as_failure"]

_MANY = 512
"""Sequences of one call that are priced in a thread."""

_SHORTEST_WAIT = 0.1
"""Seconds that a refused caller is told to wait at least."""


class Batcher:
    """Owns the queue and the only thread that touches the engine.

    Args:
        engine: what runs the batches.
        max_batch_tokens: work in one forward pass, in tokens' worth (see `cost`); a sequence beyond it runs by itself.
        max_queue_tokens: tokens that may wait; a request beyond that is refused.
        metrics: where queue and batches are counted.
    """

    def __init__(self, engine: Engine, *, max_batch_tokens: int, max_queue_tokens: int, metrics: Metrics) -> None:
        self._engine = engine
        self._max_batch_tokens = max_batch_tokens
        self.max_queue_tokens = max_queue_tokens
        self._metrics = metrics
        self._lines = Lines(max_batch_tokens, engine.facts.pair_cost, metrics)
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
        if len(sequences) > _MANY:  # pricing them would hold the loop for long
            prices = await asyncio.to_thread(self._priced, sequences)
        else:
            prices = self._priced(sequences)
        waiting = self._waiting(sequences, prices)
        self._admit(sum(each.held for each in waiting))
        line = self._lines.join(waiting, priority)
        self._arrived.set()
        try:
            results = await asyncio.gather(*(each.future for each in waiting), return_exceptions=True)
        except asyncio.CancelledError:
            self._lines.leave(line)
            raise
        return [_scored_or_failure(result) for result in results]

    def _priced(self, sequences: Sequence[ScoringInput]) -> list[Price]:
        """What each adds to a batch; a prompt that several begin with is kept once."""
        prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
        return [price(sequence, prompts, shares=self._engine.facts.shares_prompts) for sequence in sequences]

    def _waiting(self, sequences: Sequence[ScoringInput], prices: Sequence[Price]) -> list[Waiting]:
        """The sequences with what each adds to a batch, and to the queue: there, too, a prompt counts once a call."""
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        bill = Bill(self._engine.facts.pair_cost)
        return [
            Waiting(sequence, item, bill.add(item).tokens, loop.create_future(), now)
            for sequence, item in zip(sequences, prices, strict=True)
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
        beyond = self._lines.tokens + tokens - self.max_queue_tokens
        if beyond > 0:
            wait = max(self._speed.seconds(beyond), _SHORTEST_WAIT)
            raise Overloaded(
                f"{self._lines.tokens} tokens are waiting and the queue holds {self.max_queue_tokens}; try again in "
                f"{wait:.1f} s",
                retry_after=wait,
                tokens=tokens,
                limit=self.max_queue_tokens,
            )

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._lines.next_batch():
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
        self._speed.add(sum(each.held for each in batch), seconds)
        self._count(batch, seconds)
        for each, result in zip(batch, captured, strict=True):
            if not each.future.done():
                each.future.set_result(Scored(result, started - each.since, seconds))

    def _count(self, batch: Sequence[Waiting], seconds: float) -> None:
        bill = Bill(self._engine.facts.pair_cost)
        for each in batch:
            bill.add(each.price)
        tokens = bill.total.tokens
        self._metrics.batch(
            sequences=len(batch),
            tokens=tokens,
            shared=sum(each.sequence.forward_tokens for each in batch) - tokens,
            fill=bill.work / self._max_batch_tokens,
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
