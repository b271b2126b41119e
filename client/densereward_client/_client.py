"""`Client` and `AsyncClient`: two thin loops around everything that is not input or output.

A call goes `_Call` (what is sent, how the answer is read) -> `_Attempts` (how often, how long) -> the loop, which only
sends and sleeps. An answer is checked against its request before it is returned: a silently wrong number is worse
than an outage.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from ._errors import (
    ConnectionFailed,
    DeadlineExceeded,
    DenseRewardError,
    InvalidAnswer,
    Overloaded,
    Unavailable,
    beginning,
    status_error,
)
from .wire import (
    Include,
    MethodRequest,
    ModelList,
    RewardsRequest,
    RewardsResponse,
    Sample,
    SampleReward,
    SampleTokenRewards,
    TokenRewardsRequest,
    TokenRewardsResponse,
)

Samples = Sequence[Sample | Mapping[str, Any]]
Methods = Sequence[str | MethodRequest | Mapping[str, Any]]
OnError = Literal["request", "item"]
EncodingFormat = Literal["float", "base64"]
Answer = TypeVar("Answer")
ParsedAnswer = TypeVar("ParsedAnswer", bound=BaseModel)

_CONNECT_SECONDS = 10.0  # a host that drops packets must not eat the whole deadline in one attempt
_READY_SECONDS = 5.0
_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 10.0
_CLOCK_SLACK_SECONDS = 0.001  # timers may fire this early
_SUM_TOLERANCE = 1e-4  # float32 sums, relative to the largest term in play

# Of its own: a trainer seeds the shared generator, alike in every process, and counts on its sequence.
_jitter = random.SystemRandom()

_Retried = (ConnectionFailed, Overloaded, Unavailable)
_NotReady = (ConnectionFailed, DeadlineExceeded, Unavailable)


# --- what is sent, and how its answer is read ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Call(Generic[Answer]):
    method: str
    path: str
    body: bytes | None
    parse: Callable[[bytes], Answer]

    def sent(self) -> dict[str, Any]:
        """The arguments of httpx's `request` and `stream`."""
        return {"method": self.method, "url": self.path, "content": self.body}

    def answer(self, response: httpx.Response, body: bytes) -> Answer:
        """The checked answer, or the error that the response stands for."""
        if not response.is_success:
            raise status_error(response.status_code, body, response.headers.get("Retry-After"))
        return self.parse(body)


def _token_rewards_call(
    samples: Samples,
    methods: Methods | None,
    include: Sequence[Include],
    model: str | None,
    on_error: OnError,
    encoding_format: EncodingFormat,
) -> _Call[TokenRewardsResponse]:
    request = TokenRewardsRequest.model_validate(
        _given(
            model=model,
            samples=samples,
            methods=methods,
            include=include,
            on_error=on_error,
            encoding_format=encoding_format,
        )
    )

    def parse(body: bytes) -> TokenRewardsResponse:
        answer = _parse(TokenRewardsResponse, body)
        _check_items(request, answer.data)
        for sample, item in zip(request.samples, answer.data, strict=True):
            if item.error is None:
                _raise_first(item.index, _token_faults(request, sample, item))
        return answer

    return _Call("POST", "/token_rewards", _json(request), parse)


def _rewards_call(samples: Samples, model: str | None, on_error: OnError) -> _Call[RewardsResponse]:
    request = RewardsRequest.model_validate(_given(model=model, samples=samples, on_error=on_error))

    def parse(body: bytes) -> RewardsResponse:
        answer = _parse(RewardsResponse, body)
        _check_items(request, answer.data)
        return answer

    return _Call("POST", "/rewards", _json(request), parse)


def _models_call() -> _Call[ModelList]:
    return _Call("GET", "/v1/models", None, lambda body: _parse(ModelList, body))


def _ready_call() -> _Call[bool]:
    return _Call("GET", "/ready", None, lambda _: True)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _json(request: BaseModel) -> bytes:
    # Only what was set: a None that the caller wrote into a message or a method's parameters is kept.
    return request.model_dump_json(exclude_unset=True).encode()


