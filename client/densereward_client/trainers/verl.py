"""verl 0.9.1: token rewards from its agent loops, or one reward per response from its reward loop.

`SingleTurnTokenRewards` and `ToolTokenRewards` are verl's own agent loops, which get token rewards when a rollout ends:
they know the ids, the tools' tokens and the messages. Their output has `rm_scores`, one per token of the response,
which verl pads and uses as `token_level_scores`. GAE and REINFORCE++ use each score. GRPO sums them without a mask, so
tokens of tools have 0.

`RewardManager` gives one number per response, for runs whose agent loops must not change.

If the server fails, the rollout raises. verl's trainer logs that and goes on without the prompt; it never trains on a
reward of zero instead. The exception is verl's own manager `rate_limited`, which turns every error of a reward function
into a zero: do not call a reward server through it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from ._rewards import Method, Rewarder, as_method

__all__ = ["RewardManager", "SingleTurnTokenRewards", "TokenRewardsOutput", "ToolTokenRewards"]


class TokenRewardsOutput(AgentLoopOutput):
    """An agent loop's output with a reward for each of `response_ids`."""

    token_rewards: list[float]

    def as_dict(self) -> dict[str, Any]:
        """What verl trains on, with `rm_scores`, float32[T]."""
        output: dict[str, Any] = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("token_rewards"), dtype=torch.float32)
        return output


class _TokenRewards:
    """A mixin that gives token rewards to an agent loop of verl's.

    Its arguments are written next to `_target_` in the file that
    `actor_rollout_ref.rollout.agent.agent_loop_config_path` names.

    Args:
        base_url: Where the server listens.
        method: Which token rewards, by name or with parameters.
        model: One of the server's, by default the first; several form an ensemble.
        api_key: The server's, if it has one.
        eos_token_ids: What ends the policy's responses; by default its tokenizer's EOS.
    """

    def __init__(
        self,
        *args: Any,
        base_url: str,
        method: Method = "red",
        model: str | Sequence[str] | None = None,
        api_key: str | None = None,
        eos_token_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if not self.config.trainer.use_v1:  # type: ignore[attr-defined]
            raise ValueError("verl's old trainer puts one reward on the last token; train with trainer.use_v1=True")
        self._rewarder = _rewarder(base_url, method, model, api_key, eos_token_ids)

    async def run(self, sampling_params: dict[str, Any], **sample: Any) -> Any:
        """The agent loop's own output, with a reward for each token.

        Raises:
            ValueError: The response cannot be sent, or the agent loop returned several outputs.
            DenseRewardError: One of its subclasses, by what went wrong.
        """
        output = await super().run(sampling_params, **sample)  # type: ignore[misc]
        if not isinstance(output, AgentLoopOutput):
            raise ValueError("token rewards need an agent loop that returns one output per rollout")
        reward, token_rewards = await self._rewarder.reward(
            self.tokenizer,  # type: ignore[attr-defined]
            {
                "messages": [dict(message) for message in sample["raw_prompt"]],
                "response_token_ids": list(output.response_ids),
                "response_mask": list(output.response_mask),
            },
        )
        fields = {name: getattr(output, name) for name in output.model_fields_set}
        fields |= {"reward_score": reward, "token_rewards": token_rewards.tolist()}
        return TokenRewardsOutput.model_construct(_fields_set=set(fields), **fields)


class SingleTurnTokenRewards(_TokenRewards, SingleTurnAgentLoop):
    """verl's `single_turn_agent`, with token rewards."""


class ToolTokenRewards(_TokenRewards, ToolAgentLoop):
    """verl's `tool_agent`, with token rewards, 0 for what tools wrote. All turns are scored as one response."""


class RewardManager(RewardManagerBase):
    """One reward per response: `reward.reward_manager` with `source=importlib` and this file's name.

    `+reward.reward_kwargs.densereward.base_url=http://HOST:PORT` is the server's address; `method`, `model`, `api_key`
    and `eos_token_ids` can be set in the same way. verl does not tell a manager which tokens are the tools'.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,  # noqa: ARG002 - verl passes these to every manager
        reward_model_tokenizer: Any = None,  # noqa: ARG002
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        kwargs = config.reward.get("reward_kwargs") or {}
        if "densereward" not in kwargs:
            raise ValueError("give the server's address: +reward.reward_kwargs.densereward.base_url=http://...")
        self._rewarder = _rewarder(**kwargs["densereward"])

    async def run_single(self, data: Any) -> dict[str, Any]:
        """`reward_score` of the last sequence; `reward_extra_info` is empty, as verl would average its entries.

        Raises:
            ValueError: The response cannot be sent.
            DenseRewardError: One of its subclasses, by what went wrong.
        """
        item = data[-1:][0]
        sample = {
            "messages": [dict(message) for message in item.non_tensor_batch["raw_prompt"]],
            "response_token_ids": _response_ids(item),
        }
        reward, _ = await self._rewarder.reward(self.tokenizer, sample)
        return {"reward_score": reward, "reward_extra_info": {}}


def _response_ids(item: Any) -> list[int]:
    """The response without padding; the mask gives its length only if all prompts are padded to one length."""
    ids = item.batch["responses"]
    count = item.non_tensor_batch.get("response_len")
    if count is None:
        count = item.batch["attention_mask"][-len(ids) :].sum()
    return [int(token) for token in ids[: int(count)]]


_rewarders: dict[str, Rewarder] = {}


def _rewarder(
    base_url: str,
    method: Method = "red",
    model: str | Sequence[str] | None = None,
    api_key: str | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> Rewarder:
    """One per process and arguments, since verl makes a new agent loop for every rollout."""
    model = model if model is None or isinstance(model, str) else list(model)
    eos = None if eos_token_ids is None else list(eos_token_ids)
    request = as_method(method).model_dump(exclude_none=True)
    key = json.dumps([base_url, request, model, api_key, eos])
    if key not in _rewarders:
        _rewarders[key] = Rewarder(base_url, request, model=model, eos_token_ids=eos, api_key=api_key)
    return _rewarders[key]
