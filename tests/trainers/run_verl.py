"""verl's side: its own agent loops, reward loop and advantages, with an engine whose output is given."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.trainer.ppo.core_algos import (
    compute_gae_advantage_return,
    compute_grpo_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
)
from verl.trainer.ppo.reward import resolve_reward_manager_cls
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput

import densereward_client.trainers.verl as adapter
import policies
import tiny
from densereward_client import ConnectionFailed
from densereward_client.trainers._rewards import Rewarder

TRAINED_ON = ("prompts", "responses", "response_mask", "rm_scores")


class Engine:
    """Returns the given ids."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    async def generate(self, **_: Any) -> TokenOutput:
        return TokenOutput(token_ids=self.ids)


def config_of(request: dict[str, Any], *, use_v1: bool = True) -> Any:
    return OmegaConf.create(
        {
            "trainer": {"use_v1": use_v1},
            "data": {},
            "actor_rollout_ref": {"rollout": {"prompt_length": 64, "response_length": 48}},
            "reward": {
                "reward_kwargs": {"densereward": {"base_url": request["url"], "method": request.get("method", "red")}},
                "reward_manager": {
                    "source": "importlib",
                    "name": "RewardManager",
                    "module": {"path": "pkg://densereward_client.trainers.verl"},
                },
                "reward_model": {"model_path": "default", "rollout": {"name": "vllm"}},
            },
        }
    )


def loop_of(request: dict[str, Any], tokenizer: Any, engine: Engine, *, use_v1: bool = True) -> Any:
    """An agent loop, made as verl makes one for every rollout, from its file of agent loops."""
    config = config_of(request, use_v1=use_v1)
    definition = {
        "_target_": "densereward_client.trainers.verl.SingleTurnTokenRewards",
        "base_url": request["url"],
        "method": request.get("method", "red"),
    }
    return hydra.utils.instantiate(
        config=OmegaConf.create(definition),
        trainer_config=DictConfigWrap(config=config),
        server_manager=engine,
        tokenizer=tokenizer,
        processor=None,
        hf_model_type="llama",
        dataset_cls=SimpleNamespace,
        data_config=DictConfigWrap(config.data),
        tools=None,
    )


async def played(request: dict[str, Any], tokenizer: Any) -> list[AgentLoopOutput]:
    outputs = []
    for ids in request["responses"]:
        engine = Engine()
        loop = loop_of(request, tokenizer, engine)
        engine.ids = ids
        outputs.append(await loop.run({}, raw_prompt=request["messages"]))
    return outputs


def rollouts(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    outputs = asyncio.run(played(request, tokenizer))
    batch = list_of_dict_to_tensordict([{name: each.as_dict()[name] for name in TRAINED_ON} for each in outputs])
    padded = batch.to_padded_tensor()
    rewards, mask = padded["rm_scores"], padded["response_mask"]
    uids = np.array(["same"] * len(outputs), dtype=object)
    gae, _ = compute_gae_advantage_return(rewards, torch.zeros(rewards.shape), mask, 1.0, 1.0)
    _, returns = compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config=OmegaConf.create({"gamma": 1.0}))
    grpo, _ = compute_grpo_outcome_advantage(rewards, mask, uids)
    return {
        "reward_score": [each.reward_score for each in outputs],
        "response_ids": [each.response_ids for each in outputs],
        "rm_scores": rewards.tolist(),
        "mask": mask.tolist(),
        "gae": gae.tolist(),
        "returns": returns.tolist(),
        "grpo": grpo[:, 0].tolist(),
        "rewarders": len(adapter._rewarders),
    }


class Scripted(SingleTurnAgentLoop):
    """An agent loop whose rollout is given and has a tool's tokens."""

    async def run(self, sampling_params: dict[str, Any], **sample: Any) -> AgentLoopOutput:
        return AgentLoopOutput(
            prompt_ids=[5], response_ids=sample["ids"], response_mask=sample["mask"], metrics={}, num_turns=4
        )


class ScriptedTokenRewards(adapter._TokenRewards, Scripted):
    """The same, with token rewards."""


def tools(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    config = config_of(request)
    loop = ScriptedTokenRewards(
        DictConfigWrap(config),
        None,
        tokenizer,
        None,
        SimpleNamespace,
        DictConfigWrap(config.data),
        base_url=request["url"],
    )
    sample = {"raw_prompt": request["messages"], "ids": request["responses"][0], "mask": request["mask"]}
    output = asyncio.run(loop.run({}, **sample))
    return {"rm_scores": output.as_dict()["rm_scores"].tolist(), "reward_score": output.reward_score}


def data_of(request: dict[str, Any], tokenizer: Any) -> DataProto:
    """One response as verl's streaming reward loop gets it, padded on both sides as the old loop does."""
    prompt, ids = [0, 0, 7, 8], request["responses"][0]
    batch = TensorDict(
        {
            "prompts": torch.tensor([prompt]),
            "responses": torch.tensor([[*ids, 0, 0, 0]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, *[1] * len(ids), 0, 0, 0]]),
        },
        batch_size=1,
    )
    raw_prompt = np.empty(1, dtype=object)
    raw_prompt[0] = request["messages"]
    return DataProto(batch=batch, non_tensor_batch={"raw_prompt": raw_prompt})


def manager(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """verl finds the manager by its file, and puts its score at the last token."""
    config = config_of(request)
    kind = resolve_reward_manager_cls(config)
    data = data_of(request, tokenizer)

    async def score() -> dict[str, Any]:
        made = kind(config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None)
        return dict(await made.run_single(data))

    scored = asyncio.run(score())
    row = kind.assemble_rm_scores(data, [scored["reward_score"]])
    return {"scored": scored, "row": row[0].tolist()}


def classify(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """verl's own reward loop, which calls the server as it calls vLLM's."""
    worker = object.__new__(RewardLoopWorker)
    worker.config = config_of(request)
    worker.reward_router_address = request["url"].removeprefix("http://")
    worker.input_tokenizer = tokenizer
    worker.reward_model_tokenizer = tiny.make_tokenizer()
    data = data_of(request, tokenizer)

    async def score() -> tuple[dict[str, Any], str]:
        return await worker.compute_score_disrm(data), await worker._preprocess_reward_inputs(data)

    scored, text = asyncio.run(score())
    return {"scored": scored, "text": text}


def outage(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The server is killed between two rollouts."""
    engine = Engine()
    engine.ids = request["responses"][0]

    async def play() -> dict[str, Any]:
        loop = loop_of(request, tokenizer, engine)
        loop._rewarder = Rewarder(request["url"], retries=1)
        before = (await loop.run({}, raw_prompt=request["messages"])).reward_score
        os.kill(request["pid"], signal.SIGKILL)
        try:
            await loop.run({}, raw_prompt=request["messages"])
        except ConnectionFailed as error:
            return {"before": before, "raised": type(error).__name__}
        return {"before": before, "raised": None}

    return asyncio.run(play())


def old_trainer(request: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    try:
        loop_of(request, tokenizer, Engine(), use_v1=False)
    except Exception as error:
        return {"raised": str(error)}
    return {"raised": ""}


if __name__ == "__main__":
    job = policies.read_job()
    policies.write(job, globals()[job["do"]](job, policies.make_tokenizer(pad="<unk>")))
