"""How often a call is tried and how long it may take, for both clients."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from ._errors import ConnectionFailed, DeadlineExceeded, DenseRewardError, Overloaded, Unavailable

RETRIED = (ConnectionFailed, Overloaded, Unavailable)

_CONNECT_SECONDS = 10.0  # so that a host that drops packets does not use up the deadline in one attempt
_READY_SECONDS = 5.0
_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 10.0
_CLOCK_SLACK_SECONDS = 0.001  # timers may fire this much too early

# Not the shared generator: a trainer seeds that one the same in every process and relies on its sequence.
_jitter = random.SystemRandom()


@dataclass(frozen=True)
class Limits:
    """Seconds one call may take in total, and how often it is retried."""

    timeout: float
    retries: int

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout must be a number of seconds above 0, not {self.timeout!r}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, not {self.retries!r}")

    def for_ready(self) -> Limits:
        """Limits for `ready()`: one short attempt."""
        return Limits(min(self.timeout, _READY_SECONDS), retries=0)


class Attempts:
    """The attempts of one call: the time left, and the pause before the next one."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + limits.timeout
        self._failures: list[DenseRewardError] = []

    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._deadline - time.monotonic()

    def extensions(self) -> dict[str, Any]:
        """The timeouts of an attempt, as the `extensions` of httpx's `request` and `stream`."""
        return {"timeout": _PhaseTimeouts(self)}

    def pause_after(self, error: ConnectionFailed | Overloaded | Unavailable) -> float:
        """Seconds to wait before the next attempt; raises the error if there is none."""
        retry_after = None if isinstance(error, ConnectionFailed) else error.retry_after
        # Jitter on top of Retry-After: otherwise all refused clients would come back at the same time.
        pause = (retry_after or 0.0) + self._backoff()
        self._failures.append(error)
        left = self.seconds_left()
        if len(self._failures) > self._limits.retries or pause >= left:
            error.add_note(
                f"attempts made: {len(self._failures)}; seconds left: {left:.3g} of {self._limits.timeout:g}"
            )
            raise error
        return pause

    def while_time_is_left(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks of a body; raises TimeoutError once the deadline has passed."""
        for chunk in chunks:
            if self.seconds_left() <= 0:
                raise TimeoutError
            yield chunk

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Turns the errors of a connection into this package's."""
        try:
            yield
        except (httpx.RequestError, TimeoutError) as error:
            # The clock decides, not the exception: a connect timeout is often shorter than the deadline.
            if self.seconds_left() > _CLOCK_SLACK_SECONDS:
                raise ConnectionFailed(f"no answer: {error!r}") from error
            raise DeadlineExceeded(self._history()) from error

    def _backoff(self) -> float:
        longest = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2 ** len(self._failures))
        return _jitter.uniform(0.0, longest)

    def _history(self) -> str:
        earlier = f"; before that: {self._failures[-1]}" if self._failures else ""
        return f"no answer within {self._limits.timeout:g} s, in attempt {len(self._failures) + 1}{earlier}"


class _PhaseTimeouts(Mapping[str, float]):
    """httpx looks up a timeout as each phase begins, so each gets the time that is then left."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts

    def __getitem__(self, phase: str) -> float:
        left = max(0.001, self._attempts.seconds_left())
        return min(left, _CONNECT_SECONDS) if phase == "connect" else left

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "read", "write", "pool"))

    def __len__(self) -> int:
        return 4