def _parse(kind: type[ParsedAnswer], body: bytes) -> ParsedAnswer:
    try:
        return kind.model_validate_json(body)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidAnswer(f"not a {kind.__name__}: {error}; the body begins {beginning(body)}") from error


# --- does the answer fit the request? -----------------------------------------------------------------------------


def _check_items(request: RewardsRequest, items: Sequence[SampleReward]) -> None:
    if len(items) != len(request.samples):
        raise InvalidAnswer(f"{len(request.samples)} samples were sent and {len(items)} items came back")
    for index, (sample, item) in enumerate(zip(request.samples, items, strict=True)):
        _raise_first(index, _item_faults(index, request, sample, item))


def _raise_first(index: int, faults: Iterator[str]) -> None:
    for fault in faults:
        raise InvalidAnswer(f"item {index}: {fault}")


def _item_faults(index: int, request: RewardsRequest, sample: Sample, item: SampleReward) -> Iterator[str]:
    if item.index != index:
        yield f"index {item.index} came back in its place"
    if sample.id is not None and item.id != sample.id:
        yield f"id {item.id!r} came back for {sample.id!r}"
    if item.error is None and item.reward is None:
        yield "it has neither a reward nor an error"
    if item.error is not None and request.on_error == "request":
        yield f"it has an error, which on_error='request' rules out: {item.error.code}: {item.error.message}"


def _token_faults(request: TokenRewardsRequest, sample: Sample, item: SampleTokenRewards) -> Iterator[str]:
    asked = {method if isinstance(method, str) else method.key for method in request.methods or ()}
    if missing := asked - item.token_rewards.keys():
        yield f"no token rewards of {', '.join(sorted(missing))}"
    if not item.token_rewards:
        yield "no token rewards at all"
    for name, array in (("prefix_scores", item.prefix_scores), ("attention", item.attention)):
        if array is not None:
            yield from _array_faults(name, array)
    for name, rewards in item.token_rewards.items():
        yield from _array_faults(name, rewards)
        yield from _length_faults(name, rewards, sample)
        yield from _sum_faults(name, rewards, item)
        if sample.response_mask is not None and np.any(rewards[np.equal(sample.response_mask, 0)]):
            yield f"{name} rewards a token that response_mask leaves out"
    lengths = {name: len(rewards) for name, rewards in item.token_rewards.items()}
    if len(set(lengths.values())) > 1:
        yield f"the methods disagree on the number of tokens: {lengths}"


def _length_faults(name: str, rewards: NDArray[np.float32], sample: Sample) -> Iterator[str]:
    for field in ("response_spans", "response_token_ids", "response_mask"):
        per_token = getattr(sample, field)
        if per_token is not None and len(per_token) != len(rewards):
            yield f"{name} has {len(rewards)} token rewards for {len(per_token)} {field}"


def _array_faults(name: str, array: NDArray[np.float32]) -> Iterator[str]:
    if array.ndim != 1:
        yield f"{name} has the shape {array.shape} and not (T,)"
    elif not np.isfinite(array).all():
        yield f"{name} is not finite at {np.flatnonzero(~np.isfinite(array))[0]}"


def _sum_faults(name: str, rewards: NDArray[np.float32], item: SampleTokenRewards) -> Iterator[str]:
    if item.reward is None:
        return
    baseline = item.baseline.get(name, 0.0)
    total = float(rewards.sum(dtype=np.float64)) + baseline
    scale = max(1.0, abs(item.reward), float(np.abs(rewards).sum(dtype=np.float64)))
    if abs(total - item.reward) > _SUM_TOLERANCE * scale:
        yield f"{name} and its baseline sum to {total:.6g} and not to the reward, {item.reward:.6g}"


# --- how often, how long ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    timeout: float
    retries: int

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout is a number of seconds above 0, not {self.timeout!r}")
        if self.retries < 0:
            raise ValueError(f"retries is 0 or more, not {self.retries!r}")

    def for_ready(self) -> _Limits:
        return _Limits(min(self.timeout, _READY_SECONDS), retries=0)


