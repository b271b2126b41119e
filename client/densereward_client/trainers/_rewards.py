"""What all adapters share: rewards that sum to the sequence's reward, and a server called once per response."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._bound_client import AsyncBoundClient
from .._client import AsyncClient
from ..tensors import row_of
from ..wire import MethodRequest, Sample, SampleTokenRewards

if TYPE_CHECKING:
    import torch

__all__ = ["Method", "Rewarded", "Rewarder", "as_method", "centred", "rewarded"]

Method = str | Mapping[str, Any]
"""A method's name, or a mapping with its parameters, such as `{"name": "abc", "beta": 0.8}`."""


class Rewarded(NamedTuple):
    """The reward of one response.

    Attributes:
        reward: The reward of the whole response.
        token_rewards: float32[T], one per token of the response; they sum to `reward`.
    """

    reward: float
    token_rewards: NDArray[np.float32]


def as_method(method: Method) -> MethodRequest:
    """The request for a method; its `key` names the rewards in the answer."""
    return MethodRequest.model_validate({"name": method} if isinstance(method, str) else dict(method))


def rewarded(item: SampleTokenRewards, method: str, mask: ArrayLike | None = None) -> Rewarded:
    """The rewards of one item, with its baseline added to the last token that the policy wrote.

    So they sum to the sequence's reward, as trainers that add them up expect.

    Args:
        item: One item of an answer.
        method: The key of its token rewards.
        mask: [T], 0 for tokens that the policy did not write; by default it wrote all of them.

    Raises:
        ValueError: The item was not served, or the policy wrote none of the tokens.
    """
    rewards = row_of(item, method).astype(np.float64)
    written = np.flatnonzero(np.ones(len(rewards)) if mask is None else np.asarray(mask))
    if not len(written):
        raise ValueError(f"sample {item.index} has no token that the policy wrote, so there is none to reward")
    rewards[written[-1]] += item.baseline[method]
    scale = (item.scale or {}).get(method, 1.0)
    return Rewarded(float(item.reward or 0.0) * scale, rewards.astype(np.float32))


def centred(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`r_t - mean r`, with the mean over the row's tokens where the mask is not 0; 0 elsewhere. All [B, T]."""
    excluded = ~mask.bool()
    counts = mask.bool().sum(1, keepdim=True).clamp(min=1)
    means = rewards.masked_fill(excluded, 0.0).sum(1, keepdim=True) / counts
    return (rewards - means).masked_fill(excluded, 0.0)


class Rewarder:
    """A server, called from asyncio with one response at a time, as rollouts end; the server forms batches of them.

    It connects at the first call, so it can be created before the server is up, in any process. It serves one policy,
    whose tokenizer is bound at the first call.

    Args:
        base_url: Where the server listens.
        method: Which token rewards, by name or with parameters.
        model: One of the server's, by default the first; several form an ensemble.
        eos_token_ids: What ends the policy's responses; by default its tokenizer's EOS.
        client_options: Further arguments of `AsyncClient`: `api_key`, `timeout`, `retries` and so on.
    """

    def __init__(
        self,
        base_url: str,
        method: Method = "red",
        *,
        model: str | Sequence[str] | None = None,
        eos_token_ids: Sequence[int] | None = None,
        **client_options: Any,
    ) -> None:
        self._base_url = base_url
        self._method = as_method(method)
        self._model = model
        self._eos_token_ids = eos_token_ids
        self._client_options = client_options
        self._bound: asyncio.Task[AsyncBoundClient] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: AsyncClient | None = None

    async def reward(self, tokenizer: Any, sample: Sample | Mapping[str, Any]) -> Rewarded:
        """The rewards of one response, one per id of the policy's. A failure raises and is never a reward of zero.

        Args:
            tokenizer: The policy's.
            sample: As for `BoundClient.token_rewards`: `response_token_ids` are the policy's.

        Raises:
            ValueError: The request is wrong; nothing was sent.
            DenseRewardError: One of its subclasses, by what went wrong.
        """
        given = sample if isinstance(sample, Sample) else Sample.model_validate(sample)
        policy = await self._policy(tokenizer)
        answer = await policy.token_rewards([given], methods=[self._method])
        return rewarded(answer.data[0], self._method.key, given.response_mask)

    async def aclose(self) -> None:
        """Closes the connections; a later call opens new ones."""
        client, self._client, self._bound = self._client, None, None
        if client is not None:
            await client.aclose()

    async def _policy(self, tokenizer: Any) -> AsyncBoundClient:
        """The bound client: one for all concurrent calls, and another for another event loop, as connections need."""
        loop = asyncio.get_running_loop()
        failed = self._bound is not None and self._bound.done() and self._bound.exception() is not None
        if self._bound is None or self._loop is not loop or failed:
            self._loop = loop
            self._bound = loop.create_task(self._bind(tokenizer))
        return await asyncio.shield(self._bound)

    async def _bind(self, tokenizer: Any) -> AsyncBoundClient:
        client = AsyncClient(self._base_url, **self._client_options)
        try:
            bound = await client.bind(tokenizer, model=self._model, eos_token_ids=self._eos_token_ids)
        except BaseException:  # a cancelled task must leave no connections open either
            await client.aclose()
            raise
        self._client = client
        return bound
