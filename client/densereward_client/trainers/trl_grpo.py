"""TRL's `GRPOTrainer` with a reward for every token; tested with TRL 1.16.0.

```python
policy = client.bind(tokenizer)
trainer = DenseGRPOTrainer(model, TokenReward(policy, "red"), alpha=1.0, args=config, train_dataset=dataset)
```

For rewards of whole completions, give `TokenReward` to TRL's own `GRPOTrainer` or `RLOOTrainer`. RLOO's loss takes no
token advantages, so there is no dense trainer for it.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import trl
from trl import GRPOTrainer

from ._trl import AsyncTokenReward, Row, TokenReward, dense_advantages, padded

__all__ = ["AsyncTokenReward", "DenseGRPOTrainer", "TokenReward"]

_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo")


class DenseGRPOTrainer(GRPOTrainer):
    """A `GRPOTrainer` whose advantage of token t is A + alpha (r_t - mean r), with A the completion's own.

    The rewards r come from its `TokenReward`s, weighted by `reward_weights`; other reward functions affect A alone. The
    mean is over the tokens that the loss counts, so token rewards move credit within a completion and add none. Tokens
    of tools (`tool_mask`) get nothing, though the reward model reads them, and so do completions that
    `mask_truncated_completions` leaves out. Token rewards are on the reward model's scale, while A is divided by the
    group's standard deviation: choose alpha accordingly, or use `{"name": "red", "normalize": "running"}`.

    Args:
        args: The arguments of `GRPOTrainer`.
        alpha: The weight of token rewards.
        kwargs: The arguments of `GRPOTrainer`.

    Raises:
        ValueError: No reward function is a `TokenReward`, one was bound without an EOS that the trainer uses, or the
            configuration has a loss that takes no token advantages.
        ImportError: This version of TRL has no loss that takes token advantages.
    """

    def __init__(self, *args: Any, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = alpha
        self._tool_mask: list[list[int]] | None = None
        self._token_rewards: list[Row] | None = None
        _check_loss(self.args)
        if not self._dense():
            raise ValueError("no reward function is a TokenReward: there are no token rewards to learn from")
        for _, function in self._dense():
            known = function.scorer.bound.binding.eos_token_ids
            if missing := set(self.eos_token_ids) - known:
                raise ValueError(
                    f"completions also end with {sorted(missing)}, which the client does not know: "
                    f"bind(tokenizer, eos_token_ids={self.eos_token_ids})"
                )

    def _dense(self) -> list[tuple[float, TokenReward | AsyncTokenReward]]:
        """The weights and reward functions that reward tokens."""
        pairs = zip(self.reward_weights.tolist(), self.reward_funcs, strict=True)
        return [(weight, each) for weight, each in pairs if isinstance(each, (TokenReward, AsyncTokenReward))]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        generated: tuple[Any, ...] = super()._generate(prompts)
        self._tool_mask = generated[2]
        return generated

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: Any
    ) -> torch.Tensor:
        if self._tool_mask is not None:
            masks = zip(inputs, self._tool_mask, strict=True)
            inputs = [each | {"response_mask": mask} for each, mask in masks]
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weighted = [(weight, _take_token_rewards(function)) for weight, function in self._dense()]
        self._token_rewards = [
            np.sum([weight * rows[index] for weight, rows in weighted], axis=0, dtype=np.float32)
            for index in range(len(prompts))
        ]
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        if ("tool_mask" in output) != (self._tool_mask is not None):
            raise RuntimeError(f"TRL {trl.__version__} made its tool mask in a way that this adapter does not know")
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        advantages = output["advantages"]
        output["advantages"] = dense_advantages(advantages, self._take_padded(mask, advantages.dtype), mask, self.alpha)
        return output

    def _take_padded(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The token rewards of the latest call, [B, T] as the completions, which are padded on the right."""
        rows, self._token_rewards = self._token_rewards, None
        if rows is None or len(rows) != len(mask):
            raise RuntimeError(f"TRL {trl.__version__} scored its completions in a way that this adapter does not know")
        return padded(rows, like=mask.to(dtype))


def _take_token_rewards(function: TokenReward | AsyncTokenReward) -> list[Row]:
    """The token rewards of a function's latest call; each call's can be taken once."""
    rows, function.token_rewards = function.token_rewards, None
    if rows is None:
        raise RuntimeError(f"{function.__name__} was not called in this step")
    return rows


def _check_loss(args: Any) -> None:
    """Raises unless the configured loss takes token advantages."""
    if "advantages.dim() == 1" not in inspect.getsource(GRPOTrainer._compute_loss):
        raise ImportError(
            f"the loss of TRL {trl.__version__} is not known to take token advantages; that of 1.16.0 does"
        )
    if args.loss_type not in _LOSSES:
        raise ValueError(
            f"loss_type {args.loss_type!r} takes one advantage per completion; use one of {', '.join(_LOSSES)}"
        )
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level {args.importance_sampling_level!r} weighs all tokens of a completion equally, "
            "so their rewards cancel out; use 'token'"
        )
    if args.off_policy_mask_threshold is not None:
        raise ValueError(
            "off_policy_mask_threshold drops completions by the sign of their single advantage; leave it out"
        )
