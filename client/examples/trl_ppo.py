"""PPO with token rewards: `python client/examples/trl_ppo.py [--url http://127.0.0.1:8000] [--policy NAME]`.

Needs TRL 1.12.0, the last version with a PPO trainer, and a running server. Without `--policy`, a tiny random policy
is used: it learns nothing worth having, and shows in a minute on a CPU that everything works together.
"""

import argparse
import copy

import torch
from datasets import Dataset
from tiny_policy import tiny_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig

from densereward_client import Client
from densereward_client.trainers.trl_ppo import DensePPOTrainer

QUESTIONS = ["How was the soup?", "How was the walk?", "What is the garden like?", "Was the train on time?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--policy", help="a causal language model's name or folder")
    parser.add_argument("--method", default="red")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", default="trl_ppo")
    options = parser.parse_args()

    if options.policy:
        model = AutoModelForCausalLM.from_pretrained(options.policy)
        tokenizer = AutoTokenizer.from_pretrained(options.policy)
        value_model = AutoModelForSequenceClassification.from_pretrained(options.policy, num_labels=1)
    else:
        model, tokenizer = tiny_policy(QUESTIONS)
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        value_model = AutoModelForSequenceClassification.from_config(config)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    # The reward model reads `prompt`, rendered with its own template; the policy reads `input_ids`.
    prompts = [[{"role": "user", "content": each}] for each in QUESTIONS]
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in prompts]
    ids = [tokenizer(each, add_special_tokens=False).input_ids for each in texts]

    with Client(options.url) as client:
        trainer = DensePPOTrainer(
            client.bind(tokenizer),
            method=options.method,
            args=PPOConfig(
                output_dir=options.output,
                total_episodes=4 * options.steps,
                per_device_train_batch_size=4,
                num_mini_batches=1,
                response_length=32,
                stop_token="eos",
                missing_eos_penalty=1.0,
                num_sample_generations=0,
                logging_steps=1,
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                report_to="none",
            ),
            processing_class=tokenizer,
            model=model,
            ref_model=copy.deepcopy(model),
            value_model=value_model,
            train_dataset=Dataset.from_dict({"input_ids": ids, "prompt": prompts}),
        )
        trainer.train()
    for step in trainer.state.log_history:
        print(f"step {step['step']}: score {step['objective/scores']:+.3f}, loss {step['loss/policy_avg']:+.2e}")


if __name__ == "__main__":
    main()
