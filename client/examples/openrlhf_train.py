"""OpenRLHF 0.11.2 with token rewards. In an environment with OpenRLHF, while a server runs:

    python client/examples/openrlhf_train.py --algo.advantage.estimator gae --data.label_key dialogue \
        --data.input_key prompt ... (all of OpenRLHF's own arguments)

This file is both the program, which extends the trainer, and the agent that OpenRLHF loads to make rollouts. The column
`dialogue` holds the messages that `prompt` was rendered from. DENSEREWARD_URL is the server's address.
"""

import os
import runpy
import sys
from typing import Any

from densereward_client.trainers.openrlhf import Rewarder, TokenRewardsExecutor, install


class AgentExecutor(TokenRewardsExecutor):
    """OpenRLHF makes one in each of its vLLM engines."""

    def __init__(self) -> None:
        super().__init__(Rewarder(os.environ.get("DENSEREWARD_URL", "http://127.0.0.1:8000"), "red"))

    def prompt_of(self, prompt: str, label: Any, prompt_ids: list[int]) -> dict[str, Any]:  # noqa: ARG002
        return {"messages": label}  # rendered with the reward model's own template


if __name__ == "__main__":
    install(alpha=1.0)
    sys.argv += ["--train.agent_func_path", __file__]
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
