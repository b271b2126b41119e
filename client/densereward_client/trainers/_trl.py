"""What the adapters for TRL share, without TRL: rollouts as samples, token rewards as advantages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._bound_client import BoundClient
from .._call import Truncate
from .._errors import InvalidAnswer

if TYPE_CHECKING:
    import torch

__all__ = ["AsyncTokenReward", "Scorer", "TokenReward", "dense_advantages", "prompt_of", "rollouts"]

Method = str | Mapping[str, Any]
Row = NDArray[np.float32]


class Scorer:
    """A bound server, asked for the rewards of responses and of their tokens by one method.

    Args:
        bound: From `client.bind(tokenizer)`, with the policy's tokenizer and all that ends its responses.
        method: How tokens are rewarded: a name, or a mapping with parameters.
        truncate: "prompt_left" shortens prompts that are too long; by default they are refused.
    """

    def __init__(self, bound: BoundClient, method: Method = "red", *, truncate: Truncate | None = None) -> None:
        self.bound = bound
        self.method = method
        self.key: str = method if isinstance(method, str) else method.get("label") or method["name"]
        self._truncate = truncate

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[Row]]:
        """Each response's reward, and the rewards of its tokens.

        Raises:
            ValueError: A sample cannot be sent.
            DenseRewardError: One of its kinds; nothing is ever scored as zero instead.
        """
        data = self.bound.token_rewards(samples, methods=[self.method], truncate=self._truncate).data
        rewards = [item.reward for item in data if item.reward is not None]
        if len(rewards) != len(samples):
            raise InvalidAnswer(f"the server gave {len(rewards)} rewards for {len(samples)} responses")
        return rewards, [item.token_rewards[self.key] for item in data]


class _RewardFunction:
    """What both kinds of reward functions are made of."""

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
        self.token_rewards = None  # those of an earlier call must not outlive a call that fails
        samples = [
            {**prompt_of(prompt), "response_token_ids": list(ids)}
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        if response_mask is not None:
            samples = [each | {"response_mask": list(mask)} for each, mask in zip(samples, response_mask, strict=True)]
        rewards, self.token_rewards = self.scorer(samples)
        return rewards


class TokenReward(_RewardFunction):
    """A reward function for TRL's `GRPOTrainer` and `RLOOTrainer`: the reward model's number for each completion.

    Completions are read by their ids, which hold the EOS that their text lacks. The number is the model's own reward,
    whatever the method; `DenseGRPOTrainer` uses the token rewards as well.

    Args:
        bound: From `client.bind(tokenizer, eos_token_ids=...)`: with several EOS in the policy's generation config,
            all of them; by default its tokenizer's.
        method: How tokens are rewarded: a name, or a mapping with parameters. Where the model cannot serve "red",
            "sparse" does for the number alone.
        truncate: "prompt_left" shortens prompts that are too long; by default they are refused.
        name: What it is called in TRL's logs; `densereward_METHOD` by default.

    Attributes:
        token_rewards: Of the latest call, one array for each completion; None before and after a call that failed.
    """

    def __call__(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        response_mask: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        """One finite number for each completion.

        Raises:
            ValueError: A prompt or completion cannot be sent.
            DenseRewardError: One of its kinds, by what went wrong, which ends the training step.
        """
        return self._score(prompts, completion_ids, response_mask)


class AsyncTokenReward(_RewardFunction):
    """`TokenReward` for use beside other asynchronous reward functions, which TRL runs at the same time.

    It asks from a thread of its own, since a client that is bound in one event loop cannot be used in TRL's.
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
    """A prompt of TRL's data sets, text or dialogue, as a sample has it.

    Raises:
        ValueError: The dialogue ends in the beginning of an answer.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if prompt and prompt[-1].get("role") == "assistant":
        raise ValueError(
            "the prompt ends in an assistant's message, which the policy goes on writing; a reward model's template "
            "would close it and open another"
        )
    return {"messages": prompt}


def dense_advantages(advantages: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """Advantages of sequences and rewards of tokens as one: A + alpha (r_t - mean r), and 0 where masked.

    Args:
        advantages: [B].
        rewards: [B, T].
        mask: [B, T]; 1 for the tokens to learn from, over which the mean goes.
        alpha: The weight of token rewards. Their part sums to zero in every response.
    """
    mask = mask.to(rewards.dtype)
    mean = (rewards * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (advantages.unsqueeze(1) + alpha * (rewards - mean)) * mask


def rollouts(
    rows: Iterable[Sequence[int]], context: int, pad: int, eos: frozenset[int]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """The ids of prompt and response in rows of PPO: the prompt padded on its left, the response on its right.

    A response ends before the first pad, as TRL reads it; a pad that is the EOS as well is its last token.

    Args:
        rows: Prompts and responses, each padded to one length.
        context: The length of the prompts.
        pad: The token they are padded with.
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
    start = next((place for place, token in enumerate(prompt) if token != pad), len(prompt))
    return tuple(prompt[start:])