class _Attempts:
    """The attempts of one call: the time left, and the pause before the next one."""

    def __init__(self, limits: _Limits) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + limits.timeout
        self._failures: list[DenseRewardError] = []

    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def extensions(self) -> dict[str, Any]:
        return {"timeout": _PhaseTimeouts(self)}

    def pause_after(self, error: ConnectionFailed | Overloaded | Unavailable) -> float:
        """Seconds to wait before the next attempt; raises the error where there is to be none."""
        longest = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2 ** len(self._failures))
        named = None if isinstance(error, ConnectionFailed) else error.retry_after
        # Jitter comes on top of the time the server named, or all whom it turned away would return at once.
        pause = (named or 0.0) + _jitter.uniform(0.0, longest)
        self._failures.append(error)
        left = self.seconds_left()
        if len(self._failures) > self._limits.retries or pause >= left:
            error.add_note(
                f"attempts made: {len(self._failures)}; seconds left: {left:.3g} of {self._limits.timeout:g}"
            )
            raise error
        return pause

    def while_time_is_left(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if self.seconds_left() <= 0:
                raise TimeoutError
            yield chunk

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Turns what a connection raises into this package's errors."""
        try:
            yield
        except (httpx.RequestError, TimeoutError) as error:
            # The clock decides, not the exception: a connect timeout, say, is often shorter than the deadline.
            if self.seconds_left() > _CLOCK_SLACK_SECONDS:
                raise ConnectionFailed(f"no answer: {error!r}") from error
            raise DeadlineExceeded(self._history()) from error

    def _history(self) -> str:
        earlier = f"; before that: {self._failures[-1]}" if self._failures else ""
        return f"no answer within {self._limits.timeout:g} s, in attempt {len(self._failures) + 1}{earlier}"


class _PhaseTimeouts(Mapping[str, float]):
    """An attempt's timeouts, looked up as each phase begins (connect, write, read), so that they never add up."""

    def __init__(self, attempts: _Attempts) -> None:
        self._attempts = attempts

    def __getitem__(self, phase: str) -> float:
        left = max(0.001, self._attempts.seconds_left())
        return min(left, _CONNECT_SECONDS) if phase == "connect" else left

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "read", "write", "pool"))

    def __len__(self) -> int:
        return 4


def _httpx_options(base_url: str, api_key: str | None, options: dict[str, Any]) -> dict[str, Any]:
    url = httpx.URL(base_url)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url is like http://127.0.0.1:8000, not {base_url!r}")
    headers = httpx.Headers({"Content-Type": "application/json", "User-Agent": "densereward-client"})
    headers.update(options.get("headers"))
    if api_key is not None:
        # httpx would only find out while sending, and its message would show the key.
        if not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError("api_key is printable ASCII without spaces or line ends")
        headers["Authorization"] = f"Bearer {api_key}"
    return {**options, "base_url": url, "headers": headers}


# --- the two clients ----------------------------------------------------------------------------------------------


