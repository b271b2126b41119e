"""TRL's experimental `PPOTrainer` with a reward for every token; for TRL 1.12.0, the last version that has it.

```python
policy = client.bind(tokenizer)
trainer = DensePPOTrainer(policy, method="red", args=config, processing_class=tokenizer, model=..., ref_model=...,
                          value_model=..., train_dataset=dataset)
```

That trainer is one long function without a place for token rewards. So it is compiled from TRL's own source with one
line replaced. The version is checked, and that the line is there.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
import trl
from torch import nn

from .._bound_client import BoundClient
from .._call import Truncate
from ._rewards import Method
from ._trl import Row, Scorer, padded, prompt_of, rollouts, unpadded

_TRL_VERSION = "1.12.0"
if trl.__version__ != _TRL_VERSION:
    raise ImportError(
        f"this adapter rewrites a line of TRL {_TRL_VERSION}; there is TRL {trl.__version__}, whose may differ"
    )

from trl.experimental.ppo import PPOTrainer  # noqa: E402  (other versions may lack it)
from trl.experimental.utils import get_reward  # noqa: E402

__all__ = ["DensePPOTrainer", "RemoteReward"]

_OLD_LINE = "rewards[actual_start, actual_end] += scores"
_NEW_LINE = "self._add_rewards(rewards, actual_start, actual_end, scores)"


class RemoteReward(nn.Module):
    """Takes the place of the trainer's reward model, and calls the server instead.

    Args:
        scorer: The server, bound to the policy's tokenizer, and the method.
        prompts: The text or messages of each prompt, by its ids; if empty, prompts are sent as ids.
        stop_token_id: A token that ends a response, in addition to the EOS.
    """

    def __init__(
        self, scorer: Scorer, prompts: Mapping[tuple[int, ...], dict[str, Any]], stop_token_id: int | None
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._prompts = prompts
        self._stop_token_id = stop_token_id
        self._scores: list[float] = []
        self._token_rewards: list[Row] = []

    def score(self, query_responses: torch.Tensor, pad_token_id: int, context_length: int) -> torch.Tensor:
        """The reward of each response, [B]; the rewards of its tokens are kept for `taken`.

        Raises:
            ValueError: A prompt is not one of the data set's, or cannot be sent.
            DenseRewardError: One of its subclasses, by what went wrong.
        """
        eos = self._scorer.bound.binding.eos_token_ids
        scored = rollouts(query_responses.tolist(), context_length, pad_token_id, eos)
        scores, token_rewards = self._scorer([self._sample(prompt, response) for prompt, response in scored])
        self._scores += scores
        self._token_rewards += token_rewards
        return torch.tensor(scores, dtype=torch.float32, device=query_responses.device)

    def taken(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards [B] and token rewards [B, T] of all responses since the last call.

        Raises:
            RuntimeError: `like`, [B, T], has another number of rows.
        """
        scores, rows = self._scores, self._token_rewards
        self.forget()
        if len(rows) != len(like):
            raise RuntimeError(f"{len(rows)} responses were scored for {len(like)} rows of rewards")
        return torch.tensor(scores, dtype=torch.float32, device=like.device), padded(rows, like)

    def forget(self) -> None:
        """Drops what was scored since the last call of `taken`."""
        self._scores, self._token_rewards = [], []

    def _sample(self, prompt: tuple[int, ...], response: list[int]) -> dict[str, Any]:
        sample: dict[str, Any] = {"response_token_ids": response}
        if response and response[-1] == self._stop_token_id:
            sample["finished"] = True
        if not self._prompts:
            return sample | {"prompt_token_ids": list(prompt)}
        if prompt not in self._prompts:
            raise ValueError(f"a prompt of {len(prompt)} ids is not in the data set; were its ids changed?")
        return sample | self._prompts[prompt]


def _get_reward(model: Any, query_responses: torch.Tensor, pad_token_id: int, context_length: int) -> Any:
    """TRL's `get_reward`, which the value model still needs; for rewards, the server's answer."""
    if isinstance(model, RemoteReward):
        return None, model.score(query_responses, pad_token_id, context_length), None
    return get_reward(model, query_responses, pad_token_id, context_length)


def _recompiled(function: Callable[..., Any], old: str = "", new: str = "") -> Any:
    """A function of TRL's that calls `_get_reward`, with one line replaced; line numbers stay the same."""
    source = textwrap.dedent(inspect.getsource(function))
    if old and source.count(old) != 1:
        raise ImportError(f"{function.__qualname__} of TRL {trl.__version__} has no single line {old!r}")
    tree = ast.parse(source.replace(old, new) if old else source)
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    names = {**function.__globals__, "get_reward": _get_reward}
    exec(compile(tree, function.__code__.co_filename, "exec", dont_inherit=True), names)  # noqa: S102  (TRL's own)
    return names[function.__name__]


class DensePPOTrainer(PPOTrainer):
    """A `PPOTrainer` that adds a reward at each token of a response, before advantages are estimated.

    Token t of a response gets its reward in column t. TRL puts the response's reward at one position at the end; here
    only what `missing_eos_penalty` subtracts is put there. What a method's sum leaves out, its `baseline`, is left out:
    for `red` it is the prompt's score, which is the same for every response to the prompt. `{"name": "red",
    "first_token": "fold"}` keeps it. Logged scores are the model's.

    Give the data set a column `prompt`, text or messages, in addition to `input_ids`: the reward model reads it.
    Without it, prompts are sent as the policy's ids.

    Args:
        bound: From `client.bind(tokenizer)`, with the policy's tokenizer.
        method: How tokens are rewarded: a name, or a mapping with parameters.
        truncate: "prompt_left" shortens prompts that are too long; by default they are refused.
        kwargs: The arguments of `PPOTrainer`, by name, without `reward_model`.

    Raises:
        ValueError: Prompts that cannot be sent.
    """

    def __init__(
        self, bound: BoundClient, *, method: Method = "red", truncate: Truncate | None = None, **kwargs: Any
    ) -> None:
        pad = kwargs["processing_class"].pad_token_id
        prompts: dict[tuple[int, ...], dict[str, Any]] = {}
        for name in ("train_dataset", "eval_dataset"):
            dataset = kwargs.get(name)
            if dataset is not None and "prompt" in dataset.column_names:
                ids = (unpadded(list(map(int, each)), pad) for each in dataset["input_ids"])
                prompts |= zip(ids, map(prompt_of, dataset["prompt"]), strict=True)
                # The collator pads every column, and text cannot be padded.
                kwargs[name] = dataset.remove_columns("prompt")
        args = kwargs["args"]
        stop = kwargs["processing_class"].eos_token_id if args.stop_token == "eos" else args.stop_token_id  # noqa: S105
        self._remote = RemoteReward(Scorer(bound, method, truncate=truncate), prompts, stop)
        super().__init__(reward_model=self._remote, **kwargs)

    def _add_rewards(self, rewards: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, scores: torch.Tensor) -> None:
        """Adds token rewards at their tokens, and at `ends` what TRL changed in the scores since (a penalty)."""
        original, token_rewards = self._remote.taken(like=rewards)
        rewards += token_rewards
        rewards[rows, ends] += scores - original

    train = _recompiled(PPOTrainer.train, _OLD_LINE, _NEW_LINE)
    _trl_generate_completions = _recompiled(PPOTrainer.generate_completions)

    def generate_completions(self, sampling: bool = False) -> None:
        """As `PPOTrainer.generate_completions`; nothing is learned from these responses."""
        self._trl_generate_completions(sampling)
        self._remote.forget()
