"""Token rewards in SkyRL's shape: `python client/examples/skyrl_generator.py TOKENIZER [http://127.0.0.1:8000]`.

This runs without SkyRL: the output of its generator is written out here. With SkyRL, subclass its generator as
densereward_client.trainers.skyrl shows, and return it from `BasePPOExp.get_generator`.
"""

import asyncio
import sys

from transformers import AutoTokenizer

from densereward_client import AsyncClient
from densereward_client.trainers.skyrl import with_token_rewards


async def main(folder: str, base_url: str = "http://127.0.0.1:8000") -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [[{"role": "user", "content": "How was the restaurant?"}]] * 2
    responses = ["The soup was wonderful, and the waiter was kind.", "The soup was cold, and nobody cared."]
    ids = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in responses]
    output = {
        "response_ids": ids,
        "loss_masks": [[1] * len(row) for row in ids],
        "rewards": [0.0, 0.0],
        "stop_reasons": ["stop", "stop"],
    }
    async with AsyncClient(base_url) as client:
        rewarded = await with_token_rewards(output, prompts, await client.bind(tokenizer), "red")
    for row, rewards in zip(ids, rewarded["rewards"], strict=True):
        print(f"\nreward {sum(rewards):+.2f}")
        for token, reward in zip(tokenizer.convert_ids_to_tokens(row), rewards, strict=True):
            print(f"  {reward:+.3f}  {token}")


asyncio.run(main(*sys.argv[1:]))
