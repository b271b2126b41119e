"""OpenRLHF 0.11.2: a reward for every token of its policy.

`--reward.remote_url` gets only the text, and returns one number per response. So two parts of OpenRLHF are extended.
`TokenRewardsExecutor`, given by `--train.agent_func_path`, has the ids when a rollout ends. It stores the token rewards
in the rollout, in the layout of `action_mask`: (B, S - 1), position t for token t + 1. `TokenRewardsExperienceMaker`
puts them into returns and advantages; `install` makes the trainer use it.

With the first but not the second, OpenRLHF stops at its first step: it cannot log the mean of a list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor

from ._rewards import Rewarder, centred

__all__ = ["TOKEN_REWARDS", "Rewarder", "TokenRewardsExecutor", "experience_maker", "install"]

TOKEN_REWARDS = "token_rewards"  # noqa: S105 - a key of `extra_logs`
_FROM_RETURNS = ("gae", "reinforce")  # estimators that compute advantages from the returns of tokens


class TokenRewardsExecutor(AgentExecutorBase):
    """Has another executor generate, and rewards every token that the policy wrote.

    What the environment wrote between the policy's turns gets no reward. A response that was cut by length is scored as
    cut. If the server fails, the rollout fails, and with it the training step.

    Args:
        rewarder: The server and the method.
        player: The executor that generates; by default a single turn. A reward of its environment is added to the
            response's.
    """

    def __init__(self, rewarder: Rewarder, player: Any | None = None) -> None:
        self._rewarder = rewarder
        self._player = SingleTurnAgentExecutor() if player is None else player

    def prompt_of(self, prompt: str, label: Any, prompt_ids: list[int]) -> dict[str, Any]:  # noqa: ARG002
        """The prompt as the reward model reads it: `prompt`, `messages` or `prompt_token_ids` of a sample.

        By default the policy's ids, which is right if both have the same tokens and template. Otherwise override it,
        for example with `{"messages": label}` if `--data.label_key` names the messages.
        """
        return {"prompt_token_ids": prompt_ids}

    async def execute(
        self,
        prompt: str,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """The player's rollout, with `reward`, `scores` and `extra_logs[TOKEN_REWARDS]`.

        Raises:
            ValueError: The policy wrote nothing, or the response cannot be sent.
            DenseRewardError: One of its subclasses, by what went wrong.
        """
        output: dict[str, Any] = await self._player.execute(
            prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images
        )
        ids, turns = list(output["observation_tokens"]), output["action_ranges"]
        if not turns:
            raise ValueError("the policy wrote nothing, because its prompt left no room; there is nothing to reward")
        begin, end = turns[0][0], turns[-1][1]
        written = np.zeros(end - begin, dtype=np.int64)
        for start, stop in turns:
            written[start - begin : stop - begin] = 1
        sample = {
            **self.prompt_of(prompt, label, ids[:begin]),
            "response_token_ids": ids[begin:end],
            "response_mask": written.tolist(),
            "finished": not output["truncated"],
        }
        reward, token_rewards = await self._rewarder.reward(hf_tokenizer, sample)
        row = np.zeros(min(len(ids), max_length) - 1, dtype=np.float32)
        row[begin - 1 : end - 1] = token_rewards
        total = float(output["reward"] or 0.0) + reward
        logs = {**(output["extra_logs"] or {}), TOKEN_REWARDS: row.tolist()}
        return {**output, "reward": total, "scores": total, "extra_logs": logs}


def experience_maker(alpha: float = 1.0) -> Any:
    """A subclass of OpenRLHF's `RemoteExperienceMaker` that uses the token rewards of `TokenRewardsExecutor`.

    With the estimators `gae` and `reinforce`, the reward on the last token is distributed over the tokens. The return
    of a response stays the same, as do KL, length penalties and clipping. With a baseline over the group or the batch
    (`rloo`, `reinforce_baseline`, `group_norm`, `dr_grpo`, `flash_reinforce`), advantages become
    `A + alpha * (r_t - mean r)`, after OpenRLHF's own normalisation.

    Args:
        alpha: The weight of token rewards with such a baseline.
    """
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    class TokenRewardsExperienceMaker(RemoteExperienceMaker):
        @torch.no_grad()
        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            token_rewards = [_take_token_rewards(experience) for experience in experiences]
            self._redistribution = {
                id(each.action_mask): _redistribution(rewards, each.action_mask)
                for each, rewards in zip(experiences, token_rewards, strict=True)
            }
            made: list[Any] = super().compute_advantages_and_returns(experiences)
            if self.advantage_estimator not in _FROM_RETURNS:
                for experience, rewards in zip(made, token_rewards, strict=True):
                    experience.advantages = experience.advantages + alpha * centred(rewards, experience.action_mask)
            return made

        def get_advantages_and_returns(
            self, values: Any, rewards: Any, action_mask: Any, gamma: float, lambd: float
        ) -> Any:
            dense = rewards + self._redistribution[id(action_mask)]
            return super().get_advantages_and_returns(values, dense, action_mask, gamma, lambd)

        def get_cumulative_returns(self, rewards: Any, action_mask: Any, gamma: float) -> Any:
            dense = (
                rewards + self._redistribution[id(action_mask)]
                if self.advantage_estimator in _FROM_RETURNS
                else rewards
            )
            return super().get_cumulative_returns(dense, action_mask, gamma)

    return TokenRewardsExperienceMaker


def install(alpha: float = 1.0) -> None:
    """Makes OpenRLHF's synchronous trainer use `experience_maker`; call it before `openrlhf.cli.train_ppo_ray` runs.

    The trainer is an actor in another process, so the actor's class is replaced.
    """
    import ray
    from openrlhf.trainer import ppo_trainer

    original = ppo_trainer.PPOTrainer.__ray_metadata__.modified_class

    class PPOTrainer(original):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.experience_maker.__class__ = experience_maker(alpha)

    ppo_trainer.PPOTrainer = ray.remote(PPOTrainer)


def _take_token_rewards(experience: Any) -> torch.Tensor:
    """An experience's token rewards, float32 (B, S - 1); removed from it, or OpenRLHF would log them."""
    rewards = experience.info.pop(TOKEN_REWARDS, None)
    if rewards is None:
        raise ValueError("a rollout has no token rewards; generate with TokenRewardsExecutor (--train.agent_func_path)")
    if rewards.shape != experience.action_mask.shape:
        raise ValueError(
            f"token rewards are {tuple(rewards.shape)}, but the action mask is {tuple(experience.action_mask.shape)}"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError("token rewards are not finite")
    return torch.as_tensor(rewards, dtype=torch.float32)


def _redistribution(rewards: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """What to add to a reward on the last token to make it token rewards; each row sums to 0."""
    kept = action_mask.bool()
    dense = torch.where(kept, rewards, 0.0)
    last = kept.size(1) - 1 - kept.long().flip(1).argmax(dim=1, keepdim=True)
    return dense.scatter_add(1, last, -dense.sum(dim=1, keepdim=True))
