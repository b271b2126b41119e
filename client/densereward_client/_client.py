"""`Client` and `AsyncClient`: two thin loops around everything that is not input or output.

A call goes `Call` (what is sent, how the answer is read and checked) -> `Attempts` (how often, how long) -> the loop,
which only sends and sleeps.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from ._attempts import RETRIED, Attempts, Limits
from ._bound_client import AsyncBoundClient, BoundClient
from ._call import (
    Answer,
    Call,
    EncodingFormat,
    EnsembleOptions,
    Methods,
    Model,
    OnError,
    Samples,
    Truncate,
    models_call,
    ready_call,
    rewards_call,
    token_rewards_call,
)
from ._errors import ConnectionFailed, DeadlineExceeded, Unavailable
from .binding import Binding
from .wire import Include, ModelList, RewardsResponse, TokenRewardsResponse

_NOT_READY = (ConnectionFailed, DeadlineExceeded, Unavailable)


class Client:
    """A densereward server, called from ordinary code. Safe to share between threads.

    Args:
        base_url: Where the server listens, such as `http://127.0.0.1:8000`.
        api_key: Sent as `Authorization: Bearer KEY`.
        timeout: Seconds one call may take in all, its retries and pauses included.
        retries: How often a call is tried again after 429, 503 or a lost connection. Nothing else is tried again.
        priority: Of all its calls: lower numbers are served before all that waits with a higher one.
        httpx_options: Further arguments of `httpx.Client`, such as `verify`, `proxy` or `limits`.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        retries: int = 8,
        priority: int = 0,
        **httpx_options: Any,
    ) -> None:
        self._limits = Limits(timeout, retries)
        self._priority = priority
        self._http = httpx.Client(**_httpx_options(base_url, api_key, httpx_options))

    def token_rewards(
        self,
        samples: Samples,
        *,
        methods: Methods | None = None,
        include: Sequence[Include] = (),
        model: Model | None = None,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
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
            model: One of `models()`, the server's first by default; several answer as an ensemble.
            ensemble: How several become one, as in `wire.Ensemble`; their mean by default.
            on_error: "request" raises for a bad sample; "item" gives that sample an `error` and serves the rest.
            truncate: "prompt_left" shortens prompts that are too long from their beginning, and says so.
            encoding_format: How arrays travel. "base64" is smaller and quicker; the numbers are the same. Of what is
                sent, that goes for lists of 64 entries and more.

        Raises:
            pydantic.ValidationError: The request is wrong; nothing was sent.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        return self._send(
            token_rewards_call(
                samples, methods, include, model, ensemble, on_error, truncate, encoding_format, self._priority
            )
        )

    def rewards(
        self,
        samples: Samples,
        *,
        model: Model | None = None,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
        encoding_format: EncodingFormat = "base64",
    ) -> RewardsResponse:
        """One reward a sample, `answer.data[i].reward`. Arguments and errors are those of `token_rewards`."""
        return self._send(rewards_call(samples, model, ensemble, on_error, truncate, encoding_format, self._priority))

    def bind(
        self, tokenizer: Any, *, model: Model | None = None, eos_token_ids: Sequence[int] | None = None
    ) -> BoundClient:
        """This server, asked in a policy's own tokens.

        Args:
            tokenizer: The policy's: a transformers fast tokenizer.
            model: One of `models()`, the server's first by default; several answer as an ensemble.
            eos_token_ids: What ends the policy's responses; by default its tokenizer's EOS.

        Raises:
            ValueError: There is no such model, or the tokenizer spells in a way that is not known.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        return BoundClient(self, Binding(tokenizer, self.models(), model, eos_token_ids))

    def models(self) -> ModelList:
        """The models that are loaded, and the methods each of them can serve."""
        return self._send(models_call())

    def ready(self) -> bool:
        """Whether the server can score now: one attempt of at most 5 seconds. A server that is not there is not ready.

        Raises:
            StatusError: Something answered, and it is no densereward server that is starting or draining.
        """
        try:
            return self._send(ready_call(), self._limits.for_ready())
        except _NOT_READY:
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

    def _send(self, call: Call[Answer], limits: Limits | None = None) -> Answer:
        attempts = Attempts(limits or self._limits)
        while True:
            try:
                return self._attempt(call, attempts)
            except RETRIED as error:
                pause = attempts.pause_after(error)
            time.sleep(pause)

    def _attempt(self, call: Call[Answer], attempts: Attempts) -> Answer:
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
        priority: int = 0,
        **httpx_options: Any,
    ) -> None:
        self._limits = Limits(timeout, retries)
        self._priority = priority
        self._http = httpx.AsyncClient(**_httpx_options(base_url, api_key, httpx_options))

    async def token_rewards(
        self,
        samples: Samples,
        *,
        methods: Methods | None = None,
        include: Sequence[Include] = (),
        model: Model | None = None,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
        encoding_format: EncodingFormat = "base64",
    ) -> TokenRewardsResponse:
        """As `Client.token_rewards`."""
        return await self._send(
            token_rewards_call(
                samples, methods, include, model, ensemble, on_error, truncate, encoding_format, self._priority
            )
        )

    async def rewards(
        self,
        samples: Samples,
        *,
        model: Model | None = None,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
        encoding_format: EncodingFormat = "base64",
    ) -> RewardsResponse:
        """As `Client.rewards`."""
        return await self._send(
            rewards_call(samples, model, ensemble, on_error, truncate, encoding_format, self._priority)
        )

    async def bind(
        self, tokenizer: Any, *, model: Model | None = None, eos_token_ids: Sequence[int] | None = None
    ) -> AsyncBoundClient:
        """As `Client.bind`."""
        return AsyncBoundClient(self, Binding(tokenizer, await self.models(), model, eos_token_ids))

    async def models(self) -> ModelList:
        """As `Client.models`."""
        return await self._send(models_call())

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return await self._send(ready_call(), self._limits.for_ready())
        except _NOT_READY:
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

    async def _send(self, call: Call[Answer], limits: Limits | None = None) -> Answer:
        attempts = Attempts(limits or self._limits)
        while True:
            try:
                return await self._attempt(call, attempts)
            except RETRIED as error:
                pause = attempts.pause_after(error)
            await asyncio.sleep(pause)

    async def _attempt(self, call: Call[Answer], attempts: Attempts) -> Answer:
        with attempts.translating():
            async with asyncio.timeout(attempts.seconds_left()):
                response = await self._http.request(**call.sent(), extensions=attempts.extensions())
        return call.answer(response, response.content)


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
