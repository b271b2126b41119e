"""A queue in front of the engine: whoever waits together runs together, up to a budget of tokens.

There is no window to wait for: an idle engine starts at once on whatever is there, a busy one finds a full batch when
it comes back. Work whose caller left is dropped before it runs. All state belongs to the event loop; the engine runs
in one thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from densereward.capture import Captured, ScoringInput
from densereward.engines.base import Engine
from densereward.errors import EngineFailure, NotReady, Overloaded, TooLarge
from densereward.metrics import Metrics

__all__ = ["Batcher", "Scored"]


@dataclass(frozen=True, slots=True)
class Scored:
    """A sequence's capture, and how long it waited and ran (seconds)."""

    captured: Captured
    queue_seconds: float
    forward_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    sequence: ScoringInput
    future: asyncio.Future[Scored]
    since: float

    @property
    def tokens(self) -> int:
        return self.sequence.forward_tokens


class Batcher:
    """Owns the queue and the only thread that touches the engine.

    Args:
        engine: what runs the batches.
        max_batch_tokens: tokens in one forward pass; a longer sequence runs by itself.
        max_queue_tokens: tokens that may wait; a request beyond that is refused.
        metrics: where queue and batches are counted.
    """

    def __init__(self, engine: Engine, *, max_batch_tokens: int, max_queue_tokens: int, metrics: Metrics) -> None:
        self._engine = engine
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_tokens = max_queue_tokens
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._queued_tokens = 0
        self._arrived = asyncio.Event()
        self._closing = False
        self._tokens_per_second = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._task = asyncio.get_running_loop().create_task(self._work(), name="batcher")

    async def score(self, sequences: Sequence[ScoringInput]) -> list[Scored | EngineFailure]:
        """Run sequences, in their order; a failure stands in its own sequence's place.

        Raises:
            Overloaded: the queue has no room now.
            TooLarge: it never will have.
            NotReady: the server is shutting down.
        """
        tokens = sum(sequence.forward_tokens for sequence in sequences)
        self._admit(tokens)
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        waiting = [_Waiting(sequence, loop.create_future(), now) for sequence in sequences]
        self._queue.extend(waiting)
        self._count(tokens)
        self._arrived.set()
        try:
            results = await asyncio.gather(*(each.future for each in waiting), return_exceptions=True)
        except asyncio.CancelledError:
            self._drop_cancelled()
            raise
        return [_scored_or_failure(result) for result in results]

    async def close(self) -> None:
        """Finish what waits, then stop."""
        self._closing = True
        self._arrived.set()
        await self._task
        self._thread.shutdown()

    def _admit(self, tokens: int) -> None:
        if self._closing or self._task.done():
            raise NotReady("the server is shutting down; try another one", retry_after=1.0, code="draining")
        if tokens > self._max_queue_tokens:
            raise TooLarge(
                f"the request holds {tokens} tokens and the queue {self._max_queue_tokens}; send it in parts",
                tokens=tokens,
                limit=self._max_queue_tokens,
            )
        if self._queued_tokens + tokens > self._max_queue_tokens:
            wait = self._queued_tokens / self._tokens_per_second if self._tokens_per_second else 1.0
            raise Overloaded(
                f"{self._queued_tokens} tokens are waiting and the queue holds {self._max_queue_tokens}; try again in "
                f"{wait:.1f} s",
                retry_after=wait,
                tokens=tokens,
                limit=self._max_queue_tokens,
            )

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._next_batch():
                await self._run(batch)
            if self._closing:
                return

    def _next_batch(self) -> list[_Waiting]:
        """The longest waiting sequences that fit the budget; at least one if any is left."""
        batch: list[_Waiting] = []
        tokens = 0
        while self._queue and (not batch or tokens + self._queue[0].tokens <= self._max_batch_tokens):
            each = self._queue.popleft()
            self._count(-each.tokens)
            if not each.future.done():
                batch.append(each)
                tokens += each.tokens
        return batch

    async def _run(self, batch: Sequence[_Waiting]) -> None:
        """One forward pass; where it fails, each half by itself, so that an error reaches only its own sequence."""
        started = time.perf_counter()
        sequences = [each.sequence for each in batch]
        try:
            captured = await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.forward, sequences)
        except Exception as error:  # whatever it is, the queue must go on
            failure = _as_failure(error)
        else:
            self._deliver(batch, captured, started)
            return
        # Outside the handler, where nothing holds the failed pass's memory any more.
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._run(batch[:middle])
            await self._run(batch[middle:])
        elif not batch[0].future.done():
            batch[0].future.set_exception(failure)

    def _deliver(self, batch: Sequence[_Waiting], captured: Sequence[Captured], started: float) -> None:
        seconds = time.perf_counter() - started
        tokens = sum(each.tokens for each in batch)
        self._metrics.batch(sequences=len(batch), tokens=tokens, seconds=seconds)
        self._tokens_per_second = tokens / seconds if seconds else self._tokens_per_second
        for each, result in zip(batch, captured, strict=True):
            if not each.future.done():
                each.future.set_result(Scored(result, started - each.since, seconds))

    def _drop_cancelled(self) -> None:
        """Give back the room of callers who left."""
        left = [each for each in self._queue if each.future.done()]
        self._queue = deque(each for each in self._queue if not each.future.done())
        self._count(-sum(each.tokens for each in left))
        self._metrics.dropped(len(left))

    def _count(self, tokens: int) -> None:
        self._queued_tokens += tokens
        self._metrics.queue(sequences=len(self._queue), tokens=self._queued_tokens)


def _scored_or_failure(result: Scored | BaseException) -> Scored | EngineFailure:
    if isinstance(result, Scored | EngineFailure):
        return result
    raise result


def _as_failure(error: Exception) -> EngineFailure:
    """The failure by its message alone: a traceback would keep the pass's tensors alive."""
    if isinstance(error, EngineFailure):
        return EngineFailure(error.message, code=error.error_code, **error.details)
    return EngineFailure(f"the engine failed: {type(error).__name__}: {error}")
