"""verl 0.9.1: token rewards from its agent loops, or one reward a response from its reward loop.

`SingleTurnTokenRewards` and `ToolTokenRewards` are verl's own agent loops that ask for token rewards when a rollout
ends: they know the ids, the tools' tokens and the dialogue. What they return holds `rm_scores`, one for each token of
the response, which verl pads and takes for `token_level_scores`. GAE and REINFORCE++ use each of them; GRPO adds them
up, without a mask, so tokens of tools hold 0.

`RewardManager` gives one number, for runs whose agent loops must stay as they are.

A server that fails is an exception. verl's trainer logs it and goes on without the prompt, and never trains on a
reward of zero in its place, unless a reward function is called through verl's own manager `rate_limited`, which
makes every exception a zero: do not ask a reward server through that one.
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
        """As a mapping of what verl trains on, `rm_scores` among it."""
        output: dict[str, Any] = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("token_rewards"), dtype=torch.float32)
        return output


class _TokenRewards:
    """What an agent loop of verl's gets before its own name, to give token rewards.

    The arguments stand beside `_target_` in the file that `actor_rollout_ref.rollout.agent.agent_loop_config_path`
    names.

    Args:
        base_url: Where the server listens.
        method: Which token rewards, by name or with parameters.
        model: One of the server's, its first by default; several answer as an ensemble.
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
        """The agent loop's own output, with a reward on each token.

        Raises:
            ValueError: The response cannot be sent, or the agent loop gave several outputs.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        output = await super().run(sampling_params, **sample)  # type: ignore[misc]
        if not isinstance(output, AgentLoopOutput):
            raise ValueError("token rewards are for agent loops that give one output for each rollout")
        reward, token_rewards = await self._rewarder.reward(
            self.tokenizer,  # type: ignore[attr-defined]
            {
                "messages": [dict(message) for message in sample["raw_prompt"]],
                "response_token_ids": list(output.response_ids),
                "response_mask": list(output.response_mask),
            },
        )
        given = {name: getattr(output, name) for name in output.model_fields_set}
        given |= {"reward_score": reward, "token_rewards": token_rewards.tolist()}
        return TokenRewardsOutput.model_construct(_fields_set=set(given), **given)


class SingleTurnTokenRewards(_TokenRewards, SingleTurnAgentLoop):
    """verl's `single_turn_agent`, with token rewards."""


class ToolTokenRewards(_TokenRewards, ToolAgentLoop):
    """verl's `tool_agent`, with token rewards; what tools wrote gets none. All turns are read as one response."""


class RewardManager(RewardManagerBase):
    """One reward for each response: `reward.reward_manager` with `source=importlib` and this file's name.

    `+reward.reward_kwargs.densereward.base_url=http://HOST:PORT` says where the server listens; `method`, `model`,
    `api_key` and `eos_token_ids` may stand beside it. verl does not tell a manager which tokens are the tools'.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,  # noqa: ARG002 - verl passes them to all managers
        reward_model_tokenizer: Any = None,  # noqa: ARG002
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        kwargs = config.reward.get("reward_kwargs") or {}
        if "densereward" not in kwargs:
            raise ValueError("say where the server listens: +reward.reward_kwargs.densereward.base_url=http://...")
        self._rewarder = _rewarder(**kwargs["densereward"])

    async def run_single(self, data: Any) -> dict[str, Any]:
        """`reward_score` of the last sequence; `reward_extra_info` holds nothing that verl would have to average.

        Raises:
            ValueError: The response cannot be sent.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        item = data[-1:][0]
        sample = {
            "messages": [dict(message) for message in item.non_tensor_batch["raw_prompt"]],
            "response_token_ids": _response_ids(item),
        }
        reward, _ = await self._rewarder.reward(self.tokenizer, sample)
        return {"reward_score": reward, "reward_extra_info": {}}


def _response_ids(item: Any) -> list[int]:
    """The response without its padding, of which the mask tells only where all rows have prompts of one length."""
    ids = item.batch["responses"]
    count = item.non_tensor_batch.get("response_len")
    if count is None:
        count = item.batch["attention_mask"][-len(ids) :].sum()
    return [int(each) for each in ids[: int(count)]]


_rewarders: dict[str, Rewarder] = {}


def _rewarder(
    base_url: str,
    method: Method = "red",
    model: str | Sequence[str] | None = None,
    api_key: str | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> Rewarder:
    """One for each server and process: verl makes a new agent loop for every rollout."""
    model = model if model is None or isinstance(model, str) else list(model)
    ends = None if eos_token_ids is None else list(eos_token_ids)
    asked = as_method(method).model_dump(exclude_none=True)
    key = json.dumps([base_url, asked, model, api_key, ends])
    if key not in _rewarders:
        _rewarders[key] = Rewarder(base_url, asked, model=model, eos_token_ids=ends, api_key=api_key)
    return _rewarders[key]
