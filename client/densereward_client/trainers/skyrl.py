"""SkyRL 0.4.0: token rewards as `GeneratorOutput.rewards`, list[list[float]], which its trainer uses unchanged.

Nothing of SkyRL is imported, since its outputs are plain mappings of lists. Subclass its generator:

```python
class Generator(SkyRLGymGenerator):
    async def generate(self, input_batch, disable_tqdm=False):
        output = await super().generate(input_batch, disable_tqdm)
        return await with_token_rewards(output, input_batch["prompts"], policy, "red")
```

SkyRL's GAE uses each reward. Its GRPO sums them without a mask, so the environment's tokens have 0. Its metric
`pass_at_n` uses the last token's reward alone, so it means nothing here. A failure of the server is an exception that
ends the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._bound_client import AsyncBoundClient
from ..wire import TokenRewardsResponse
from ._rewards import Method, as_method, rewarded

__all__ = ["samples_of", "token_rewards_of", "with_token_rewards"]

_Dialogue = Sequence[Mapping[str, Any]]


async def with_token_rewards(
    output: Mapping[str, Any], prompts: Sequence[_Dialogue], policy: AsyncBoundClient, method: Method = "red"
) -> dict[str, Any]:
    """A generator's output with token rewards from the server, by one call for the whole output.

    The environment's own rewards are added at their tokens; one number per response is added on the last token.

    Args:
        output: SkyRL's `GeneratorOutput`.
        prompts: `GeneratorInput["prompts"]`, the messages, in the same order.
        policy: The server, bound to the policy's tokenizer.
        method: Which token rewards, by name or with parameters.

    Raises:
        ValueError: The output is step-wise, its lists are not as long as the prompts, or the request is wrong.
        DenseRewardError: One of its subclasses, by what went wrong.
    """
    request = as_method(method)
    answer = await policy.token_rewards(samples_of(output, prompts), methods=[request])
    return {**output, "rewards": token_rewards_of(answer, request.key, output)}


def samples_of(output: Mapping[str, Any], prompts: Sequence[_Dialogue]) -> list[dict[str, Any]]:
    """The samples to send: `loss_masks` say what the environment wrote, `stop_reasons` what was cut by length.

    Raises:
        ValueError: The output is step-wise, or its lists are not as long as the prompts.
    """
    if output.get("is_last_step") is not None:
        raise ValueError("each step of a trajectory is a separate row here: turn step_wise_trajectories off")
    ids, masks, reasons = output["response_ids"], output["loss_masks"], output.get("stop_reasons")
    if not len(prompts) == len(ids) == len(masks) == len(ids if reasons is None else reasons):
        raise ValueError(f"{len(ids)} responses, {len(masks)} masks and {len(prompts)} prompts do not belong together")
    samples = [
        {"messages": [dict(turn) for turn in prompt], "response_token_ids": list(row), "response_mask": list(mask)}
        for prompt, row, mask in zip(prompts, ids, masks, strict=True)
    ]
    for sample, reason in zip(samples, reasons or [], strict=reasons is not None):
        sample["finished"] = reason == "stop"
    return samples


def token_rewards_of(answer: TokenRewardsResponse, method: str, output: Mapping[str, Any]) -> list[list[float]]:
    """`GeneratorOutput.rewards`: each row has its response's length, and sums to the server's and environment's reward.

    Args:
        answer: The answer to `samples_of(output, ...)`.
        method: The key of the token rewards in it.
        output: SkyRL's `GeneratorOutput`.

    Raises:
        ValueError: A response was not served, or the policy wrote none of its tokens.
    """
    rows = []
    for item, mask, own in zip(answer.data, output["loss_masks"], output["rewards"], strict=True):
        row = rewarded(item, method, mask).token_rewards.astype(np.float64)
        if isinstance(own, list):
            row += np.asarray(own, dtype=np.float64)
        else:
            row[-1] += own
        rows.append(row.tolist())
    return rows
