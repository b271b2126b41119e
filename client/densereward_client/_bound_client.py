"""`BoundClient` and `AsyncBoundClient`: a client's calls in a policy's own tokens, by its `Binding`.

Both describe a call once, as a `_BoundCall`, and differ only in `await`. Their arguments are written out twice so that
an editor shows what each call takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ._call import (
    Answer,
    Call,
    EnsembleOptions,
    Methods,
    OnError,
    Samples,
    Truncate,
    models_call,
    rewards_call,
    token_rewards_call,
)
from .binding import Binding
from .wire import Include, RewardsResponse, TokenRewardsResponse

_Rewards = TypeVar("_Rewards", RewardsResponse, TokenRewardsResponse)


class Sender(Protocol):
    """What a bound client needs of a `Client`."""

    _priority: int

    def _send(self, call: Call[Answer]) -> Answer: ...


class AsyncSender(Protocol):
    """What a bound client needs of an `AsyncClient`."""

    _priority: int

    async def _send(self, call: Call[Answer]) -> Answer: ...


class BoundClient:
    """A server, called in a policy's own tokens: `response_token_ids` are the policy's, and each gets a reward.

    Attributes:
        binding: How the policy's tokens become the reward model's, and its rewards the policy's.
    """

    def __init__(self, client: Sender, binding: Binding) -> None:
        self._client = client
        self.binding = binding

    def token_rewards(
        self,
        samples: Samples,
        *,
        methods: Methods | None = None,
        include: Sequence[Include] = (),
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
    ) -> TokenRewardsResponse:
        """As `Client.token_rewards`, with `len(token_rewards[method]) == len(response_token_ids)` for every sample.

        A sample without `finished` counts as finished if its response ends with an EOS, with or without padding after
        it. Give prompts as `messages`, which the reward model's own template renders, or as `prompt`.

        Raises:
            ValueError: The request is wrong; nothing was sent.
            DenseRewardError: One of its subclasses, by what went wrong.
        """
        return self._send(
            _token_rewards(
                self.binding, samples, methods, include, ensemble, on_error, truncate, self._client._priority
            )
        )

    def rewards(
        self,
        samples: Samples,
        *,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
    ) -> RewardsResponse:
        """One reward per sample, `answer.data[i].reward`. Arguments and errors are those of `token_rewards`."""
        return self._send(_rewards(self.binding, samples, ensemble, on_error, truncate, self._client._priority))

    def _send(self, bound: _BoundCall[_Rewards]) -> _Rewards:
        answer = self._client._send(bound.call)
        if not self.binding.is_known(answer.fingerprint):
            self.binding.compare(self._client._send(models_call()), answer.fingerprint)
        return bound.on_policy_tokens(answer)


class AsyncBoundClient:
    """`BoundClient` for asyncio."""

    def __init__(self, client: AsyncSender, binding: Binding) -> None:
        self._client = client
        self.binding = binding

    async def token_rewards(
        self,
        samples: Samples,
        *,
        methods: Methods | None = None,
        include: Sequence[Include] = (),
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
    ) -> TokenRewardsResponse:
        """As `BoundClient.token_rewards`."""
        return await self._send(
            _token_rewards(
                self.binding, samples, methods, include, ensemble, on_error, truncate, self._client._priority
            )
        )

    async def rewards(
        self,
        samples: Samples,
        *,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
    ) -> RewardsResponse:
        """As `BoundClient.rewards`."""
        return await self._send(_rewards(self.binding, samples, ensemble, on_error, truncate, self._client._priority))

    async def _send(self, bound: _BoundCall[_Rewards]) -> _Rewards:
        answer = await self._client._send(bound.call)
        if not self.binding.is_known(answer.fingerprint):
            self.binding.compare(await self._client._send(models_call()), answer.fingerprint)
        return bound.on_policy_tokens(answer)


@dataclass(frozen=True)
class _BoundCall(Generic[_Rewards]):
    """A call in the reward model's tokens, and what turns its answer into one on the policy's tokens."""

    call: Call[_Rewards]
    on_policy_tokens: Callable[[_Rewards], _Rewards]


def _token_rewards(
    binding: Binding,
    samples: Samples,
    methods: Methods | None,
    include: Sequence[Include],
    ensemble: EnsembleOptions | None,
    on_error: OnError,
    truncate: Truncate | None,
    priority: int,
) -> _BoundCall[TokenRewardsResponse]:
    bound, refused = binding.bind_all(samples, on_error)
    sent = [each.sample for each in bound]
    call = token_rewards_call(sent, methods, include, binding.model, ensemble, on_error, truncate, "base64", priority)
    return _BoundCall(call, lambda answer: binding.answer(bound, answer, refused))


def _rewards(
    binding: Binding,
    samples: Samples,
    ensemble: EnsembleOptions | None,
    on_error: OnError,
    truncate: Truncate | None,
    priority: int,
) -> _BoundCall[RewardsResponse]:
    bound, refused = binding.bind_all(samples, on_error)
    sent = [each.sample for each in bound]
    call = rewards_call(sent, binding.model, ensemble, on_error, truncate, "base64", priority)
    return _BoundCall(call, lambda answer: binding.warned(bound, answer, refused))