class Client:
    """A densereward server, called from ordinary code. Safe to share between threads.

    Args:
        base_url: Where the server listens, such as `http://127.0.0.1:8000`.
        api_key: Sent as `Authorization: Bearer KEY`.
        timeout: Seconds one call may take in all, its retries and pauses included.
        retries: How often a call is tried again after 429, 503 or a lost connection. Nothing else is tried again.
        httpx_options: Further arguments of `httpx.Client`, such as `verify`, `proxy` or `limits`.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        retries: int = 8,
        **httpx_options: Any,
    ) -> None:
        self._limits = _Limits(timeout, retries)
        self._http = httpx.Client(**_httpx_options(base_url, api_key, httpx_options))

    def token_rewards(
        self,
        samples: Samples,
        *,
        methods: Methods | None = None,
        include: Sequence[Include] = (),
        model: str | None = None,
        on_error: OnError = "request",
        encoding_format: EncodingFormat = "base64",
    ) -> TokenRewardsResponse:
        """Rewards every token of every sample: `answer.data[i].token_rewards[method]` is float32[T_i].

        T_i is the number of `response_spans`, else of `response_token_ids`, else of the reward model's own tokens.
        Checked: `sum(token_rewards[method]) + baseline[method] == reward`, lengths, order, ids, finiteness.

        Args:
            samples: Prompts and responses, as `Sample` or as mappings of the same fields. One call is one batch.
            methods: Names, or mappings with parameters such as `{"name": "abc", "beta": 0.8}`; the server's choice
                by default.
            include: What else to answer with, such as "tokens" or "prefix_scores".
            model: One of `models()`; the server's first by default.
            on_error: "request" raises for a bad sample; "item" gives that sample an `error` and serves the rest.
            encoding_format: How arrays travel. "base64" is smaller; the numbers are the same.

        Raises:
            pydantic.ValidationError: The request is wrong; nothing was sent.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        return self._send(_token_rewards_call(samples, methods, include, model, on_error, encoding_format))

    def rewards(self, samples: Samples, *, model: str | None = None, on_error: OnError = "request") -> RewardsResponse:
        """One reward a sample, `answer.data[i].reward`. Arguments and errors are those of `token_rewards`."""
        return self._send(_rewards_call(samples, model, on_error))

    def models(self) -> ModelList:
        """The models that are loaded, and the methods each of them can serve."""
        return self._send(_models_call())

    def ready(self) -> bool:
        """Whether the server can score now: one attempt of at most 5 seconds. A server that is not there is not ready.

        Raises:
            StatusError: Something answered, and it is no densereward server that is starting or draining.
        """
        try:
            return self._send(_ready_call(), self._limits.for_ready())
        except _NotReady:
            return False

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: _Call[Answer], limits: _Limits | None = None) -> Answer:
        attempts = _Attempts(limits or self._limits)
        while True:
            try:
                return self._attempt(call, attempts)
            except _Retried as error:
                pause = attempts.pause_after(error)
            time.sleep(pause)

    def _attempt(self, call: _Call[Answer], attempts: _Attempts) -> Answer:
        with attempts.translating(), self._http.stream(**call.sent(), extensions=attempts.extensions()) as response:
            # httpx bounds each wait for data and not their sum, so the deadline is looked at between them.
            body = b"".join(attempts.while_time_is_left(response.iter_bytes()))
        return call.answer(response, body)


class AsyncClient:
    """A densereward server, called from asyncio. Arguments, answers and errors are those of `Client`."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        retries: int = 8,
        **httpx_options: Any,
    ) -> None:
        self._limits = _Limits(timeout, retries)
        self._http = httpx.AsyncClient(**_httpx_options(base_url, api_key, httpx_options))

    async def token_rewards(
        self,
        samples: Samples,
        *,
        methods: Methods | None = None,
        include: Sequence[Include] = (),
        model: str | None = None,
        on_error: OnError = "request",
        encoding_format: EncodingFormat = "base64",
    ) -> TokenRewardsResponse:
        """As `Client.token_rewards`."""
        return await self._send(_token_rewards_call(samples, methods, include, model, on_error, encoding_format))

    async def rewards(
        self, samples: Samples, *, model: str | None = None, on_error: OnError = "request"
    ) -> RewardsResponse:
        """As `Client.rewards`."""
        return await self._send(_rewards_call(samples, model, on_error))

    async def models(self) -> ModelList:
        """As `Client.models`."""
        return await self._send(_models_call())

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return await self._send(_ready_call(), self._limits.for_ready())
        except _NotReady:
            return False

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _send(self, call: _Call[Answer], limits: _Limits | None = None) -> Answer:
        attempts = _Attempts(limits or self._limits)
        while True:
            try:
                return await self._attempt(call, attempts)
            except _Retried as error:
                pause = attempts.pause_after(error)
            await asyncio.sleep(pause)

    async def _attempt(self, call: _Call[Answer], attempts: _Attempts) -> Answer:
        with attempts.translating():
            async with asyncio.timeout(attempts.seconds_left()):
                response = await self._http.request(**call.sent(), extensions=attempts.extensions())
        return call.answer(response, response.content)
