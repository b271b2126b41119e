"""What the TRL adapters share and what needs no TRL: rollouts as samples, token rewards as advantages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._bound_client import BoundClient
from .._call import Truncate
from .._errors import InvalidAnswer
from ._rewards import Method, as_method, centred

if TYPE_CHECKING:
    import torch

__all__ = [
    "AsyncTokenReward",
    "Row",
    "Scorer",
    "TokenReward",
    "dense_advantages",
    "padded",
    "prompt_of",
    "rollouts",
    "unpadded",
]

Row = NDArray[np.float32]
"""The token rewards of one response, float32[T]."""


class Scorer:
    """A bound client that scores batches of responses with one method.

    Args:
        bound: From `client.bind(tokenizer)`, with the policy's tokenizer and every EOS of its responses.
        method: How tokens are rewarded: a name, or a mapping with parameters.
        truncate: "prompt_left" shortens prompts that are too long; by default they are refused.
    """

    def __init__(self, bound: BoundClient, method: Method = "red", *, truncate: Truncate | None = None) -> None:
        self.bound = bound
        self.method = method
        self.key = as_method(method).key
        self._truncate = truncate

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[Row]]:
        """The reward of each response, and the rewards of its tokens.

        Raises:
            ValueError: A sample cannot be sent.
            DenseRewardError: One of its subclasses; no failure is ever scored as zero.
        """
        data = self.bound.token_rewards(samples, methods=[self.method], truncate=self._truncate).data
        rewards = [item.reward for item in data if item.reward is not None]
        if len(rewards) != len(samples):
            raise InvalidAnswer(f"the server gave {len(rewards)} rewards for {len(samples)} responses")
        return rewards, [item.token_rewards[self.key] for item in data]


class _RewardFunction:
    """The common part of `TokenReward` and `AsyncTokenReward`."""

    def __init__(
        self,
        bound: BoundClient,
        method: Method = "red",
        *,
        truncate: Truncate | None = None,
        name: str | None = None,
    ) -> None:
        self.scorer = Scorer(bound, method, truncate=truncate)
        self.__name__ = name or f"densereward_{self.scorer.key}"
        self.token_rewards: list[Row] | None = None

    def _score(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        response_mask: Sequence[Sequence[int]] | None,
    ) -> list[float]:
        self.token_rewards = None  # if this call fails, those of an earlier one must not be used
        samples = [
            {**prompt_of(prompt), "response_token_ids": list(ids)}
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        if response_mask is not None:
            samples = [each | {"response_mask": list(mask)} for each, mask in zip(samples, response_mask, strict=True)]
        rewards, self.token_rewards = self.scorer(samples)
        return rewards


class TokenReward(_RewardFunction):
    """A reward function for TRL's `GRPOTrainer` and `RLOOTrainer`: the reward model's score of each completion.

    Completions are read as ids, since their text lacks the EOS. The score is the model's own reward, whatever the
    method; `DenseGRPOTrainer` uses the token rewards as well.

    Args:
        bound: From `client.bind(tokenizer, eos_token_ids=...)`, with every EOS of the policy's generation config; by
            default its tokenizer's only.
        method: How tokens are rewarded: a name, or a mapping with parameters. If the model cannot serve "red",
            "sparse" is enough for the score alone.
        truncate: "prompt_left" shortens prompts that are too long; by default they are refused.
        name: Its name in TRL's logs; by default `densereward_METHOD`.

    Attributes:
        token_rewards: From the latest call, one array per completion; None before the first call or if it failed.
    """

    def __call__(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        response_mask: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        """One finite score per completion.

        Raises:
            ValueError: A prompt or completion cannot be sent.
            DenseRewardError: One of its subclasses, by what went wrong; this ends the training step.
        """
        return self._score(prompts, completion_ids, response_mask)


class AsyncTokenReward(_RewardFunction):
    """`TokenReward` for use with other asynchronous reward functions, which TRL runs concurrently.

    It calls the server from a thread, since a client that is bound in one event loop cannot be used in TRL's.
    """

    async def __call__(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        response_mask: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        """As `TokenReward.__call__`."""
        return await asyncio.to_thread(self._score, prompts, completion_ids, response_mask)


def prompt_of(prompt: Any) -> dict[str, Any]:
    """A prompt of TRL's data sets, text or messages, as a field of a sample.

    Raises:
        ValueError: The messages end with an assistant's, which the policy is to continue.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if prompt and prompt[-1].get("role") == "assistant":
        raise ValueError(
            "the prompt ends with an assistant's message, which the policy goes on writing; a reward model's template "
            "would close it and begin another"
        )
    return {"messages": prompt}


def dense_advantages(advantages: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """Token advantages, A + alpha (r_t - mean r), [B, T]; 0 where the mask is.

    Args:
        advantages: A, the advantages of sequences, [B].
        rewards: r, the rewards of tokens, [B, T].
        mask: [B, T]; 1 for the tokens to learn from. The mean is over these.
        alpha: The weight of token rewards. Their part sums to zero in every response.
    """
    return (advantages.unsqueeze(1) + alpha * centred(rewards, mask)) * mask.to(rewards.dtype)


def padded(rows: Sequence[Row], like: torch.Tensor) -> torch.Tensor:
    """The rows in a tensor like this one, [B, T], with zeros on their right."""
    tensor = like.new_zeros(like.shape)
    for row, rewards in zip(tensor, rows, strict=True):
        row[: len(rewards)] = row.new_tensor(rewards)
    return tensor


def rollouts(
    rows: Iterable[Sequence[int]], context: int, pad: int, eos: frozenset[int]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """The ids of prompt and response in each row of PPO: prompts are padded on the left, responses on the right.

    A response ends before its first pad, as TRL reads it; if the pad is also the EOS, it is the response's last token.

    Args:
        rows: Prompts and responses, each padded to a common length.
        context: The padded length of the prompts.
        pad: The padding token.
        eos: What ends a response.
    """
    return [_rollout(list(row[:context]), list(row[context:]), pad, eos) for row in rows]


def _rollout(
    prompt: list[int], response: list[int], pad: int, eos: frozenset[int]
) -> tuple[tuple[int, ...], list[int]]:
    if pad in response:
        response = response[: response.index(pad) + (pad in eos)]
    return unpadded(prompt, pad), response


def unpadded(prompt: Sequence[int], pad: int) -> tuple[int, ...]:
    """A prompt without the padding on its left."""
    start = next((i for i, token in enumerate(prompt) if token != pad), len(prompt))
    return tuple(prompt[start:])
