"""Trains with TRL's PPO as a job asks and writes down the rewards it computed; runs in its environment."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig

import policies
import tiny
from densereward_client import Client
from densereward_client.trainers.trl_ppo import DensePPOTrainer

job = policies.read_job()
seen: dict[str, Any] = {"updates": [], "errors": []}
RECORDED = (
    "queries",
    "responses",
    "postprocessed_responses",
    "sequence_lengths",
    "scores",
    "rewards",
    "non_score_reward",
    "values",
    "advantages",
)


def record(function: Any) -> Any:
    """Records the local variables of TRL's function when it whitens advantages, after it computed rewards."""

    def whiten(values: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_locals
        seen["updates"].append({name: caller[name].tolist() for name in RECORDED})
        return function(values, *arguments, **options)

    return whiten


def script(function: Any) -> Any:
    """Returns the job's responses, if it has some, in place of generated ones; all logits are equal."""

    def generate(model: Any, queries: torch.Tensor, *arguments: Any) -> Any:
        if "responses" not in job:
            return function(model, queries, *arguments)
        turns = [job["responses"][index % len(job["responses"])] for index in range(len(queries))]
        responses = torch.tensor(turns)
        return torch.cat([queries, responses], 1), torch.zeros(*responses.shape, len(tokenizer))

    return generate


class EndsTheServer(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        os.kill(job["server"], signal.SIGKILL)


tokenizer = policies.make_tokenizer(job["pad"])
names = DensePPOTrainer.train.__globals__
names["masked_whiten"] = record(names["masked_whiten"])
names["batch_generation"] = script(names["batch_generation"])
texts = [
    prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, tokenize=False)
    for prompt in job["prompts"]
]
columns = {
    "input_ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
    **({"prompt": job["prompts"]} if job["column"] else {}),
}
dataset = Dataset.from_dict(columns)
config = PPOConfig(
    output_dir=job["folder"],
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    report_to="none",
    save_strategy="no",
    response_length=12,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=2,
    num_ppo_epochs=1,
    num_mini_batches=1,
    total_episodes=8,
    local_rollout_forward_batch_size=3,
    seed=5,
    **job["config"],
)
special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
value_model = tiny.make_model(
    "llama", 4, AutoModelForSequenceClassification, vocab_size=len(tokenizer), num_labels=1, **special
)
with Client(job["url"], timeout=20, retries=1, trust_env=False) as client:
    try:
        trainer = DensePPOTrainer(
            client.bind(tokenizer),
            method=job["method"],
            args=config,
            processing_class=tokenizer,
            model=policies.make_policy(tokenizer),
            ref_model=policies.make_policy(tokenizer),
            value_model=value_model,
            train_dataset=dataset,
            eval_dataset=dataset,
            callbacks=[EndsTheServer()] if "server" in job else [],
        )
        trainer.train()
        seen["finite"] = all(bool(each.isfinite().all()) for each in trainer.model.parameters())
    except Exception as error:
        seen["errors"].append(f"{type(error).__name__}: {error}")
policies.write(job, seen)
