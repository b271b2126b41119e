"""`BoundClient` and `AsyncBoundClient`: a client's calls, from a policy's own tokens and back to them by its `Binding`.

The two differ in `await` alone. They are written out, as `Client` and `AsyncClient` are, so that an editor shows what
each call takes and gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._call import EnsembleOptions, Methods, OnError, Samples, Truncate
from .binding import Binding
from .wire import Include, RewardsResponse, TokenRewardsResponse

if TYPE_CHECKING:  # which imports this module: a client makes what is bound to it
    from ._client import AsyncClient, Client


class BoundClient:
    """A server, asked in a policy's own tokens: `response_token_ids` of samples are the policy's, and each is rewarded.

    Attributes:
        binding: How its tokens get to the reward model and back.
    """

    def __init__(self, client: Client, binding: Binding) -> None:
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

        A sample without `finished` has ended by itself if it ends with an EOS, whatever padding follows. Prompts are
        best given as `messages`, which the reward model's own template writes, or as `prompt`.

        Raises:
            ValueError: The request is wrong; nothing was sent.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        bound, refused = self.binding.bind_all(samples, on_error)
        answer = self._client.token_rewards(
            [each.sample for each in bound],
            methods=methods,
            include=include,
            model=self.binding.model,
            ensemble=ensemble,
            on_error=on_error,
            truncate=truncate,
        )
        if not self.binding.is_known(answer.fingerprint):
            self.binding.compare(self._client.models(), answer.fingerprint)
        return self.binding.answer(bound, answer, refused)

    def rewards(
        self,
        samples: Samples,
        *,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
    ) -> RewardsResponse:
        """One reward a sample, `answer.data[i].reward`. Arguments and errors are those of `token_rewards`."""
        bound, refused = self.binding.bind_all(samples, on_error)
        answer = self._client.rewards(
            [each.sample for each in bound],
            model=self.binding.model,
            ensemble=ensemble,
            on_error=on_error,
            truncate=truncate,
        )
        if not self.binding.is_known(answer.fingerprint):
            self.binding.compare(self._client.models(), answer.fingerprint)
        return self.binding.warned(bound, answer, refused)


class AsyncBoundClient:
    """`BoundClient` for asyncio."""

    def __init__(self, client: AsyncClient, binding: Binding) -> None:
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
        bound, refused = self.binding.bind_all(samples, on_error)
        answer = await self._client.token_rewards(
            [each.sample for each in bound],
            methods=methods,
            include=include,
            model=self.binding.model,
            ensemble=ensemble,
            on_error=on_error,
            truncate=truncate,
        )
        if not self.binding.is_known(answer.fingerprint):
            self.binding.compare(await self._client.models(), answer.fingerprint)
        return self.binding.answer(bound, answer, refused)

    async def rewards(
        self,
        samples: Samples,
        *,
        ensemble: EnsembleOptions | None = None,
        on_error: OnError = "request",
        truncate: Truncate | None = None,
    ) -> RewardsResponse:
        """As `BoundClient.rewards`."""
        bound, refused = self.binding.bind_all(samples, on_error)
        answer = await self._client.rewards(
            [each.sample for each in bound],
            model=self.binding.model,
            ensemble=ensemble,
            on_error=on_error,
            truncate=truncate,
        )
        if not self.binding.is_known(answer.fingerprint):
            self.binding.compare(await self._client.models(), answer.fingerprint)
        return self.binding.warned(bound, answer, refused)
