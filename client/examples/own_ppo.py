"""PPO with token rewards in a training loop of your own: `python client/examples/own_ppo.py --url http://127.0.0.1:8000`.

The policy writes responses, the server rewards each of their tokens, and GAE and two clipped updates learn from that.
By default the policy is a small random model with bytes as tokens, which learns little; `--policy NAME` takes a real
one. Tensors are [B, T], right-padded, with T the length of the longest response; column t belongs to token t.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from densereward_client import BoundClient, Client, to_padded

KL, CLIP, LAMBDA, UPDATES = 0.05, 0.2, 0.95, 2
PROMPTS = ["How was the evening?", "Tell me about the food.", "Did you like the film?", "How is the weather?"]


def small_policy() -> tuple[Any, Any]:
    """A random model, and a tokenizer whose tokens are bytes: certainly not the reward model's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", "</s>", *letters])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    return AutoModelForCausalLM.from_config(config), tokenizer


def write(policy: Any, tokenizer: Any, prompts: list[str], tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Ids of prompts and responses, the attention mask, the mask of responses, and the column where responses begin."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    encoded.pop("token_type_ids", None)
    ids = policy.generate(
        **encoded, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id
    )
    start = encoded["input_ids"].shape[1]
    ends = (ids[:, start:] == tokenizer.eos_token_id).cumsum(dim=1)
    mask = (ends - (ids[:, start:] == tokenizer.eos_token_id).int()) == 0  # up to and with the first EOS
    return ids, torch.cat([encoded["attention_mask"], mask.long()], dim=1), mask, start


def token_rewards(server: BoundClient, prompts: list[str], ids: Tensor, mask: Tensor, method: str) -> Tensor:
    """The server's reward of every token; a failure raises."""
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    samples = [
        {"messages": [{"role": "user", "content": prompt}], "response_token_ids": row}
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    answer = server.token_rewards(samples, methods=[method])
    rewards, _ = to_padded(answer, method, length=ids.shape[1]).to_torch()
    return rewards


def run(policy: Any, head: Any, ids: Tensor, attention: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The log-probability of each response token, and the value before it; both are read one position earlier."""
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    output = policy(input_ids=ids, attention_mask=attention, position_ids=positions, output_hidden_states=True)
    before = slice(start - 1, -1)
    logits, hidden = output.logits[:, before].float(), output.hidden_states[-1][:, before].float()
    logs = -cross_entropy(logits.transpose(1, 2), ids[:, start:], reduction="none")
    return logs, head(hidden.detach())[..., 0]


def advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Generalised advantage estimates with gamma 1; the value after the last token is 0."""
    values, estimates, running = values * mask, torch.zeros_like(rewards), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros(len(rewards))
        running = (rewards[:, t] + next_value - values[:, t] + LAMBDA * running) * mask[:, t]
        estimates[:, t] = running
    return estimates


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of responses."""
    return (values * mask).sum() / mask.sum()


def train(policy: Any, tokenizer: Any, server: BoundClient, method: str, steps: int, tokens: int) -> list[float]:
    """The mean reward of each step."""
    policy.eval()  # without dropout, so that a ratio is 1 before the first update
    head = torch.nn.Linear(policy.config.hidden_size, 1)
    reference = type(policy)(policy.config).eval()
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.Adam([*policy.parameters(), *head.parameters()], lr=1e-4)
    history = []
    for step in range(steps):
        with torch.no_grad():
            ids, attention, mask, start = write(policy, tokenizer, PROMPTS, tokens)
            rewards = token_rewards(server, PROMPTS, ids[:, start:], mask, method)
            old, values = run(policy, head, ids, attention, start)
            log_ratio = old - run(reference, head, ids, attention, start)[0]
            estimates = advantages((rewards - KL * log_ratio) * mask, values, mask)
            targets = estimates + values
            average, deviation = mean(estimates, mask), mean((estimates - mean(estimates, mask)) ** 2, mask).sqrt()
            gain = (estimates - average) / (deviation + 1e-8)
        for _ in range(UPDATES):
            logs, values = run(policy, head, ids, attention, start)
            ratio = (logs - old).exp()
            clipped = torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
            loss = -mean(clipped, mask) + 0.5 * mean((values - targets) ** 2, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(float((rewards * mask).sum(dim=1).mean()))
        kl = float((log_ratio * mask).sum(dim=1).mean())
        print(f"step {step}: token rewards sum to {history[-1]:+.3f}, KL {kl:.3f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--policy", help="folder or hub id of a causal language model")
    parser.add_argument("--method", default="red")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    if options.policy is None:
        policy, tokenizer = small_policy()
    else:
        policy = AutoModelForCausalLM.from_pretrained(options.policy)
        tokenizer = AutoTokenizer.from_pretrained(options.policy)
    with Client(options.url) as client:
        train(policy, tokenizer, client.bind(tokenizer), options.method, options.steps, options.tokens)
