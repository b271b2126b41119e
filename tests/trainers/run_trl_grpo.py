"""Trains with TRL as a job asks and writes down the inputs of the loss; runs in TRL's environment."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import policies
from densereward_client import Client
from densereward_client.trainers.trl_grpo import AsyncTokenReward, DenseGRPOTrainer, TokenReward

job = policies.read_job()
seen: dict[str, Any] = {"losses": [], "rewards": [], "names": [], "errors": []}


def rows(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.tolist()


class Recorded:
    """A trainer that records its rewards and the inputs of its loss."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        seen["rewards"].append({"prompts": prompts, "ids": completion_ids_list, "rewards": rewards.tolist()})
        return rewards

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        names = ("completion_ids", "completion_mask", "tool_mask", "advantages")
        loss = {name: rows(inputs.get(name)) for name in names}
        loss["prompts"] = tokenizer.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        seen["losses"].append(loss)
        return super()._compute_loss(model, inputs)  # type: ignore[misc]


class Dense(Recorded, DenseGRPOTrainer):
    pass


class Scalar(Recorded, GRPOTrainer):
    pass


class LeaveOneOut(Recorded, RLOOTrainer):
    pass


class EndsTheServer(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        os.kill(job["server"], signal.SIGKILL)


def scripted(prompts: list[Any], _: Any) -> dict[str, Any]:
    """The job's completions in turn; without `masks`, the policy wrote all of their tokens."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False) for prompt in prompts]
    turns = [index % len(job["completions"]) for index in range(len(prompts))]
    return {
        "prompt_ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        "completion_ids": [job["completions"][turn] for turn in turns],
        "logprobs": None,
        **({"env_mask": [job["masks"][turn] for turn in turns]} if "masks" in job else {}),
    }


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(ids) / 10 for ids in completion_ids]


def train(changes: dict[str, Any]) -> None:
    """Trains, with these changes to the configuration."""
    functions: list[Any] = [kind(bound, method) for method in job["methods"]]
    arguments: dict[str, Any] = {
        "model": policies.make_policy(tokenizer),
        "reward_funcs": [*functions, *([length] if job["length"] else [])],
        "args": {"rloo": RLOOConfig}.get(job["trainer"], GRPOConfig)(**FIXED | job["config"] | changes),
        "train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
        "processing_class": tokenizer,
        "callbacks": [EndsTheServer()] if "server" in job else [],
    }
    if "completions" in job:
        arguments["rollout_func"] = scripted
    if job["trainer"] == "dense":
        arguments["alpha"] = job["alpha"]
    trainer = {"dense": Dense, "grpo": Scalar, "rloo": LeaveOneOut}[job["trainer"]](**arguments)
    trainer.train()
    seen["names"] = trainer.reward_func_names
    seen["finite"] = all(bool(each.isfinite().all()) for each in trainer.model.parameters())


tokenizer = policies.make_tokenizer()
kind = AsyncTokenReward if job["asynchronous"] else TokenReward
FIXED: dict[str, Any] = {
    "output_dir": job["folder"],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "max_completion_length": 12,
    "seed": 5,
}
with Client(job["url"], timeout=20, retries=1, trust_env=False) as client:
    bound = client.bind(tokenizer, eos_token_ids=job["eos"])
    for changes in job["changes"]:
        try:
            train(changes)
        except Exception as error:
            seen["errors"].append(f"{type(error).__name__}: {error}")
policies.write(job, seen)
