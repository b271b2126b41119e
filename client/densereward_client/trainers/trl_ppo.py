"""TRL's experimental `PPOTrainer` with a reward for every token; for TRL 1.12.0, the last version that has it.

```python
policy = client.bind(tokenizer)
trainer = DensePPOTrainer(policy, method="red", args=config, processing_class=tokenizer, model=..., ref_model=...,
                          value_model=..., train_dataset=dataset)
```

That trainer is one long function without a place for token rewards. Here it is compiled anew from TRL's own source with
one line replaced; so the version is checked, and the line has to be there.
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
from ._trl import Method, Row, Scorer, prompt_of, rollouts, unpadded

TRIED = "1.12.0"
if trl.__version__ != TRIED:
    raise ImportError(f"this adapter rewrites a line of TRL {TRIED}; there is TRL {trl.__version__}, whose may differ")

from trl.experimental.ppo import PPOTrainer  # noqa: E402  (only that version is sure to have it)
from trl.experimental.utils import get_reward  # noqa: E402

__all__ = ["DensePPOTrainer", "RemoteReward"]

_SCORES_ADDED = "rewards[actual_start, actual_end] += scores"
_TOKENS_ADDED = "self._add_rewards(rewards, actual_start, actual_end, scores)"


class RemoteReward(nn.Module):
    """Stands where the trainer keeps its reward model, and asks the server instead.

    Args:
        scorer: The server, bound to the policy's tokenizer, and the method.
        prompts: What each prompt was made of, by its ids; where it is empty, prompts are sent as ids.
        stop_token_id: What ends a response beside the EOS.
    """

    def __init__(
        self, scorer: Scorer, prompts: Mapping[tuple[int, ...], dict[str, Any]], stop_token_id: int | None
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._prompts = prompts
        self._stop = stop_token_id
        self._scores: list[float] = []
        self._token_rewards: list[Row] = []

    def score(self, query_responses: torch.Tensor, pad_token_id: int, context_length: int) -> torch.Tensor:
        """The reward of each response; those of its tokens are kept for `taken`.

        Raises:
            ValueError: A prompt is not one of the data set's, or cannot be sent.
            DenseRewardError: One of its kinds, by what went wrong.
        """
        eos = self._scorer.bound.binding.eos_token_ids
        pairs = rollouts(query_responses.tolist(), context_length, pad_token_id, eos)
        scores, token_rewards = self._scorer([self._sample(prompt, response) for prompt, response in pairs])
        self._scores += scores
        self._token_rewards += token_rewards
        return torch.tensor(scores, dtype=torch.float32, device=query_responses.device)

    def taken(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards [B] and token rewards [B, T] of all responses since they were last taken.

        Raises:
            RuntimeError: There are more or fewer than rows in `like`.
        """
        scores, rows = self._scores, self._token_rewards
        self.forget()
        if len(rows) != len(like):
            raise RuntimeError(f"{len(rows)} responses were scored for {len(like)} rows of rewards")
        padded = torch.zeros_like(like)
        for row, rewards in zip(padded, rows, strict=True):
            row[: len(rewards)] = torch.from_numpy(rewards)
        return torch.tensor(scores, dtype=torch.float32, device=like.device), padded

    def forget(self) -> None:
        """Drops what was scored since the token rewards were last taken."""
        self._scores, self._token_rewards = [], []

    def _sample(self, prompt: tuple[int, ...], response: list[int]) -> dict[str, Any]:
        sample: dict[str, Any] = {"response_token_ids": response}
        if response and response[-1] == self._stop:
            sample["finished"] = True
        if not self._prompts:
            return sample | {"prompt_token_ids": list(prompt)}
        if prompt not in self._prompts:
            raise ValueError(f"a prompt of {len(prompt)} ids is not one of the data set's; were its ids changed?")
        return sample | self._prompts[prompt]


def _get_reward(model: Any, query_responses: torch.Tensor, pad_token_id: int, context_length: int) -> Any:
    """TRL's `get_reward`, which the value model needs as well, and the server's answer for the rewards."""
    if isinstance(model, RemoteReward):
        return None, model.score(query_responses, pad_token_id, context_length), None
    return get_reward(model, query_responses, pad_token_id, context_length)


def _rebuilt(function: Callable[..., Any], old: str = "", new: str = "") -> Any:
    """A function of TRL's that asks `_get_reward`, one line of it replaced; its lines keep their numbers."""
    source = textwrap.dedent(inspect.getsource(function))
    if old and source.count(old) != 1:
        raise ImportError(f"{function.__qualname__} of TRL {trl.__version__} has no single line {old!r}")
    tree = ast.parse(source.replace(old, new) if old else source)
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    names = {**function.__globals__, "get_reward": _get_reward}
    exec(compile(tree, function.__code__.co_filename, "exec", dont_inherit=True), names)  # noqa: S102  (TRL's own)
    return names[function.__name__]


class DensePPOTrainer(PPOTrainer):
    """A `PPOTrainer` that rewards each token of a response where it stands, before advantages are estimated.

    Token t of a response gets its reward in column t. TRL's own reward goes to one place at the end, and there only
    what `missing_eos_penalty` takes from it is left. What a method's sum leaves out (`baseline`; for `red` the score
    of the prompt, which is the same for each of its responses) is left out here too; `{"name": "red", "first_token":
    "fold"}` keeps it. Logged scores are the model's.

    Give the data set a column `prompt`, text or messages, beside `input_ids`: it is what the reward model reads.
    Without one, prompts are sent as the policy's ids.

    Args:
        bound: From `client.bind(tokenizer)`, with the policy's tokenizer.
        method: How tokens are rewarded: a name, or a mapping with parameters.
        truncate: "prompt_left" shortens prompts that are too long; by default they are refused.
        kwargs: As `PPOTrainer` takes them, by name, but for `reward_model`.

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
                # The collator pads what it is given, and text cannot be padded.
                kwargs[name] = dataset.remove_columns("prompt")
        args = kwargs["args"]
        stop = kwargs["processing_class"].eos_token_id if args.stop_token == "eos" else args.stop_token_id  # noqa: S105
        self._remote = RemoteReward(Scorer(bound, method, truncate=truncate), prompts, stop)
        super().__init__(reward_model=self._remote, **kwargs)

    def _add_rewards(self, rewards: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, scores: torch.Tensor) -> None:
        """Adds token rewards where tokens stand, and at the end what was added to the scores since."""
        unpunished, token_rewards = self._remote.taken(like=rewards)
        rewards += token_rewards
        rewards[rows, ends] += scores - unpunished

    train = _rebuilt(PPOTrainer.train, _SCORES_ADDED, _TOKENS_ADDED)
    _sampled = _rebuilt(PPOTrainer.generate_completions)

    def generate_completions(self, sampling: bool = False) -> None:
        """As `PPOTrainer.generate_completions`; these responses are not learnt from."""
        self._sampled(sampling)
        self._remote.forget()
