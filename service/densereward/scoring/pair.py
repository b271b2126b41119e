"""A reward model with a pair of language models beside it: R from the one, token rewards from the other.

The pair reads the same samples, and its rewards come back on the reward model's slots (or the trainer's spans). R is
added on the last of them, and all that is common to methods (beta, mask, scale, clip) is applied there as ever, so that
token rewards and baseline sum to the reward model's R.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from densereward.capture import LogProbabilities, Need
from densereward.errors import DenseRewardError
from densereward.methods.base import Credit, Params
from densereward.scoring.answer import encoder, method_details
from densereward.scoring.combine import all_scores, merged, on_the_same_tokens
from densereward.scoring.pipeline import Pipeline, Samples, Scores, Work
from densereward.scoring.placement import place
from densereward.scoring.plans import Plan
from densereward.scoring.preparation import PreparedSample
from densereward_client.wire import MethodAvailability, MethodRequest, ModelCard, RewardsRequest, TokenRewardsRequest

__all__ = ["PairedPipeline", "card_beside"]


@dataclass(frozen=True, slots=True)
class _Works:
    """A request on its way through the reward model and the pair.

    Attributes:
        request: as it came.
        plans: all of its methods.
        of_model: what the reward model does.
        of_pair: what the pair does.
    """

    request: TokenRewardsRequest
    plans: Sequence[Plan]
    of_model: Work
    of_pair: Work


class PairedPipeline:
    """A reward model and a pair, called as one.

    Args:
        model: gives R, and the rewards of the methods that are its own.
        pair: gives those of the methods that are a pair's.
    """

    def __init__(self, model: Pipeline, pair: Pipeline) -> None:
        self.name = model.name
        self.closing_text = model.closing_text
        self._model = model
        self._pair = pair
        both = f"{model.fingerprint} {pair.fingerprint}"
        self.fingerprint = f"fp-{hashlib.sha256(both.encode()).hexdigest()[:16]}"

    def prepare(self, request: RewardsRequest, samples: Samples) -> _Works:
        """All that comes before the engines. Blocks; for a thread.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        if not isinstance(request, TokenRewardsRequest):
            raise TypeError("a pair has nothing to add to sequence rewards")
        plans = self._model.plan(request)
        requests = dict(zip((plan.key for plan in plans), request.method_requests(""), strict=True))
        of_model = [requests[plan.key] for plan in plans if not plan.method.by_pair]
        of_pair = [_without_common(requests[plan.key]) for plan in plans if plan.method.by_pair]
        model_work = self._model.prepare(request.model_copy(update={"methods": of_model}), samples)
        shared = [
            sample if isinstance(sample, DenseRewardError) else sample.model_copy(update={"response_mask": None})
            for sample in on_the_same_tokens(samples, model_work.prepared, self._model, self._pair)
        ]
        plain = {"methods": of_pair, "include": [], "encoding_format": "float"}
        pair_work = self._pair.prepare(request.model_copy(update=plain), shared)
        without_reward = [_without_reward(each) for each in pair_work.prepared]
        return _Works(request, plans, model_work, replace(pair_work, prepared=without_reward, counted=False))

    async def score(self, work: _Works) -> list[Scores]:
        """Both models' scores, at once.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        return await all_scores([self._model, self._pair], [work.of_model, work.of_pair])

    def answer(self, work: _Works, scores: Sequence[Scores]) -> dict[str, Any]:
        """All that comes after the engines. Blocks; for a thread.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        answers = [self._model.answer(work.of_model, scores[0]), self._pair.answer(work.of_pair, scores[1])]
        served = any("error" not in item for item in answers[0]["data"])
        plans = [replace(plan, params=self._settled(plan.params)) for plan in work.plans] if served else work.plans
        items = [
            self._item(work, plans, *each)
            for each in zip(work.of_model.prepared, *(answer["data"] for answer in answers), strict=True)
        ]
        return merged(answers) | {"data": items, "fingerprint": self.fingerprint}

    def _settled(self, params: Params) -> Params:
        """The running deviation is that of the reward model's rewards, which its own answer has counted."""
        if params.normalize != "running":
            return params
        return params.model_copy(update={"normalize": self._model.running_deviation.measured()[1]})

    def _item(
        self,
        work: _Works,
        plans: Sequence[Plan],
        prepared: PreparedSample | DenseRewardError,
        own: dict[str, Any],
        of_pair: dict[str, Any],
    ) -> dict[str, Any]:
        """One sample's rewards by all methods, in the order they were asked for."""
        if failed := next((each for each in (own, of_pair) if "error" in each), None):
            return failed
        if isinstance(prepared, DenseRewardError):
            raise TypeError("a sample was scored and never prepared")
        encode = encoder(work.request.encoding_format)
        token_rewards, baseline = {}, {}
        item = own | {"warnings": list(dict.fromkeys([*own["warnings"], *of_pair["warnings"]]))}
        for plan in plans:
            if not plan.method.by_pair:
                token_rewards[plan.key], baseline[plan.key] = own["token_rewards"][plan.key], own["baseline"][plan.key]
                continue
            values = of_pair["token_rewards"][plan.key]
            # Of an empty response the pair has nothing to say; what it answered is its own reward.
            values = values if prepared.sequence.response_length else np.zeros_like(values)
            credit = _with_reward(values, own["reward"])
            placed = place(credit, own["reward"], plan.params, prepared.slots, None)
            token_rewards[plan.key], baseline[plan.key] = encode(placed.rewards), placed.baseline
            for name, value in method_details(plan, credit, placed).items():
                item[name] = item.get(name, {}) | {plan.key: value}
            if passes := of_pair.get("passes", {}).get(plan.key):
                item["passes"] = item.get("passes", {}) | {plan.key: passes}
        return item | {"token_rewards": token_rewards, "baseline": baseline}


def _without_reward(prepared: PreparedSample | DenseRewardError) -> PreparedSample | DenseRewardError:
    """The sample without the pair's own reward, where that spares a pass of the reference."""
    if isinstance(prepared, DenseRewardError) or prepared.sequence.needs != {LogProbabilities()}:
        return prepared
    needs: frozenset[Need] = frozenset([LogProbabilities(alone=True)])
    return replace(prepared, sequence=replace(prepared.sequence, needs=needs))


def _with_reward(values: np.ndarray, reward: float) -> Credit:
    """The pair's rewards, and R on the last slot."""
    rewards = values.astype(np.float64)
    rewards[-1:] += reward
    return Credit(rewards, on="slots", baseline=reward - float(rewards.sum()))


def _without_common(asked: MethodRequest) -> MethodRequest:
    """A method as the pair is asked for it: what is common to all methods is applied to the sum with R."""
    own = {name: value for name, value in asked.params.items() if name not in Params.model_fields}
    return MethodRequest(name=asked.name, label=asked.label, **own)


def card_beside(card: ModelCard, pair: ModelCard) -> ModelCard:
    """A reward model's card, with the methods that the pair beside it gives."""
    of_pair: dict[str, MethodAvailability] = {
        name: method for name, method in pair.methods.items() if method.available and not card.methods[name].available
    }
    return card.model_copy(update={"methods": card.methods | of_pair})
