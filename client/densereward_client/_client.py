"""`Client` and `AsyncClient`: two thin loops that send and sleep; everything else is shared.

`Call` describes what is sent and how the answer is read and checked. `Attempts` decides how often it is tried and how
long it may take.
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
    """A densereward server, called from synchronous code. Safe to share between threads.

    Args:
        base_url: Where the server listens, such as `http://127.0.0.1:8000`.
        api_key: Sent as `Authorization: Bearer KEY`.
        timeout: Seconds one call may take in total, with its retries and pauses.
        retries: How often a call is retried after 429, 503 or a lost connection. Nothing else is retried.
        priority: The priority of all its calls; lower numbers are served first.
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
        Every answer is checked for lengths, order, ids, finite numbers, and that
        `sum(token_rewards[method]) + baseline[method] == reward`.

        Args:
            samples: Prompts and responses, as `Sample` or as mappings with the same fields.
            methods: Names, or mappings with parameters such as `{"name": "abc", "beta": 0.8}`; by default the server
                chooses.
            include: What else the answer holds, such as "tokens" or "prefix_scores".
            model: One of `models()`, by default the first; several form an ensemble.
            ensemble: How the rewards of several models are combined, as in `wire.Ensemble`; by default their mean.
            on_error: "request" raises if a sample is bad; "item" gives that sample an `error` and serves the rest.
            truncate: "prompt_left" drops tokens at the beginning of prompts that are too long, and reports how many.
            encoding_format: How arrays are sent, in both directions. "base64" is smaller and quicker, with the same
                numbers; in requests it applies to lists of 64 entries and more.

        Raises:
            pydantic.ValidationError: The request is wrong; nothing was sent.
            DenseRewardError: One of its subclasses, by what went wrong.
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
        """One reward per sample, `answer.data[i].reward`. Arguments and errors are those of `token_rewards`."""
        return self._send(rewards_call(samples, model, ensemble, on_error, truncate, encoding_format, self._priority))

    def bind(
        self, tokenizer: Any, *, model: Model | None = None, eos_token_ids: Sequence[int] | None = None
    ) -> BoundClient:
        """This server, called in a policy's own tokens.

        Args:
            tokenizer: The policy's: a transformers fast tokenizer.
            model: One of `models()`, by default the first; several form an ensemble.
            eos_token_ids: What ends the policy's responses; by default its tokenizer's EOS.

        Raises:
            ValueError: There is no such model, or how the tokenizer writes its tokens is not known.
            DenseRewardError: One of its subclasses, by what went wrong.
        """
        return BoundClient(self, Binding(tokenizer, self.models(), model, eos_token_ids))

    def models(self) -> ModelList:
        """The loaded models, and the methods that each can serve."""
        return self._send(models_call())

    def ready(self) -> bool:
        """Whether the server can score now, by one attempt of at most 5 seconds. False if there is no server.

        Raises:
            StatusError: Something else answered: not a densereward server, or one that refuses the request.
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
            # httpx limits each wait for data but not their sum, so the deadline is checked between them.
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
        raise ValueError(f"base_url must be like http://127.0.0.1:8000, not {base_url!r}")
    headers = httpx.Headers({"Content-Type": "application/json", "User-Agent": "densereward-client"})
    headers.update(options.get("headers"))
    if api_key is not None:
        # httpx would notice only when sending, and its message would show the key.
        if not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError("api_key must be printable ASCII without spaces or line ends")
        headers["Authorization"] = f"Bearer {api_key}"
    return {**options, "base_url": url, "headers": headers}
