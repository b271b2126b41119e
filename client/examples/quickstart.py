"""Token rewards from a running server: `python client/examples/quickstart.py [http://127.0.0.1:8000]`."""

import sys

from densereward_client import Client, to_padded

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
messages = [{"role": "user", "content": "How was the restaurant?"}]
responses = [
    "The soup was wonderful, and the waiter was kind.",
    "The soup was cold, and nobody cared.",
]

with Client(base_url) as client:
    samples = [{"messages": messages, "response": response} for response in responses]
    answer = client.token_rewards(samples, include=["tokens"])

method = next(iter(answer.data[0].token_rewards))
for item in answer.data:
    print(f"\nreward {item.reward:+.2f} = {item.baseline.get(method, 0.0):+.2f} and, by token ({method}):")
    for token, reward in zip(item.tokens or [], item.token_rewards[method], strict=True):
        print(f"  {reward:+.3f}  {token}")

rewards, mask = to_padded(answer, method, padding_side="left")
print(f"\npadded for a trainer: rewards {rewards.shape}, mask {mask.shape}")
