"""GRPO with token rewards: `python client/examples/trl_grpo.py [--url http://127.0.0.1:8000] [--policy NAME]`.

Needs TRL 1.16 and a running server. Without `--policy`, a tiny random policy is used: it learns nothing worth
having, and shows in a minute on a CPU that everything works together.
"""

import argparse

import torch
from datasets import Dataset
from tiny_policy import tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from densereward_client import Client
from densereward_client.trainers.trl_grpo import DenseGRPOTrainer, TokenReward

QUESTIONS = ["How was the soup?", "How was the walk?", "What is the garden like?", "Was the train on time?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--policy", help="a causal language model's name or folder")
    parser.add_argument("--method", default="red")
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of token rewards")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", default="trl_grpo")
    options = parser.parse_args()

    if options.policy:
        model = AutoModelForCausalLM.from_pretrained(options.policy)
        tokenizer = AutoTokenizer.from_pretrained(options.policy)
    else:
        model, tokenizer = tiny_policy(QUESTIONS)
    # The client must know every token that can end a completion.
    generated = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(generated if isinstance(generated, list) else [generated])} - {None}

    with Client(options.url) as client:
        policy = client.bind(tokenizer, eos_token_ids=sorted(eos))
        trainer = DenseGRPOTrainer(
            model=model,
            reward_funcs=[TokenReward(policy, options.method)],
            alpha=options.alpha,
            args=GRPOConfig(
                output_dir=options.output,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=32,
                logging_steps=1,
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": each}]} for each in QUESTIONS]),
            processing_class=tokenizer,
        )
        trainer.train()
    for step in trainer.state.log_history[:-1]:
        print(f"step {step['step']}: reward {step['reward']:+.3f}, loss {step['loss']:+.4f}")


if __name__ == "__main__":
    main()
