"""OpenRLHF 0.11.2: token rewards where its policy's tokens are.

`--reward.remote_url` knows one number for each response, and the text alone. So two parts of OpenRLHF are extended.
`TokenRewardsExecutor`, given by `--train.agent_func_path`, holds the ids when a rollout ends, and leaves the token
rewards in the rollout, in the layout of its `action_mask`: (B, S - 1), position t for the token t + 1.
`TokenRewardsExperienceMaker` puts them into returns and advantages; `install` has the trainer use it.

With the first and without the second, OpenRLHF stops at its first step: it cannot log the mean of a list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor

from ._rewards import Rewarder

__all__ = ["TOKEN_REWARDS", "Rewarder", "TokenRewardsExecutor", "experience_maker", "install"]

TOKEN_REWARDS = "token_rewards"  # noqa: S105 - a key of `extra_logs`
_BY_RETURNS = ("gae", "reinforce")


class TokenRewardsExecutor(AgentExecutorBase):
    """Lets another executor play, and rewards every token of what the policy wrote.

    What the environment wrote between the policy's turns gets nothing. A response that was cut by length is scored
    as such. Where the server fails, so does the rollout, and with it the training step.

    Args:
        rewarder: The server and the method.
        player: What generates; by default one answer to the prompt. What its environment gives is added to the reward
            of the response.
    """

    def __init__(self, rewarder: Rewarder, player: Any | None = None) -> None:
        self._rewarder = rewarder
        self._player = SingleTurnAgentExecutor() if player is None else player

    def prompt_of(self, prompt: str, label: Any, prompt_ids: list[int]) -> dict[str, Any]:  # noqa: ARG002
        """The prompt as the reward model reads it: `prompt`, `messages` or `prompt_token_ids` of a sample.

        By default what the policy has read, which is right where both have the same tokens and template. Otherwise
        override this: `{"messages": label}` with `--data.label_key` naming the dialogue, say.
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
        """A rollout of the player's, with `reward`, `scores` and `extra_logs[TOKEN_REWARDS]`.

        Raises:
            ValueError: The policy wrote nothing, or something that cannot be sent.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        output: dict[str, Any] = await self._player.execute(
            prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images
        )
        ids, turns = list(output["observation_tokens"]), output["action_ranges"]
        if not turns:
            raise ValueError("the policy wrote nothing, as its prompt left no room; there is nothing to reward")
        begin, end = turns[0][0], turns[-1][1]
        written = np.zeros(end - begin, dtype=np.int64)
        for first, stop in turns:
            written[first - begin : stop - begin] = 1
        sample = {
            **self.prompt_of(prompt, label, ids[:begin]),
            "response_token_ids": ids[begin:end],
            "response_mask": written.tolist(),
            "finished": not output["truncated"],
        }
        reward, token_rewards = await self._rewarder.reward(hf_tokenizer, sample)
        placed = np.zeros(min(len(ids), max_length) - 1, dtype=np.float32)
        placed[begin - 1 : end - 1] = token_rewards
        total = float(output["reward"] or 0.0) + reward
        logs = {**(output["extra_logs"] or {}), TOKEN_REWARDS: placed.tolist()}
        return {**output, "reward": total, "scores": total, "extra_logs": logs}


def experience_maker(alpha: float = 1.0) -> Any:
    """OpenRLHF's `RemoteExperienceMaker`, as a class that uses the token rewards of `TokenRewardsExecutor`.

    With the estimators `gae` and `reinforce`, token rewards take the place of as much reward on the last token: the
    return of a response stays what it was, with KL, length penalties and clipping as ever. With a baseline over the
    group or the batch (`rloo`, `reinforce_baseline`, `group_norm`, `dr_grpo`, `flash_reinforce`), advantages become
    `A + alpha * (r_t - mean r)`, after OpenRLHF's own normalisation.

    Args:
        alpha: The weight of token rewards in the latter.
    """
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    class TokenRewardsExperienceMaker(RemoteExperienceMaker):
        @torch.no_grad()
        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            taken = [_taken(experience) for experience in experiences]
            self._moved = {
                id(each.action_mask): _moved(rewards, each.action_mask)
                for each, rewards in zip(experiences, taken, strict=True)
            }
            made: list[Any] = super().compute_advantages_and_returns(experiences)
            if self.advantage_estimator not in _BY_RETURNS:
                for experience, rewards in zip(made, taken, strict=True):
                    experience.advantages = experience.advantages + alpha * _centred(rewards, experience.action_mask)
            return made

        def get_advantages_and_returns(
            self, values: Any, rewards: Any, action_mask: Any, gamma: float, lambd: float
        ) -> Any:
            dense = rewards + self._moved[id(action_mask)]
            return super().get_advantages_and_returns(values, dense, action_mask, gamma, lambd)

        def get_cumulative_returns(self, rewards: Any, action_mask: Any, gamma: float) -> Any:
            dense = rewards + self._moved[id(action_mask)] if self.advantage_estimator in _BY_RETURNS else rewards
            return super().get_cumulative_returns(dense, action_mask, gamma)

    return TokenRewardsExperienceMaker


def install(alpha: float = 1.0) -> None:
    """Has OpenRLHF's synchronous trainer use `experience_maker`; call it before `openrlhf.cli.train_ppo_ray` trains.

    The trainer is an actor in a process of its own, so it is the actor's class that is replaced.
    """
    import ray
    from openrlhf.trainer import ppo_trainer

    plain = ppo_trainer.PPOTrainer.__ray_metadata__.modified_class

    class PPOTrainer(plain):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.experience_maker.__class__ = experience_maker(alpha)

    ppo_trainer.PPOTrainer = ray.remote(PPOTrainer)


def _taken(experience: Any) -> torch.Tensor:
    """An experience's token rewards, float32 (B, S - 1); taken out, since OpenRLHF would log them."""
    rewards = experience.info.pop(TOKEN_REWARDS, None)
    if rewards is None:
        raise ValueError("a rollout has no token rewards; generate with TokenRewardsExecutor (--train.agent_func_path)")
    if rewards.shape != experience.action_mask.shape:
        raise ValueError(
            f"token rewards are {tuple(rewards.shape)}, the action mask is {tuple(experience.action_mask.shape)}"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError("token rewards are not finite")
    return torch.as_tensor(rewards, dtype=torch.float32)


def _moved(rewards: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """What turns the reward of a response, on its last token, into token rewards: each row sums to 0."""
    kept = action_mask.bool()
    dense = torch.where(kept, rewards, 0.0)
    last = kept.size(1) - 1 - kept.long().flip(1).argmax(dim=1, keepdim=True)
    return dense.scatter_add(1, last, -dense.sum(dim=1, keepdim=True))


def _centred(rewards: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """`r_t - mean r` over the policy's own tokens, 0 elsewhere."""
    kept = action_mask.bool()
    means = torch.where(kept, rewards, 0.0).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(kept, rewards - means, 0.0)
