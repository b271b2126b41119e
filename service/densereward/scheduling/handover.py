"""Hands sequences over to an engine that makes its own batches, as vLLM does.

The engine always has about two passes' worth: one to run and one to choose from. All else waits here, where callers
take turns and a caller that leaves costs nothing. What the engine has of such a caller is taken out of it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future

from densereward.capture import Captured
from densereward.engines.base import Engine, StreamingEngine
from densereward.errors import EngineDied, EngineFailure
from densereward.metrics import Metrics
from densereward.scheduling.batcher import Batcher, as_failure
from densereward.scheduling.queue import Scored, Waiting

__all__ = ["HandoverBatcher", "batcher_for"]

_PASSES = 2
"""Passes' worth of sequences that are with the engine."""


def batcher_for(
    engine: Engine,
    *,
    max_batch_tokens: int,
    max_queue_tokens: int,
    metrics: Metrics,
    on_death: Callable[[EngineDied], None] = lambda _: None,
) -> Batcher:
    """The batcher that suits an engine; `Batcher` and `HandoverBatcher` say what the limits mean to them."""
    limits = {"max_batch_tokens": max_batch_tokens, "max_queue_tokens": max_queue_tokens}
    if isinstance(engine, StreamingEngine):
        return HandoverBatcher(engine, **limits, metrics=metrics, on_death=on_death)
    return Batcher(engine, **limits, metrics=metrics)


class HandoverBatcher(Batcher):
    """Owns the queue, and hands sequences over as the engine finishes others.

    Args:
        engine: what scores the sequences.
        max_batch_tokens: tokens in one of its passes.
        max_queue_tokens: tokens that may wait here; a request beyond that is refused.
        metrics: where the queue is counted.
        on_death: called once, in the event loop, when the engine has ended by itself.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        *,
        max_batch_tokens: int,
        max_queue_tokens: int,
        metrics: Metrics,
        on_death: Callable[[EngineDied], None],
    ) -> None:
        self._stream = engine
        self._on_death = on_death
        self._dead: EngineDied | None = None
        self._running: dict[asyncio.Future[Captured], Waiting] = {}
        self._tokens_running = 0
        self._last_back = 0.0
        super().__init__(engine, max_batch_tokens=max_batch_tokens, max_queue_tokens=max_queue_tokens, metrics=metrics)
        loop = asyncio.get_running_loop()
        engine.death.add_done_callback(lambda death: loop.call_soon_threadsafe(self._die, death))

    def _admit(self, tokens: int) -> None:
        if self._dead is not None:
            raise _again(self._dead)
        super()._admit(tokens)

    async def _work(self) -> None:
        room = (
            _PASSES - 1
        ) * self._max_batch_tokens  # what the engine may still have when another pass's worth is handed over
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._tokens_running <= room and (batch := self._queue.next_batch()):
                for each in batch:
                    self._hand_over(each)
            if self._closing and not self._running:
                return

    def _hand_over(self, each: Waiting) -> None:
        if self._dead is not None:
            each.future.set_exception(_again(self._dead))
            return
        started = time.perf_counter()
        try:
            given = asyncio.wrap_future(self._stream.submit(each.sequence))
        except Exception as error:  # whatever it is, the queue must go on
            each.future.set_exception(as_failure(error))
            return
        self._running[given] = each
        self._tokens_running += each.queued_tokens
        given.add_done_callback(lambda done: self._take_back(done, each, started))
        # A caller that leaves takes its sequence out of the engine.
        each.future.add_done_callback(lambda future: given.cancel() if future.cancelled() else None)

    def _take_back(self, given: asyncio.Future[Captured], each: Waiting, started: float) -> None:
        del self._running[given]
        self._tokens_running -= each.queued_tokens
        self._arrived.set()
        now = time.perf_counter()
        if not given.cancelled():
            self._speed.add(each.queued_tokens, now - max(started, self._last_back))  # others ran in the same time
            self._last_back = now
        if each.future.done():
            return
        if given.cancelled():
            each.future.set_exception(EngineFailure("the engine dropped the sequence"))
        elif (error := given.exception()) is not None:
            each.future.set_exception(error if isinstance(error, EngineDied) else as_failure(error))
        else:
            each.future.set_result(Scored(given.result(), started - each.since, now - started))

    def _die(self, death: Future[EngineDied]) -> None:
        """Nothing will be scored any more: fail all that waits, and tell the server."""
        if death.cancelled() or self._closing:
            return
        self._dead = death.result()
        waiting = list(self._running.values())
        while batch := self._queue.next_batch():
            waiting += batch
        for each in waiting:
            if not each.future.done():
                each.future.set_exception(_again(self._dead))
        for given in list(self._running):
            given.cancel()
        self._on_death(self._dead)


def _again(error: EngineDied) -> EngineDied:
    """A new error for each caller, since it will carry the request's id."""
    return EngineDied(error.message, retry_after=error.retry_after)
