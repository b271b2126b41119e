"""OpenRLHF's side: its own executors, sample generator and experience maker, with an engine whose output is given.

vLLM and flash-attn are left out, since none of their code runs here.
"""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import ray
import torch

import policies  # before packages are left out: it looks for them itself
from absent import leave_out

leave_out("vllm", "flash_attn")

from openrlhf.trainer import ppo_trainer  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator  # noqa: E402
from openrlhf.utils.agent import (  # noqa: E402
    AgentInstanceBase,
    MultiTurnAgentExecutor,
    SingleTurnAgentExecutor,
)

from densereward_client import ConnectionFailed  # noqa: E402
from densereward_client.trainers.openrlhf import (  # noqa: E402
    Rewarder,
    TokenRewardsExecutor,
    experience_maker,
    install,
)

ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")
MAX_LENGTH = 256


class Engine:
    """Returns the given turns, one per call."""

    def __init__(self, turns: list[list[int]], finish_reason: str, tokenizer: Any) -> None:
        self._turns, self._finish_reason, self._tokenizer = iter(turns), finish_reason, tokenizer

    async def generate(self, prompt_ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        ids = next(self._turns)
        output = SimpleNamespace(
            token_ids=ids, text=self._tokenizer.decode(ids), finish_reason=self._finish_reason, logprobs=None
        )
        return SimpleNamespace(outputs=[output])


class Executor(TokenRewardsExecutor):
    """The label holds the messages, if there is one."""

    def prompt_of(self, prompt: str, label: Any, prompt_ids: list[int]) -> dict[str, Any]:
        return {"messages": label} if label else super().prompt_of(prompt, label, prompt_ids)


def instance_of(feedback: list[str]) -> type:
    """An environment that answers with these texts, and gives a reward of 0.25 at its end."""

    class Instance(AgentInstanceBase):
        def __init__(self) -> None:
            self._feedback = iter(feedback)
            self._left = len(feedback)

        async def step(self, states: dict[str, Any], **options: Any) -> dict[str, Any]:
            self._left -= 1
            return {
                "rewards": torch.tensor(0.0 if self._left else 0.25),
                "environment_feedback": next(self._feedback),
                "done": not self._left,
            }

    return Instance


def play(executor: Any, case: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    engine = Engine(case["turns"], case["finish_reason"], tokenizer)
    params = SimpleNamespace(max_tokens=64, logprobs=None)
    return asyncio.run(executor.execute(case["prompt"], case["label"], params, MAX_LENGTH, tokenizer, engine))


def maker_of(kind: type, estimator: str, group: int) -> Any:
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=group, micro_batch_size=2),
        reward=SimpleNamespace(clip_range=None),
        train=SimpleNamespace(dynamic_batch_enable=False),
    )
    tokenizer = SimpleNamespace(pad_token_id=0)
    return kind(None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args), tokenizer)


def learned_from(kind: type, estimator: str, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rollouts through OpenRLHF's own steps, without forward passes: no KL, and all values are 0."""
    samples = [SamplesGenerator._process_response_into_experience(None, each, max_len=MAX_LENGTH) for each in outputs]
    maker = maker_of(kind, estimator, group=len(outputs))
    experiences = maker.split_rollout_samples(samples)
    for each in experiences:
        each.kl = torch.zeros(each.action_mask.shape)
        each.values = torch.zeros(each.action_mask.shape)
    made = maker.compute_advantages_and_returns(experiences)
    return {
        "advantages": [row for each in made for row in each.advantages.tolist()],
        "returns": [row for each in made for row in each.returns.tolist()],
        "action_mask": [row for each in made for row in each.action_mask.long().tolist()],
        "logged": sorted(made[0].info),
    }


def without(name: str, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**each, "extra_logs": {k: v for k, v in each["extra_logs"].items() if k != name}} for each in outputs]


def failure(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rollouts(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    executor = Executor(Rewarder(request["url"], request["method"], trust_env=False))
    outputs = [play(executor, case, tokenizer) for case in request["cases"]]
    plain = without("token_rewards", outputs)
    maker = experience_maker(request["alpha"])
    return {
        "outputs": [{name: each[name] for name in ("reward", "scores", "extra_logs")} for each in outputs],
        "prompts": [each["action_ranges"][0][0] for each in outputs],
        "dense": {name: learned_from(maker, name, outputs) for name in ESTIMATORS},
        "plain": {name: learned_from(RemoteExperienceMaker, name, plain) for name in ESTIMATORS},
        "without_executor": failure(learned_from, maker, "gae", plain),
        "without_maker": failure(torch.tensor, [torch.zeros(3), torch.zeros(3)]),  # ppo_actor.py, line 391
    }


def turns(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Several turns, with an environment between them."""
    [case] = request["cases"]
    player = MultiTurnAgentExecutor(instance_of(case["feedback"]))
    output = play(Executor(Rewarder(request["url"], trust_env=False), player), case, tokenizer)
    names = ("reward", "extra_logs", "observation_tokens", "action_ranges")
    return {name: output[name] for name in names}


def remote_url(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`--reward.remote_url`, as OpenRLHF does it."""
    executor = SingleTurnAgentExecutor(request["remote_url"])
    outputs = [play(executor, case, tokenizer) for case in request["cases"]]
    rewards = [each["reward"] for each in outputs]
    if None in rewards:
        return {"rewards": rewards, "failed": failure(learned_from, RemoteExperienceMaker, "reinforce", outputs)}
    return {"rewards": rewards, "made": learned_from(RemoteExperienceMaker, "reinforce", outputs)}


def outage(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The server is killed between two rollouts."""
    [case] = request["cases"]
    executor = Executor(Rewarder(request["url"], retries=1, trust_env=False))
    before = play(executor, case, tokenizer)["reward"]
    os.kill(request["pid"], signal.SIGKILL)
    try:
        play(executor, case, tokenizer)
    except ConnectionFailed as error:
        return {"before": before, "raised": type(error).__name__}
    return {"before": before, "raised": None}


def installed(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The class of the trainer's experience maker; the actor's class is pickled and read again, as Ray does."""
    ppo_trainer.get_tokenizer = lambda *_, **__: tokenizer
    ppo_trainer.prepare_datasets = lambda *_: (None, None, 0)
    install(0.5)
    actor = ppo_trainer.PPOTrainer.__ray_metadata__.modified_class
    read = ray.cloudpickle.loads(ray.cloudpickle.dumps(actor))
    made = read("", strategy(), None, None, None, None, None)
    return {"actor": actor.__name__, "maker": type(made.experience_maker).__name__}


def strategy() -> Any:
    kl = SimpleNamespace(target=None, init_coef=0.0)
    args = SimpleNamespace(
        eval=SimpleNamespace(steps=-1),
        ckpt=SimpleNamespace(save_steps=-1),
        data=SimpleNamespace(disable_fast_tokenizer=False),
        algo=SimpleNamespace(kl=kl, advantage=SimpleNamespace(estimator="gae")),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None),
    )
    return SimpleNamespace(args=args)


if __name__ == "__main__":
    job = policies.read_job()
    policies.write(job, globals()[job["do"]](job, policies.make_tokenizer(pad="<unk>")))
